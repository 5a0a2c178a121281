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

/* Both conversions of float16 compute every case and choose, without a branch, so that the loops
 * below become vector code; and they work on integers where a subnormal float32 could appear, so
 * that the caller's flush-to-zero mode has no say. */

static inline float f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t magnitude = h & 0x7fffu;
    uint32_t normal = (magnitude << 13) + (112u << 23); /* exponent bias 15 becomes 127 */
    uint32_t special = normal + (112u << 23);           /* exponent 31 becomes 255 */
    uint32_t subnormal = qllm_bits_from_float((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x0400u ? subnormal : bits;
    return qllm_float_from_bits(sign | bits);
}

static inline uint16_t float_to_f16(float value)
{
    uint32_t bits = qllm_bits_from_float(value);
    uint32_t sign = bits & 0x80000000u;
    uint32_t magnitude = bits ^ sign;
    /* Below 2^-14 the result is a multiple of 2^-24, which is the last place of 0.5 + |x|. */
    uint32_t subnormal = qllm_bits_from_float(qllm_float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude >= 0x477ff000u ? 0x7c00u : normal; /* from 65520: infinity */
    half = magnitude < 0x38800000u ? subnormal : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(half | (sign >> 16));
}

float qllm_f16_to_float(uint16_t h)
{
    return f16_to_float(h);
}

uint16_t qllm_float_to_f16(float value)
{
    return float_to_f16(value);
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
        out[i] = f16_to_float(h);
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
        uint16_t h = float_to_f16(source[i]);
        memcpy(bytes + 2 * i, &h, sizeof h);
    }
}
