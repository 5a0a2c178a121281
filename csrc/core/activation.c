#include "core/activation.h"

#include <float.h>
#include <math.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "core/quant.h"

float qllm_block_activation(const float *x, int64_t n, int limit, int16_t *q)
{
    float absmax = qllm_float_from_bits(qllm_largest_bits(x, n));
    float factor = (float)limit / absmax;
    bool usable = isfinite(absmax) && isfinite(factor);
    for (int64_t k = 0; k < n; k++)
        q[k] = usable ? (int16_t)qllm_round_half_even(x[k] * factor) : 0;
    return usable ? absmax / (float)limit : isfinite(absmax) ? 0.0f : NAN;
}

static float flush(float x)
{
    return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x;
}

uint16_t qllm_bf16_activation(float x)
{
    return qllm_float_to_bf16(flush(x));
}

/* Rounded to 24 bits as if smaller exponents existed, what lies less than a quarter of a last place
 * below FLT_MIN stays below it; fmaf, which rounds to half as many bits there, has given FLT_MIN.
 * The product of two bf16 is exact in double. */
static float flushed_fma(uint16_t w, uint16_t x, float sum)
{
    float a = flush(qllm_bf16_to_float(w)), b = flush(qllm_bf16_to_float(x));
    float result = fmaf(a, b, sum);
    if (fabsf(result) == FLT_MIN && fabs((double)a * b + sum) < 0x1p-126 - 0x1p-151)
        result = copysignf(0.0f, result);
    return flush(result);
}

float qllm_bf16_dot(float sum, uint16_t w0, uint16_t w1, uint16_t x0, uint16_t x1)
{
    return flushed_fma(w0, x0, flushed_fma(w1, x1, flush(sum)));
}

float qllm_bf16_pairs(float sum, const uint16_t w[32], const uint16_t x[32])
{
    float p0 = 0.0f, p1 = 0.0f;
    for (int i = 0; i < 32; i += 2) {
        p0 = flushed_fma(w[i], x[i], p0);
        p1 = flushed_fma(w[i + 1], x[i + 1], p1);
    }
    return flush(flush(sum) + flush(p0 + p1));
}

/* What the codes are multiplied by, 0 where all of them become 0; and what one unit is worth. */
static float code_factor(const float code[16], int limit, float *unit)
{
    float largest = qllm_float_from_bits(qllm_largest_bits(code, 16));
    float factor = (float)limit / largest;
    bool usable = isfinite(largest) && isfinite(factor);
    *unit = usable ? largest / (float)limit : isfinite(largest) ? 0.0f : NAN;
    return usable ? factor : 0.0f;
}

float qllm_integer_codes(const float code[16], int limit, int16_t codes[16])
{
    float unit, factor = code_factor(code, limit, &unit);
    for (int i = 0; i < 16; i++)
        codes[i] = factor != 0.0f ? (int16_t)qllm_round_half_even(code[i] * factor) : 0;
    return unit;
}

float qllm_bf16_codes(const float code[16], uint16_t codes[16])
{
    float unit, factor = code_factor(code, QLLM_BF16_CODE_LIMIT, &unit);
    for (int i = 0; i < 16; i++)
        codes[i] = factor != 0.0f ? qllm_float_to_bf16(code[i] * factor) : 0;
    return unit;
}
