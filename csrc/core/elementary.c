#include "core/elementary.h"

#include <math.h>
#include <stdint.h>

#include "core/dtype.h"

/* 2^n for -126 <= n <= 127 */
static float power_of_two(int32_t n)
{
    return qllm_float_from_bits((uint32_t)(n + 127) << 23);
}

float qllm_expf(float x)
{
    if (x != x)
        return x;
    x = x > QLLM_EXP_MIN ? x : QLLM_EXP_MIN;
    x = x < QLLM_EXP_MAX ? x : QLLM_EXP_MAX;
    float t = fmaf(x, QLLM_EXP_LOG2E, QLLM_EXP_ROUND);
    float n = t - QLLM_EXP_ROUND;
    float r = fmaf(n, -QLLM_EXP_LN2_HIGH, x);
    r = fmaf(n, -QLLM_EXP_LN2_LOW, r);
    float q = QLLM_EXP_E4;
    q = fmaf(q, r, QLLM_EXP_E3);
    q = fmaf(q, r, QLLM_EXP_E2);
    q = fmaf(q, r, QLLM_EXP_E1);
    q = fmaf(q, r, QLLM_EXP_E0);
    float p = fmaf(r * r, q, r) + 1.0f;
    int32_t whole = (int32_t)n, half = (whole - (whole & 1)) / 2;
    return p * power_of_two(half) * power_of_two(whole - half);
}

float qllm_siluf(float x)
{
    float e = qllm_expf(-fabsf(x));
    return (x < 0.0f ? x * e : x) / (1.0f + e);
}

float qllm_geluf(float x)
{
    return 0.5f * x * (1.0f + erff(x * QLLM_SQRT_HALF));
}

float qllm_gelu_tanhf(float x)
{
    float argument = fmaf(x * x, QLLM_GELU_B, QLLM_GELU_A) * x;
    return x / (1.0f + qllm_expf(argument));
}
