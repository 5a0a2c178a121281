/* qllm._core.QuantizedTensor for the other files of the extension: a Python object that owns one
 * qllm_qweight, never changed after it was made. */
#ifndef QLLM_PYTHON_PY_QUANT_H
#define QLLM_PYTHON_PY_QUANT_H

#include "core/qweight.h"
#include "cpu/packed.h"
#include "python/state.h"

/* The weight inside a QuantizedTensor, valid as long as `object` is; NULL with an exception set
 * when it is something else.  May be called with any object, with the GIL held; the weight itself
 * may be read without it. */
const qllm_qweight *qllm_quantized_tensor_weight(const qllm_state *state, PyObject *object);

/* Where the packed form for the CPU kernels is kept once it was made: NULL until then, freed with
 * the object.  `object` is a QuantizedTensor; the GIL is held. */
qllm_packed **qllm_quantized_tensor_packed(PyObject *object);

/* A new QuantizedTensor that takes over *weight, which is empty afterwards, also on failure (NULL
 * with an exception set).  dtype_name: the dtype the values had before quantizing ("bfloat16",
 * "float16", "float32"), or NULL. */
PyObject *qllm_quantized_tensor_wrap(const qllm_state *state, qllm_qweight *weight,
                                     const char *dtype_name);

/* A format by its name; 0, or -1 with an exception. */
int qllm_parse_format(const qllm_state *state, const char *text, qllm_format *format);

/* Adds the type to the module: part of qllm_setup_quant. */
int qllm_setup_quantized_tensor(PyObject *module);

/* An int or an object with __index__ as int64; QllmValueError names `name` when it does not fit,
 * TypeError when it is no integer.  0, or -1 with an exception set. */
int qllm_parse_int64(const qllm_state *state, PyObject *object, const char *name, int64_t *out);

#endif
