#include "core/dtype.h"

int64_t qllm_dtype_size(qllm_dtype dtype)
{
    return dtype == QLLM_F32 ? 4 : 2;
}

const char *qllm_dtype_name(qllm_dtype dtype)
{
    switch (dtype) {
    case QLLM_F32: return "float32";
    case QLLM_F16: return "float16";
    case QLLM_BF16: return "bfloat16";
    }
    return "";
}

void qllm_to_float(const void *source, qllm_dtype dtype, int64_t n, float *out)
{
    const uint8_t *bytes = source;
    if (n <= 0)
        return;
    if (dtype == QLLM_F32) {
        memcpy(out, source, (size_t)n * sizeof *out);
        return;
    }
    for (int64_t i = 0; dtype == QLLM_BF16 && i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, sizeof h);
        out[i] = qllm_bf16_to_float(h);
    }
    for (int64_t i = 0; dtype == QLLM_F16 && i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + 2 * i, sizeof h);
        out[i] = qllm_f16_to_float(h);
    }
}

void qllm_from_float(const float *source, qllm_dtype dtype, int64_t n, void *out)
{
    uint8_t *bytes = out;
    if (n <= 0)
        return;
    if (dtype == QLLM_F32) {
        memcpy(out, source, (size_t)n * sizeof *source);
        return;
    }
    for (int64_t i = 0; dtype == QLLM_BF16 && i < n; i++) {
        uint16_t h = qllm_float_to_bf16(source[i]);
        memcpy(bytes + 2 * i, &h, sizeof h);
    }
    for (int64_t i = 0; dtype == QLLM_F16 && i < n; i++) {
        uint16_t h = qllm_float_to_f16(source[i]);
        memcpy(bytes + 2 * i, &h, sizeof h);
    }
}
