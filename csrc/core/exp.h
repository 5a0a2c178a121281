/* The one exponential of the sampler and the statistics. */
#ifndef QLLM_CORE_EXP_H
#define QLLM_CORE_EXP_H

#include <stdint.h>
#include <string.h>

/* exp(x) for x <= 0 in float64.  Built from additions and multiplications in a fixed order, so
 * that, unlike the C library's, it gives the same bits on every machine, and loops over it
 * vectorize.  Within 1 ulp; exactly 1 at 0; exactly 0 below -708, where the true value nears the
 * smallest normal number. */
static inline double qllm_exp(double x)
{
    /* x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^52 rounds to an integer, whose low bits
     * are then those of the double. */
    const double shifter = 0x1.8p52;
    double bounded = x > -708.0 ? x : -708.0;
    double n = bounded * 0x1.71547652b82fep+0 + shifter;
    uint64_t bits;
    memcpy(&bits, &n, sizeof bits);
    n -= shifter;
    double r = (bounded - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;

    /* Taylor series to r^13 / 13!; what is left out is below 4e-18. */
    double r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    double low = (1.0 / 2 + r * (1.0 / 6)) + r2 * (1.0 / 24 + r * (1.0 / 120));
    double middle = (1.0 / 720 + r * (1.0 / 5040)) + r2 * (1.0 / 40320 + r * (1.0 / 362880));
    double high = (1.0 / 3628800 + r * (1.0 / 39916800)) +
                  r2 * (1.0 / 479001600 + r * (1.0 / 6227020800));
    double mantissa = 1.0 + (r + r2 * (low + r4 * middle + r8 * high));

    uint64_t scale_bits = (bits + 1023) << 52;
    double scale;
    memcpy(&scale, &scale_bits, sizeof scale);
    return x > -708.0 ? mantissa * scale : 0.0;
}

/* 1 / temperature, but finite for every temperature > 0: below 1e-300, where it is cut, any two
 * float32 logits that differ are as far apart as can be already. */
static inline double qllm_inverse_temperature(double temperature)
{
    return 1 / (temperature > 1e-300 ? temperature : 1e-300);
}

/* weights (count) = exp((logit - max) * inverse_temperature); returns their sum, in an order that
 * depends on count alone.  weights may be NULL for the sum alone. */
double qllm_exp_weights(const float *logits, int64_t count, double max, double inverse_temperature,
                        double *weights);

#endif
