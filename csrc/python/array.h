/* Arrays at the boundary: the only file that touches the NumPy C API is array.c.  Every function
 * that takes an object from outside checks it fully and raises one sentence that names `name`. */
#ifndef QLLM_PYTHON_ARRAY_H
#define QLLM_PYTHON_ARRAY_H

#include "core/tensor.h"
#include "python/state.h"

typedef enum qllm_array_kind {
    QLLM_ARRAY_F32,
    QLLM_ARRAY_F64,
    QLLM_ARRAY_I64, /* any integer dtype is accepted and widened */
    QLLM_ARRAY_U8,
    QLLM_ARRAY_I8,
    QLLM_ARRAY_U16,
    QLLM_ARRAY_F16,
    QLLM_ARRAY_BOOL
} qllm_array_kind;

/* Imports the NumPy C API; once, from the module's exec slot. */
int qllm_array_setup(void);

/* A new reference to a C-contiguous, aligned, native-order array of `kind` with ndim in
 * [ndim_min, ndim_max]: the object itself where it fits, else a copy of the same values (strided,
 * Fortran-ordered or misaligned input).  Accepts NumPy arrays, objects with __array__, __dlpack__
 * (memory of the CPU) or the buffer protocol, and for I64 and F64 also sequences of numbers;
 * another dtype or byte order is an error. */
PyObject *qllm_array_input(const qllm_state *state, PyObject *object, qllm_array_kind kind,
                           int ndim_min, int ndim_max, const char *name);

/* The same for unquantized weights: float32, float16 or bfloat16 (ml_dtypes' bfloat16, that of
 * DLPack, or uint16 with dtype_name "bfloat16"), one or two dimensions; *tensor views the returned
 * array, a vector as one row.  dtype_name may be NULL. */
PyObject *qllm_array_tensor(const qllm_state *state, PyObject *object, const char *dtype_name,
                            const char *name, qllm_tensor *tensor);

/* A new array of `kind`; *data points to its uninitialised elements. */
PyObject *qllm_array_new(qllm_array_kind kind, int ndim, const int64_t *shape, void **data);

/* A read-only array that views memory which `owner` keeps alive. */
PyObject *qllm_array_view(PyObject *owner, qllm_array_kind kind, int ndim, const int64_t *shape,
                          void *data);

/* A writable array over memory of core/alloc.h, which it takes over; also on failure, then NULL
 * with an exception. */
PyObject *qllm_array_owned(qllm_array_kind kind, int ndim, const int64_t *shape, void *memory);

void *qllm_array_data(PyObject *array);
int qllm_array_ndim(PyObject *array);
int64_t qllm_array_dim(PyObject *array, int axis);
int64_t qllm_array_size(PyObject *array);

#endif
