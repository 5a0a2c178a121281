/* Sixteen float lanes in plain C: the portable form of what lanes_avx2.h and lanes_avx512.h do with
 * registers.  The kernels are written once on top of these functions (the *_body.h files), so that
 * every instruction set takes the same operations in the same order. */
#ifndef QLLM_CPU_LANES_SCALAR_H
#define QLLM_CPU_LANES_SCALAR_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "cpu/inline.h"

#define LANES_ISA "scalar"
#define LANES_UNROLL /* a vector is a loop already */
#define LANES_UNROLL_GROUP
enum {
    LANES_FUSED_ROWS = 1,  /* rows of x in one pass of a fused kernel */
    LANES_FUSED_CHAINS = 1, /* groups summed side by side for one row */
    LANES_BLOCK_ROWS = 1,  /* register block of the kernel for many rows: rows of x ... */
    LANES_BLOCK_TILES = 1, /* ... by tiles of float-valued W */
    LANES_INT8_TILES = 1,  /* ... by tiles of int8 W */
    LANES_ATTENTION_SUMS = 4, /* of attention side by side: heads by vectors */
    LANES_INTEGER_ROWS = 1, /* rows of x in one pass of the integer kernel: 1, 2, 4 or 8 */
    LANES_INTEGER_CHAINS = 1 /* sums side by side for one row there: 1, 2 or 4 */
};

typedef struct lanes { float v[16]; } lanes;
typedef struct ilanes { uint32_t v[16]; } ilanes;

QLLM_INLINE lanes lanes_set1(float x)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = x;
    return out;
}

QLLM_INLINE lanes lanes_zero(void) { return lanes_set1(0.0f); }

QLLM_INLINE lanes lanes_load(const float *p)
{
    lanes out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}

/* the first n of p, zeros behind */
QLLM_INLINE lanes lanes_load_n(const float *p, int64_t n)
{
    lanes out = lanes_zero();
    memcpy(out.v, p, (size_t)n * sizeof(float));
    return out;
}

QLLM_INLINE void lanes_store(float *p, lanes a) { memcpy(p, a.v, sizeof a.v); }

QLLM_INLINE void lanes_store_n(float *p, lanes a, int64_t n)
{
    memcpy(p, a.v, (size_t)n * sizeof(float));
}

QLLM_INLINE lanes lanes_add(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] += b.v[i];
    return a;
}

QLLM_INLINE lanes lanes_sub(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] -= b.v[i];
    return a;
}

QLLM_INLINE lanes lanes_mul(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] *= b.v[i];
    return a;
}

QLLM_INLINE lanes lanes_div(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] /= b.v[i];
    return a;
}

/* a * b + c, rounded once */
QLLM_INLINE lanes lanes_fma(lanes a, lanes b, lanes c)
{
    for (int i = 0; i < 16; i++)
        c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}

/* a > b ? a : b and a < b ? a : b, as the x86 instructions: b where either is NaN */
/* The same as lanes_fma(a, b, sum), where sum lives long. */
QLLM_INLINE lanes lanes_add_product(lanes sum, lanes a, lanes b)
{
    return lanes_fma(a, b, sum);
}

QLLM_INLINE lanes lanes_max(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
}

QLLM_INLINE lanes lanes_min(lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
}

QLLM_INLINE lanes lanes_negate(lanes a)
{
    for (int i = 0; i < 16; i++)
        a.v[i] = -a.v[i];
    return a;
}

QLLM_INLINE lanes lanes_abs(lanes a)
{
    for (int i = 0; i < 16; i++)
        a.v[i] = fabsf(a.v[i]);
    return a;
}

/* x < 0 ? a : b */
QLLM_INLINE lanes lanes_where_negative(lanes x, lanes a, lanes b)
{
    for (int i = 0; i < 16; i++)
        b.v[i] = x.v[i] < 0.0f ? a.v[i] : b.v[i];
    return b;
}

/* bit i set where not a_i < limit */
QLLM_INLINE uint32_t lanes_not_below(lanes a, float limit)
{
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++)
        mask |= (uint32_t)!(a.v[i] < limit) << i;
    return mask;
}

/* the fold of cpu_ops.h: + 8, + 4, + 2, + 1 */
QLLM_INLINE float lanes_sum(lanes a)
{
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            a.v[i] += a.v[i + step];
    return a.v[0];
}

QLLM_INLINE float lanes_max_all(lanes a)
{
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; i++)
            a.v[i] = a.v[i] > a.v[i + step] ? a.v[i] : a.v[i + step];
    return a.v[0];
}

/* p * 2^a * 2^(n - a), where t holds n in its low bits, a = floor(n / 2): see core/elementary.h */
QLLM_INLINE lanes lanes_scale(lanes p, lanes t)
{
    uint32_t round = qllm_bits_from_float(QLLM_EXP_ROUND);
    for (int i = 0; i < 16; i++) {
        uint32_t n = qllm_bits_from_float(t.v[i]) - round;
        uint32_t half = (n >> 1) | (n & 0x80000000u);
        p.v[i] *= qllm_float_from_bits((half + 127) << 23);
        p.v[i] *= qllm_float_from_bits((n - half + 127) << 23);
    }
    return p;
}

/* the nearest integers, ties to even, as int8; lanes outside -127 .. 127 are unspecified */
QLLM_INLINE void lanes_store_int8(int8_t *p, lanes a)
{
    for (int i = 0; i < 16; i++) {
        float nearest = (a.v[i] + QLLM_EXP_ROUND) - QLLM_EXP_ROUND;
        p[i] = nearest >= -127.0f && nearest <= 127.0f ? (int8_t)nearest : 0;
    }
}

/* The same as int16, lanes outside -32767 .. 32767 unspecified, and as int8; in the order in which
 * lanes_decode gives the codes of 8 columns: here as they come. */
QLLM_INLINE void lanes_store_int16(int16_t *p, lanes a)
{
    for (int i = 0; i < 16; i++)
        p[i] = (int16_t)((a.v[i] + QLLM_EXP_ROUND) - QLLM_EXP_ROUND);
}

QLLM_INLINE void lanes_store_quads(int8_t *p, lanes a) { lanes_store_int8(p, a); }

QLLM_INLINE ilanes ilanes_load(const void *p)
{
    ilanes out;
    memcpy(out.v, p, sizeof out.v);
    return out;
}

QLLM_INLINE ilanes ilanes_set1(int32_t x)
{
    ilanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = (uint32_t)x;
    return out;
}

QLLM_INLINE ilanes ilanes_add(ilanes a, ilanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] += b.v[i];
    return a;
}

QLLM_INLINE ilanes ilanes_and(ilanes a, ilanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] &= b.v[i];
    return a;
}

QLLM_INLINE ilanes ilanes_shift_right(ilanes a, int bits)
{
    for (int i = 0; i < 16; i++)
        a.v[i] >>= bits;
    return a;
}

/* the larger, as signed numbers */
QLLM_INLINE ilanes ilanes_max(ilanes a, ilanes b)
{
    for (int i = 0; i < 16; i++)
        a.v[i] = (int32_t)a.v[i] > (int32_t)b.v[i] ? a.v[i] : b.v[i];
    return a;
}

QLLM_INLINE int32_t ilanes_max_all(ilanes a)
{
    int32_t out = (int32_t)a.v[0];
    for (int i = 1; i < 16; i++)
        out = (int32_t)a.v[i] > out ? (int32_t)a.v[i] : out;
    return out;
}

QLLM_INLINE ilanes lanes_bits(lanes a)
{
    ilanes out;
    memcpy(out.v, a.v, sizeof out.v);
    return out;
}

QLLM_INLINE lanes lanes_from_int(ilanes a)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = (float)(int32_t)a.v[i];
    return out;
}

QLLM_INLINE lanes lanes_gather(const float *base, ilanes index)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = base[index.v[i]];
    return out;
}

/* lane r: byte r % 4 of dword 4 * (r / 4) + b: the absmax codes of block b in a unit's line */
QLLM_INLINE ilanes ilanes_unit_codes(ilanes line, int b)
{
    ilanes out;
    for (int r = 0; r < 16; r++)
        out.v[r] = (line.v[4 * (r / 4) + b] >> (8 * (r % 4))) & 255u;
    return out;
}

/* the 16 values that the codes stand for */
typedef const float *lanes_table;

QLLM_INLINE lanes_table lanes_table_load(const float *values) { return values; }

/* column j (0 .. 7) of a line of 4-bit codes: high nibble first, byte by byte */
QLLM_INLINE lanes lanes_lookup(lanes_table table, const uint8_t *at, int j)
{
    ilanes line = ilanes_load(at);
    lanes out;
    int shift = 8 * (j / 2) + (j % 2 == 0 ? 4 : 0);
    for (int i = 0; i < 16; i++)
        out.v[i] = table[(line.v[i] >> shift) & 15u];
    return out;
}

/* the low halves and the high halves of a line of bfloat16 pairs */
QLLM_INLINE lanes lanes_bf16_low(ilanes line)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = qllm_float_from_bits(line.v[i] << 16);
    return out;
}

QLLM_INLINE lanes lanes_bf16_high(ilanes line)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = qllm_float_from_bits(line.v[i] & 0xffff0000u);
    return out;
}

QLLM_INLINE lanes lanes_load_f16(const void *p)
{
    lanes out;
    qllm_to_float(p, QLLM_F16, 16, out.v);
    return out;
}

/* Sums of int8 products: where to start, given the sums of the weights over all columns, which some
 * sets need; the form of 4 codes of x that is used for every row of the tile; and the step that
 * adds the 4 products of each dword. */
QLLM_INLINE ilanes ilanes_dot_start(const int32_t *row_sums)
{
    (void)row_sums;
    return ilanes_set1(0);
}

typedef int32_t ilanes_word;

QLLM_INLINE ilanes_word ilanes_dot_word(int32_t x) { return x; }

QLLM_INLINE ilanes ilanes_dot(ilanes sum, ilanes line, ilanes_word x)
{
    for (int i = 0; i < 16; i++)
        for (int b = 0; b < 32; b += 8) {
            int32_t w = (int8_t)(line.v[i] >> b), q = (int8_t)((uint32_t)x >> b);
            sum.v[i] += (uint32_t)(w * q);
        }
    return sum;
}

/* 4-bit codes as integers.  A line of codes becomes 4 vectors of int16 pairs (`wide`) or 2 of int8
 * quads, one dword a row; which columns these are is the order of lanes_store_int16 and
 * lanes_store_quads.  ilanes_dot_codes adds their products with the dword at x, the same for every
 * row; quads may need to start at a value that depends on the sum of x over the block. */
typedef const int16_t *lanes_codes;
typedef struct code_vectors { ilanes v[4]; } code_vectors;

QLLM_INLINE lanes_codes lanes_codes_load(const bool wide, const int16_t *codes)
{
    (void)wide;
    return codes;
}

QLLM_INLINE code_vectors lanes_decode(const bool wide, lanes_codes codes, const uint8_t *at)
{
    code_vectors out;
    ilanes line = ilanes_load(at);
    const int per = wide ? 2 : 4, bits = wide ? 16 : 8;
    for (int j = 0; j < 8 / per; j++)
        for (int i = 0; i < 16; i++) {
            uint32_t dword = 0;
            for (int c = 0; c < per; c++) {
                int k = j * per + c, shift = 8 * (k / 2) + (k % 2 == 0 ? 4 : 0);
                uint32_t value = (uint32_t)(int32_t)codes[(line.v[i] >> shift) & 15u];
                dword |= (value & ((1u << bits) - 1u)) << (c * bits);
            }
            out.v[j].v[i] = dword;
        }
    return out;
}

QLLM_INLINE ilanes ilanes_codes_start(const bool wide, int32_t sum_of_x)
{
    (void)wide;
    (void)sum_of_x;
    return ilanes_set1(0);
}

QLLM_INLINE ilanes ilanes_dot_codes(const bool wide, ilanes sum, ilanes w, const void *x)
{
    uint32_t q;
    memcpy(&q, x, sizeof q);
    for (int i = 0; i < 16 && wide; i++)
        sum.v[i] += (uint32_t)((int16_t)w.v[i] * (int16_t)q) +
                    (uint32_t)((int16_t)(w.v[i] >> 16) * (int16_t)(q >> 16));
    return wide ? sum : ilanes_dot(sum, w, (int32_t)q);
}

/* The absmax codes of a unit as values: out[b] of block b.  `planes` is byte p of value i. */
QLLM_INLINE void lanes_unit_values(const float *values, const uint8_t (*planes)[256], ilanes line,
                                   lanes *out)
{
    (void)planes;
    for (int b = 0; b < 4; b++)
        out[b] = lanes_gather(values, ilanes_unit_codes(line, b));
}

/* byte `b` of each dword, signed, as float */
QLLM_INLINE lanes lanes_int8_column(ilanes line, int b)
{
    lanes out;
    for (int i = 0; i < 16; i++)
        out.v[i] = (float)(int8_t)(line.v[i] >> (8 * b));
    return out;
}

#endif
