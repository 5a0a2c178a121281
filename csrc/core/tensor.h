/* A non-owning, read-only, row-major matrix of unquantized values, as it lies in a mapped file:
 * contiguous, of any alignment.  A vector is a matrix of one row. */
#ifndef QLLM_CORE_TENSOR_H
#define QLLM_CORE_TENSOR_H

#include <stdint.h>

#include "core/dtype.h"
#include "core/status.h"

typedef struct qllm_tensor {
    const void *data;
    int64_t nbytes; /* what the owner vouches for; checked against rows, cols and dtype */
    qllm_dtype dtype;
    int64_t rows, cols;
} qllm_tensor;

/* Checks that data is there, sizes are not negative and nbytes is exactly rows * cols elements.
 * `name` is used in the sentence. */
qllm_status qllm_tensor_check(const qllm_tensor *tensor, const char *name, qllm_error *error);

/* NaN or infinity is an error that names its row, column and value. */
qllm_status qllm_tensor_check_finite(const qllm_tensor *tensor, const char *name,
                                     qllm_error *error);

#endif
