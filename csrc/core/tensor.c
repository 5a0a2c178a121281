#include "core/tensor.h"

#include <inttypes.h>
#include <stddef.h>

#include "core/checked.h"

qllm_status qllm_tensor_check(const qllm_tensor *tensor, const char *name, qllm_error *error)
{
    int64_t elements, bytes;
    if (tensor->rows < 0 || tensor->cols < 0)
        return qllm_fail(error, QLLM_VALUE, "%s: negative shape (%" PRId64 ", %" PRId64 ")", name,
                         tensor->rows, tensor->cols);
    if (!qllm_checked_mul(tensor->rows, tensor->cols, &elements) ||
        !qllm_checked_mul(elements, qllm_dtype_size(tensor->dtype), &bytes))
        return qllm_fail(error, QLLM_VALUE, "%s: shape (%" PRId64 ", %" PRId64 ") is too large",
                         name, tensor->rows, tensor->cols);
    if (bytes != tensor->nbytes)
        return qllm_fail(error, QLLM_VALUE, "%s: %" PRId64 " bytes of data, but shape (%" PRId64
                         ", %" PRId64 ") of %s needs %" PRId64, name, tensor->nbytes, tensor->rows,
                         tensor->cols, qllm_dtype_name(tensor->dtype), bytes);
    if (tensor->data == NULL && bytes > 0)
        return qllm_fail(error, QLLM_VALUE, "%s: no data", name);
    return QLLM_OK;
}
