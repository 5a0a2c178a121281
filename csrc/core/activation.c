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

float qllm_bf16_dot(float sum, uint16_t w0, uint16_t w1, uint16_t x0, uint16_t x1)
{
    float a0 = flush(qllm_bf16_to_float(w0)), a1 = flush(qllm_bf16_to_float(w1));
    float b0 = flush(qllm_bf16_to_float(x0)), b1 = flush(qllm_bf16_to_float(x1));
    return flush(fmaf(a0, b0, flush(fmaf(a1, b1, flush(sum)))));
}

float qllm_integer_codes(const float code[16], int limit, int16_t codes[16])
{
    float largest = qllm_float_from_bits(qllm_largest_bits(code, 16));
    float factor = (float)limit / largest;
    bool usable = isfinite(largest) && isfinite(factor);
    for (int i = 0; i < 16; i++)
        codes[i] = usable ? (int16_t)qllm_round_half_even(code[i] * factor) : 0;
    return usable ? largest / (float)limit : isfinite(largest) ? 0.0f : NAN;
}
