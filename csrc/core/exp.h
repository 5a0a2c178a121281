/* The one exponential of the sampler and the statistics: powers of two of numbers up to 0. */
#ifndef QLLM_CORE_EXP_H
#define QLLM_CORE_EXP_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/device.h"

/* 2^z for z <= 0, -inf included, in float64, as a fixed sequence of IEEE 754 operations, so that
 * every machine and every instruction set gives the same bits:
 *   t = z + SHIFT: the low four bits of t are k and those above are n, where n + k / 16 is the
 *     multiple of 1 / 16 nearest to z;  f = z - (t - SHIFT), exact, |f| <= 1 / 32
 *   q = fma(f^2, fma(f^2, fma(C5, f, C4), fma(C3, f, C2)), fma(C1, f, C0)): (2^f - 1) / f
 *   s = 2^n 2^(k / 16), by adding (bits of t) << 48 to the table's entry k
 *   2^z = fma(s, f * q, s)
 * Within 1 ulp; exactly 1 at 0; exactly 0 below QLLM_EXP2_LOWEST, so that a weight and its share of
 * a sum are 0 or normal numbers. */
#define QLLM_EXP2_LOWEST (-1000.0)
#define QLLM_EXP2_SHIFT 0x1.8p48
#define QLLM_EXP2_C0 0x1.62e42fefa39f3p-1
#define QLLM_EXP2_C1 0x1.ebfbdff82c590p-3
#define QLLM_EXP2_C2 0x1.c6b08d6f2a289p-5
#define QLLM_EXP2_C3 0x1.3b2ab6fb41213p-7
#define QLLM_EXP2_C4 0x1.5d897e525c216p-10
#define QLLM_EXP2_C5 0x1.430a1d08ec681p-13

/* The bits of 2^(k / 16), less k << 48; a device has a copy of its own. */
extern const uint64_t qllm_exp2_table[16];

static inline QLLM_BOTH double qllm_exp2_by(const uint64_t table[16], double z)
{
    double t = z + QLLM_EXP2_SHIFT, f = z - (t - QLLM_EXP2_SHIFT), f2 = f * f, s;
    double q = fma(f2, fma(QLLM_EXP2_C5, f, QLLM_EXP2_C4), fma(QLLM_EXP2_C3, f, QLLM_EXP2_C2));
    uint64_t bits;
    memcpy(&bits, &t, sizeof bits);
    bits = table[bits & 15] + (bits << 48);
    memcpy(&s, &bits, sizeof s);
    double value = fma(s, f * fma(f2, q, fma(QLLM_EXP2_C1, f, QLLM_EXP2_C0)), s);
    return z >= QLLM_EXP2_LOWEST ? value : 0.0; /* below it, `value` has no meaning */
}

static inline double qllm_exp2(double z)
{
    return qllm_exp2_by(qllm_exp2_table, z);
}

/* 1 / temperature, but finite for every temperature > 0: below 1e-300, where it is cut, any two
 * float32 logits that differ are as far apart as can be already. */
static inline double qllm_inverse_temperature(double temperature)
{
    return 1 / (temperature > 1e-300 ? temperature : 1e-300);
}

/* The weight of a logit at a temperature is exp((logit - max) / T), computed as
 * qllm_exp2((logit - max) * qllm_weight_factor(1 / T)). */
static inline double qllm_weight_factor(double inverse_temperature)
{
    return inverse_temperature * 0x1.71547652b82fep+0; /* log2(e) */
}

static inline QLLM_BOTH double qllm_weight_by(const uint64_t table[16], float logit, double max,
                                              double factor)
{
    return qllm_exp2_by(table, ((double)logit - max) * factor);
}

#endif
