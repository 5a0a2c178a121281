/* The CPU kernels for the other files of the extension. */
#ifndef QLLM_PYTHON_PY_CPU_H
#define QLLM_PYTHON_PY_CPU_H

#include "core/compute.h"
#include "cpu/features.h"
#include "cpu/logits.h"
#include "cpu/threads.h"
#include "python/state.h"

/* The set of `name`, or of QLLM_CPU from the environment when it is NULL, or else the best one; 0,
 * or -1 with an exception. */
int qllm_choose_isa(const qllm_state *state, const char *name, qllm_isa *isa);

/* The functions over rows of logits of that set, or for "core" the plain reference; NULL with an
 * exception. */
const qllm_logit_ops *qllm_choose_logit_ops(const qllm_state *state, const char *name);

/* The pool of n threads that all functions of the extension share (n as in qllm_threads_create);
 * it lives as long as the module.  NULL with an exception.  The GIL is held. */
qllm_threads *qllm_shared_threads(qllm_state *state, int n);

/* The same for work on tensors of another library: in its team where one was given to
 * _core.use_team, with as many threads as it would take, but no more than QLLM_THREADS. */
qllm_threads *qllm_team_threads(qllm_state *state);

/* A number of threads from an argument; None is 0, which stands for QLLM_THREADS or one per core.
 * 0, or -1 with an exception. */
int qllm_parse_threads(const qllm_state *state, PyObject *object, int *threads);

/* QuantizedTensor.matmul: arguments as in _core.linear without the weight. */
PyObject *qllm_quantized_tensor_matmul(PyObject *self, PyObject *args, PyObject *kwargs);

/* Add the functions of py_encode.c, py_image.c, py_ops_test.c and py_threads_test.c: part of
 * qllm_setup_cpu. */
int qllm_setup_encode(PyObject *module);
int qllm_setup_image(PyObject *module);
int qllm_setup_ops_test(PyObject *module);
int qllm_setup_threads_test(PyObject *module);

/* The same for py_limits.c. */
int qllm_setup_limits(PyObject *module);

/* compute="exact", "auto" or "int8"; sets an exception and returns -1 on failure. */
int qllm_parse_compute(const qllm_state *state, const char *name, qllm_compute *compute);

#endif
