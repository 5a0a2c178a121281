/* Eight float64 lanes and eight uint64 lanes in plain C: the portable form of what dlanes_avx2.h
 * and dlanes_avx512.h do with registers.  logits_body.h is written once on top of them and of the
 * sixteen float lanes of the same set. */
#ifndef QLLM_CPU_DLANES_SCALAR_H
#define QLLM_CPU_DLANES_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/exp.h"
#include "cpu/inline.h"

enum { QLANES_SIDE_BY_SIDE = 1 }; /* registers of noise at a time, 1 or 2 */

typedef struct dlanes { double v[8]; } dlanes;
typedef struct qlanes { uint64_t v[8]; } qlanes;

QLLM_INLINE dlanes dlanes_set1(double x)
{
    dlanes out;
    for (int i = 0; i < 8; i++)
        out.v[i] = x;
    return out;
}

QLLM_INLINE dlanes dlanes_load(const double *p)
{
    dlanes out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}

QLLM_INLINE void dlanes_store(double *p, dlanes a) { memcpy(p, a.v, sizeof a.v); }

/* eight floats as doubles */
QLLM_INLINE dlanes dlanes_load_float(const float *p)
{
    dlanes out;
    for (int i = 0; i < 8; i++)
        out.v[i] = (double)p[i];
    return out;
}

QLLM_INLINE dlanes dlanes_add(dlanes a, dlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] += b.v[i];
    return a;
}

QLLM_INLINE dlanes dlanes_sub(dlanes a, dlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] -= b.v[i];
    return a;
}

QLLM_INLINE dlanes dlanes_mul(dlanes a, dlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] *= b.v[i];
    return a;
}

QLLM_INLINE dlanes dlanes_div(dlanes a, dlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] /= b.v[i];
    return a;
}

/* a * b + c, rounded once */
QLLM_INLINE dlanes dlanes_fma(dlanes a, dlanes b, dlanes c)
{
    for (int i = 0; i < 8; i++)
        c.v[i] = fma(a.v[i], b.v[i], c.v[i]);
    return c;
}

/* a > b ? a : b */
QLLM_INLINE dlanes dlanes_max(dlanes a, dlanes b)
{
    for (int i = 0; i < 8; i++)
        b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
}

QLLM_INLINE dlanes dlanes_abs(dlanes a)
{
    for (int i = 0; i < 8; i++)
        a.v[i] = fabs(a.v[i]);
    return a;
}

/* x >= limit ? value : +0 */
QLLM_INLINE dlanes dlanes_keep(dlanes x, dlanes limit, dlanes value)
{
    for (int i = 0; i < 8; i++)
        value.v[i] = x.v[i] >= limit.v[i] ? value.v[i] : 0.0;
    return value;
}

/* qllm_exp2_table */
typedef const uint64_t *dlanes_table;

QLLM_INLINE dlanes_table dlanes_table_load(const uint64_t table[16]) { return table; }

/* the power of two s that qllm_exp2 makes of the bits of t */
QLLM_INLINE dlanes dlanes_power(dlanes_table table, dlanes t)
{
    for (int i = 0; i < 8; i++) {
        uint64_t bits;
        memcpy(&bits, &t.v[i], sizeof bits);
        bits = table[bits & 15] + (bits << 48);
        memcpy(&t.v[i], &bits, sizeof bits);
    }
    return t;
}

QLLM_INLINE qlanes qlanes_set1(uint64_t x)
{
    qlanes out;
    for (int i = 0; i < 8; i++)
        out.v[i] = x;
    return out;
}

/* x, x + 1, .. x + 7 */
QLLM_INLINE qlanes qlanes_count(uint64_t x)
{
    qlanes out;
    for (int i = 0; i < 8; i++)
        out.v[i] = x + (uint64_t)i;
    return out;
}

QLLM_INLINE qlanes qlanes_add(qlanes a, qlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] += b.v[i];
    return a;
}

QLLM_INLINE qlanes qlanes_xor3(qlanes a, qlanes b, qlanes c)
{
    for (int i = 0; i < 8; i++)
        a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
}

/* the 64-bit products of the low halves */
QLLM_INLINE qlanes qlanes_mul(qlanes a, qlanes b)
{
    for (int i = 0; i < 8; i++)
        a.v[i] = (a.v[i] & UINT32_MAX) * (b.v[i] & UINT32_MAX);
    return a;
}

/* the high halves */
QLLM_INLINE qlanes qlanes_high(qlanes a)
{
    for (int i = 0; i < 8; i++)
        a.v[i] >>= 32;
    return a;
}

/* words[4 i + j]: the low half of lane i of c[j] */
QLLM_INLINE void qlanes_store_words(uint32_t words[32], const qlanes c[4])
{
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++)
            words[4 * i + j] = (uint32_t)c[j].v[i];
}

#endif
