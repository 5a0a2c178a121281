/* Elementary functions in float32 as fixed sequences of IEEE 754 operations (each rounded to
 * nearest, fused multiply-adds where written), so that every instruction set gives the same bits.
 * The vector forms in csrc/cpu follow this file operation by operation.
 *
 * exp(x): x' = min(max(x, -104), 89), NaN kept
 *   t = fma(x', LOG2E, ROUND), n = t - ROUND: the integer nearest to x' / ln 2
 *   r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x')), |r| <= 0.347
 *   q = E4; q = fma(q, r, E3); ... E0: (exp(r) - 1 - r) / r^2, minimax in the error of exp(r)
 *   p = fma(r * r, q, r) + 1
 *   exp = (p * 2^a) * 2^(n - a), a = floor(n / 2): one rounding, also among the subnormal numbers
 * At most 1 ulp from the true value (tests/test_ops.py); overflow gives infinity, underflow 0.
 *
 * silu(x) = (x < 0 ? x * e : x) / (1 + e) with e = exp(-|x|): accurate on both sides.
 * gelu_tanh(x) = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3), since
 *   (1 + tanh u) / 2 = 1 / (1 + exp(-2u)).
 *
 * gelu(x) = x/2 (1 + erf(x / sqrt 2)) = max(x, 0) - |x| T(|x|), T(z) = erfc(z / sqrt 2) / 2 the
 * upper tail of the normal distribution: nothing cancels on either side, also where T is tiny.
 *   z = min(|x|, 14.5), from where on T is 0 in float32; s = z * z
 *   z < 1: a = A5; a = fma(a, s, A4); ... A0; T = fma(-z, a, 1/2)
 *   else:  d = fma(z, z, -s), the rounding of s; e = exp(-s/2); e = fma(e, -d/2, e)
 *          p = N4; p = fma(p, z, N3); ... N0; q = D5; q = fma(q, z, D4); ... D0; T = e * (p / q)
 *   gelu = fma(-z, T, max(x, 0)), NaN and the sign of zero kept
 * Both fits are minimax in the relative error of T, by weighted least squares whose weights rise
 * where the error is largest until it is level; then the coefficients are rounded to float32 one by
 * one, the rest fitted anew each time.  a: 0 <= z <= 1, degree 5 in z^2, error 2.9e-9 (5.1e-10
 * before rounding).  p / q: 0 <= z <= 14.5, degrees 4 and 5 with N0 = 1/2 and D0 = 1, error 1.7e-8
 * (6.2e-9); all its coefficients are positive, so both sums are well conditioned.
 * As computed (every float32 with 0.5 <= |x| <= 12.9, every 37th elsewhere): 1 - 2 T is within
 * 9.6e-8 of erf; gelu within 1.3 ulp for x > 0, and for x < 0 within 3.6 * 2^-23 of
 * max(|gelu|, 1e-7) and within 7.5 ulp down to x = -12.9. */
#ifndef QLLM_CORE_ELEMENTARY_H
#define QLLM_CORE_ELEMENTARY_H

#include <math.h>
#include <stdint.h>

#include "core/device.h"
#include "core/dtype.h"

#define QLLM_EXP_MIN (-104.0f)
#define QLLM_EXP_MAX 89.0f
#define QLLM_EXP_ROUND 12582912.0f /* 1.5 * 2^23; the low bits of t hold n in two's complement */
#define QLLM_EXP_LOG2E 1.44269502f
#define QLLM_EXP_LN2_HIGH 0x1.62e4p-1f
#define QLLM_EXP_LN2_LOW 1.42860677e-6f
#define QLLM_EXP_E0 0x1.fffffcp-2f
#define QLLM_EXP_E1 0x1.555492p-3f
#define QLLM_EXP_E2 0x1.5558f2p-5f
#define QLLM_EXP_E3 0x1.1239e2p-7f
#define QLLM_EXP_E4 0x1.6a2434p-10f

/* of gelu_tanh: -2 sqrt(2 / pi) and that times 0.044715 */
#define QLLM_GELU_TANH_A (-1.59576912f)
#define QLLM_GELU_TANH_B (-0.0713548163f)
/* of gelu */
#define QLLM_GELU_LIMIT 14.5f
#define QLLM_GELU_A0 0x1.988454p-2f
#define QLLM_GELU_A1 (-0x1.105862p-4f)
#define QLLM_GELU_A2 0x1.46d558p-7f
#define QLLM_GELU_A3 (-0x1.376eacp-10f)
#define QLLM_GELU_A4 0x1.e26c9p-14f
#define QLLM_GELU_A5 (-0x1.122046p-17f)
#define QLLM_GELU_N0 0.5f
#define QLLM_GELU_N1 0x1.c01924p-2f
#define QLLM_GELU_N2 0x1.7622e4p-3f
#define QLLM_GELU_N3 0x1.4b42fcp-5f
#define QLLM_GELU_N4 0x1.0ba752p-8f
#define QLLM_GELU_D0 1.0f
#define QLLM_GELU_D1 0x1.ac4ecp0f
#define QLLM_GELU_D2 0x1.3345eep0f
#define QLLM_GELU_D3 0x1.df3cc4p-2f
#define QLLM_GELU_D4 0x1.9f33acp-4f
#define QLLM_GELU_D5 0x1.4f7334p-7f

/* |x| < 2^22 to the nearest integer, ties to even, in two additions that become vector code
 * everywhere. */
QLLM_BOTH static inline float qllm_round_half_even(float x)
{
    return (x + QLLM_EXP_ROUND) - QLLM_EXP_ROUND;
}

/* 2^n for -126 <= n <= 127 */
QLLM_BOTH static inline float qllm_power_of_two(int32_t n)
{
    return qllm_float_from_bits((uint32_t)(n + 127) << 23);
}

QLLM_BOTH static inline float qllm_expf(float x)
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
    int32_t whole = (int32_t)(qllm_bits_from_float(t) - qllm_bits_from_float(QLLM_EXP_ROUND));
    int32_t half = (whole - (whole & 1)) / 2;
    return p * qllm_power_of_two(half) * qllm_power_of_two(whole - half);
}

QLLM_BOTH static inline float qllm_siluf(float x)
{
    float e = qllm_expf(-fabsf(x));
    return (x < 0.0f ? x * e : x) / (1.0f + e);
}

/* erfc(z / sqrt 2) / 2 for 0 <= z < 1 */
QLLM_BOTH static inline float qllm_gelu_tail_near(float z)
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
QLLM_BOTH static inline float qllm_gelu_tail_far(float z)
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

QLLM_BOTH static inline float qllm_geluf(float x)
{
    if (x != x)
        return x;
    float z = fabsf(x) < QLLM_GELU_LIMIT ? fabsf(x) : QLLM_GELU_LIMIT;
    float tail = z < 1.0f ? qllm_gelu_tail_near(z) : qllm_gelu_tail_far(z);
    return fmaf(-z, tail, x < 0.0f ? 0.0f : x);
}

QLLM_BOTH static inline float qllm_gelu_tanhf(float x)
{
    float argument = fmaf(x * x, QLLM_GELU_TANH_B, QLLM_GELU_TANH_A) * x;
    return x / (1.0f + qllm_expf(argument));
}

#endif
