/* Element types of unquantized data, and the exact conversions between them and float32. */
#ifndef QLLM_CORE_DTYPE_H
#define QLLM_CORE_DTYPE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/device.h"

typedef enum qllm_dtype { QLLM_F32 = 0, QLLM_F16 = 1, QLLM_BF16 = 2 } qllm_dtype;

/* Bytes of one element. */
int64_t qllm_dtype_size(qllm_dtype dtype);

/* "float32", "float16", "bfloat16". */
const char *qllm_dtype_name(qllm_dtype dtype);

QLLM_BOTH static inline float qllm_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

QLLM_BOTH static inline uint32_t qllm_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

QLLM_BOTH static inline float qllm_bf16_to_float(uint16_t h)
{
    return qllm_float_from_bits((uint32_t)h << 16);
}

/* Round to nearest, ties to even; NaN stays NaN. */
QLLM_BOTH static inline uint16_t qllm_float_to_bf16(float value)
{
    uint32_t bits = qllm_bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* Both conversions of float16 compute every case and choose, without a branch, so that the loops
 * below become vector code; and they work on integers where a subnormal float32 could appear, so
 * that the caller's flush-to-zero mode has no say. */

QLLM_BOTH static inline float qllm_f16_to_float(uint16_t h)
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

/* Round to nearest, ties to even; overflow gives infinity, NaN stays NaN. */
QLLM_BOTH static inline uint16_t qllm_float_to_f16(float value)
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

/* Reads n elements of `dtype` at `source` (any alignment) as float32 into `out`. */
void qllm_to_float(const void *source, qllm_dtype dtype, int64_t n, float *out);

/* Rounds n float32 values to `dtype` at `out` (any alignment). */
void qllm_from_float(const float *source, qllm_dtype dtype, int64_t n, void *out);

#endif
