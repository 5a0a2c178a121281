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
 * gelu(x) = (0.5 * x) * (1 + erff(x * sqrt(1/2))) with the C library's erff, per element. */
#ifndef QLLM_CORE_ELEMENTARY_H
#define QLLM_CORE_ELEMENTARY_H

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

/* -2 sqrt(2 / pi) and that times 0.044715 */
#define QLLM_GELU_A (-1.59576912f)
#define QLLM_GELU_B (-0.0713548163f)
#define QLLM_SQRT_HALF 0.707106769f

float qllm_expf(float x);
float qllm_siluf(float x);
float qllm_geluf(float x);
float qllm_gelu_tanhf(float x);

#endif
