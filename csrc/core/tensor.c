#include "core/tensor.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

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

static bool is_nonfinite(const void *data, qllm_dtype dtype, int64_t i)
{
    float value;
    qllm_to_float((const uint8_t *)data + i * qllm_dtype_size(dtype), dtype, 1, &value);
    return (qllm_bits_from_float(value) & 0x7f800000u) == 0x7f800000u;
}

/* Whether an exponent of all ones is among n elements. */
static bool any_nonfinite(const uint8_t *bytes, qllm_dtype dtype, int64_t n)
{
    uint32_t mask32 = 0x7f800000u, found32 = 0;
    uint16_t mask16 = dtype == QLLM_F16 ? 0x7c00u : 0x7f80u, found16 = 0;
    for (int64_t i = 0; dtype == QLLM_F32 && i < n; i++) {
        uint32_t bits;
        memcpy(&bits, bytes + 4 * i, sizeof bits);
        found32 |= (bits & mask32) == mask32;
    }
    for (int64_t i = 0; dtype != QLLM_F32 && i < n; i++) {
        uint16_t bits;
        memcpy(&bits, bytes + 2 * i, sizeof bits);
        found16 |= (bits & mask16) == mask16;
    }
    return (found32 | found16) != 0;
}

qllm_status qllm_tensor_check_finite(const qllm_tensor *tensor, const char *name,
                                     qllm_error *error)
{
    enum { CHUNK = 4096 };
    int64_t elements = tensor->rows * tensor->cols, size = qllm_dtype_size(tensor->dtype);
    for (int64_t first = 0; first < elements; first += CHUNK) {
        const uint8_t *bytes = (const uint8_t *)tensor->data + first * size;
        int64_t n = elements - first < CHUNK ? elements - first : CHUNK, i = 0;
        if (!any_nonfinite(bytes, tensor->dtype, n))
            continue;
        while (i < n - 1 && !is_nonfinite(bytes, tensor->dtype, i))
            i++;
        float value;
        qllm_to_float(bytes + i * size, tensor->dtype, 1, &value);
        return qllm_fail(error, QLLM_VALUE, "%s: the value at row %" PRId64 ", column %" PRId64
                         " is %s; repair the weights, or set allow_nonfinite and read back NaN "
                         "for all that shares a scale with it", name, (first + i) / tensor->cols,
                         (first + i) % tensor->cols,
                         value != value ? "nan" : value > 0.0f ? "inf" : "-inf");
    }
    return QLLM_OK;
}
