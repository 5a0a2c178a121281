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

/* erfc(z / sqrt 2) / 2 for 0 <= z < 1 */
static float tail_near(float z)
{
    float s = z * z, a = QLLM_GELU_A5;
    a = fmaf(a, s, QLLM_GELU_A4);
    a = fmaf(a, s, QLLM_GELU_A3);
    a = fmaf(a, s, QLLM_GELU_A2);
    a = fmaf(a, s, QLLM_GELU_A1);
    a = fmaf(a, s, QLLM_GELU_A0);
    return fmaf(-z, a, 0.5f);
}

/* erfc(z / sqrt 2) / 2 for 1 <= z <= 14.5 */
static float tail_far(float z)
{
    float s = z * z, d = fmaf(z, z, -s);
    float e = qllm_expf(-0.5f * s);
    e = fmaf(e, -0.5f * d, e);
    float p = QLLM_GELU_N4, q = QLLM_GELU_D5;
    p = fmaf(p, z, QLLM_GELU_N3);
    p = fmaf(p, z, QLLM_GELU_N2);
    p = fmaf(p, z, QLLM_GELU_N1);
    p = fmaf(p, z, QLLM_GELU_N0);
    q = fmaf(q, z, QLLM_GELU_D4);
    q = fmaf(q, z, QLLM_GELU_D3);
    q = fmaf(q, z, QLLM_GELU_D2);
    q = fmaf(q, z, QLLM_GELU_D1);
    q = fmaf(q, z, QLLM_GELU_D0);
    return e * (p / q);
}

float qllm_geluf(float x)
{
    if (x != x)
        return x;
    float z = fabsf(x) < QLLM_GELU_LIMIT ? fabsf(x) : QLLM_GELU_LIMIT;
    float tail = z < 1.0f ? tail_near(z) : tail_far(z);
    return fmaf(-z, tail, x < 0.0f ? 0.0f : x);
}

float qllm_gelu_tanhf(float x)
{
    float argument = fmaf(x * x, QLLM_GELU_TANH_B, QLLM_GELU_TANH_A) * x;
    return x / (1.0f + qllm_expf(argument));
}
