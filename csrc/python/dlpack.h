/* Arrays of other libraries through DLPack, the protocol of `__dlpack__`: their memory is used in
 * place. */
#ifndef QLLM_PYTHON_DLPACK_H
#define QLLM_PYTHON_DLPACK_H

#include <stdbool.h>
#include <stdint.h>

#include "python/state.h"

enum { QLLM_DLPACK_DIMENSIONS = 32 };

typedef enum qllm_dlpack_code { /* of the protocol */
    QLLM_DLPACK_INT = 0,
    QLLM_DLPACK_UINT = 1,
    QLLM_DLPACK_FLOAT = 2,
    QLLM_DLPACK_BFLOAT = 4,
    QLLM_DLPACK_BOOL = 6
} qllm_dlpack_code;

typedef struct qllm_dlpack_view {
    PyObject *owner; /* a new reference, which keeps the memory alive */
    void *data;
    int code, bits;  /* of an element */
    int ndim;
    int64_t shape[QLLM_DLPACK_DIMENSIONS], strides[QLLM_DLPACK_DIMENSIONS]; /* in elements */
    bool read_only;
} qllm_dlpack_view;

/* Asks the object, which has `__dlpack__`, for its memory: in the protocol's version 1 or, from a
 * library that does not know it, in the one before.  0, or -1 with an error set; memory of another
 * device is refused. */
int qllm_dlpack_import(const qllm_state *state, PyObject *object, const char *name,
                       qllm_dlpack_view *view);

#endif
