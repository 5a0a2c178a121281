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

float qllm_f16_to_float(uint16_t h);

/* Round to nearest, ties to even; overflow gives infinity, NaN stays NaN. */
uint16_t qllm_float_to_f16(float value);

/* Reads n elements of `dtype` at `source` (any alignment) as float32 into `out`. */
void qllm_to_float(const void *source, qllm_dtype dtype, int64_t n, float *out);

/* Rounds n float32 values to `dtype` at `out` (any alignment). */
void qllm_from_float(const float *source, qllm_dtype dtype, int64_t n, void *out);

#endif
