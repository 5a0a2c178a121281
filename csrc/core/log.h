/* The one logarithm of the sampler and the statistics. */
#ifndef QLLM_CORE_LOG_H
#define QLLM_CORE_LOG_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#include "core/device.h"

/* ln x of a finite x > 0 in float64, as a fixed sequence of IEEE 754 operations (none of them
 * fused), so that every machine and device gives the same bits whatever its C library:
 *   x = 2^k m, sqrt(1/2) <= m < sqrt(2);  f = m - 1, exact;  s = f / (2 + f), z = s^2
 *   R = z (2/3 + 2/5 z + 2/7 z^2 + ... + 2/21 z^9), from ln m = 2 atanh s: what is left out is
 *     below 2^-60 of it
 *   ln x = k LN2_HIGH - ((h - (s (h + R) + k LN2_LOW)) - f),  h = f^2 / 2: f stands last, so that
 *     the result is as exact near 1 as elsewhere; k LN2_HIGH is exact
 * Below 1 ulp; exactly 0 at 1. */
#define QLLM_LN2_HIGH 0x1.62e42feep-1
#define QLLM_LN2_LOW 0x1.a39ef35793c76p-33
#define QLLM_SQRT_HALF_BITS UINT64_C(0x3fe6a09e667f3bcd)

static inline QLLM_BOTH double qllm_log(double x)
{
    double scaled = x < DBL_MIN ? x * 0x1p54 : x, m;
    uint64_t bits;
    memcpy(&bits, &scaled, sizeof bits);
    int64_t exponent = (int64_t)(bits - QLLM_SQRT_HALF_BITS) >> 52;
    bits -= (uint64_t)exponent << 52;
    memcpy(&m, &bits, sizeof m);
    double k = (double)(x < DBL_MIN ? exponent - 54 : exponent);
    double f = m - 1, s = f / (2 + f), z = s * s, w = z * z, h = 0.5 * f * f;
    double odd = 2. / 3 + w * (2. / 7 + w * (2. / 11 + w * (2. / 15 + w * (2. / 19))));
    double even = 2. / 5 + w * (2. / 9 + w * (2. / 13 + w * (2. / 17 + w * (2. / 21))));
    double rest = z * (odd + z * even);
    return k * QLLM_LN2_HIGH - ((h - (s * (h + rest) + k * QLLM_LN2_LOW)) - f);
}

#endif
