/* Sixteen float lanes in four 128-bit registers of Armv8-A: see lanes_scalar.h for what each
 * function means.  With the dot product extension (Armv8.2) the sums of int8 products are one
 * instruction; the files that may use it are compiled for it, and nothing else differs. */
#ifndef QLLM_CPU_LANES_NEON_H
#define QLLM_CPU_LANES_NEON_H

#include <arm_neon.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "cpu/inline.h"

#if defined(__ARM_FEATURE_DOTPROD)
#define LANES_ISA "neondot"
#else
#define LANES_ISA "neon"
#endif
#define LANES_UNROLL QLLM_UNROLL
#define LANES_UNROLL_GROUP /* long enough without */
enum {
    LANES_FUSED_ROWS = 4, /* 16 sums, the table in 4 registers, 4 of decoded values */
    LANES_FUSED_CHAINS = 1,
    LANES_BLOCK_ROWS = 6, /* 24 sums, 4 of weights and one value of x in 32 registers */
    LANES_BLOCK_TILES = 1,
    LANES_INT8_TILES = 1,
    LANES_ATTENTION_SUMS = 4,
    LANES_INTEGER_ROWS = 2,
    LANES_INTEGER_CHAINS = 1
};

/* a: lanes 0 .. 3, b: 4 .. 7, c: 8 .. 11, d: 12 .. 15 */
typedef struct lanes { float32x4_t a, b, c, d; } lanes;
typedef struct ilanes { uint32x4_t a, b, c, d; } ilanes;

QLLM_INLINE lanes lanes_set1(float x)
{
    float32x4_t v = vdupq_n_f32(x);
    return (lanes){v, v, v, v};
}

QLLM_INLINE lanes lanes_zero(void) { return lanes_set1(0.0f); }

QLLM_INLINE lanes lanes_load(const float *p)
{
    return (lanes){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}

QLLM_INLINE void lanes_store(float *p, lanes x)
{
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}

/* the first n of p, which may be negative or above 4, zeros behind */
QLLM_INLINE float32x4_t load_quarter(const float *p, int64_t n)
{
    float32x4_t v = vdupq_n_f32(0.0f);
    if (n >= 4)
        return vld1q_f32(p);
    if (n > 0)
        v = vsetq_lane_f32(p[0], v, 0);
    if (n > 1)
        v = vsetq_lane_f32(p[1], v, 1);
    return n > 2 ? vsetq_lane_f32(p[2], v, 2) : v;
}

QLLM_INLINE lanes lanes_load_n(const float *p, int64_t n)
{
    if (n == 16)
        return lanes_load(p);
    return (lanes){load_quarter(p, n), load_quarter(p + 4, n - 4), load_quarter(p + 8, n - 8),
                   load_quarter(p + 12, n - 12)};
}

QLLM_INLINE void store_quarter(float *p, float32x4_t v, int64_t n)
{
    if (n >= 4) {
        vst1q_f32(p, v);
        return;
    }
    if (n > 0)
        p[0] = vgetq_lane_f32(v, 0);
    if (n > 1)
        p[1] = vgetq_lane_f32(v, 1);
    if (n > 2)
        p[2] = vgetq_lane_f32(v, 2);
}

QLLM_INLINE void lanes_store_n(float *p, lanes x, int64_t n)
{
    if (n == 16) {
        lanes_store(p, x);
        return;
    }
    store_quarter(p, x.a, n);
    store_quarter(p + 4, x.b, n - 4);
    store_quarter(p + 8, x.c, n - 8);
    store_quarter(p + 12, x.d, n - 12);
}

QLLM_INLINE lanes lanes_add(lanes x, lanes y)
{
    return (lanes){vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c),
                   vaddq_f32(x.d, y.d)};
}

QLLM_INLINE lanes lanes_sub(lanes x, lanes y)
{
    return (lanes){vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c),
                   vsubq_f32(x.d, y.d)};
}

QLLM_INLINE lanes lanes_mul(lanes x, lanes y)
{
    return (lanes){vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c),
                   vmulq_f32(x.d, y.d)};
}

QLLM_INLINE lanes lanes_div(lanes x, lanes y)
{
    return (lanes){vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c),
                   vdivq_f32(x.d, y.d)};
}

QLLM_INLINE lanes lanes_fma(lanes x, lanes y, lanes z)
{
    return (lanes){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
                   vfmaq_f32(z.d, x.d, y.d)};
}

/* fmax and fmin would give NaN where either is one: y is what the other sets give then. */
QLLM_INLINE float32x4_t larger(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}

QLLM_INLINE float32x4_t smaller(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcltq_f32(x, y), x, y);
}

QLLM_INLINE lanes lanes_add_product(lanes sum, lanes a, lanes b)
{
    return lanes_fma(a, b, sum);
}

QLLM_INLINE lanes lanes_max(lanes x, lanes y)
{
    return (lanes){larger(x.a, y.a), larger(x.b, y.b), larger(x.c, y.c), larger(x.d, y.d)};
}

QLLM_INLINE lanes lanes_min(lanes x, lanes y)
{
    return (lanes){smaller(x.a, y.a), smaller(x.b, y.b), smaller(x.c, y.c), smaller(x.d, y.d)};
}

QLLM_INLINE lanes lanes_negate(lanes x)
{
    return (lanes){vnegq_f32(x.a), vnegq_f32(x.b), vnegq_f32(x.c), vnegq_f32(x.d)};
}

QLLM_INLINE lanes lanes_abs(lanes x)
{
    return (lanes){vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)};
}

QLLM_INLINE lanes lanes_where_negative(lanes x, lanes y, lanes z)
{
    return (lanes){vbslq_f32(vcltzq_f32(x.a), y.a, z.a), vbslq_f32(vcltzq_f32(x.b), y.b, z.b),
                   vbslq_f32(vcltzq_f32(x.c), y.c, z.c), vbslq_f32(vcltzq_f32(x.d), y.d, z.d)};
}

QLLM_INLINE uint32_t lanes_not_below(lanes x, float limit)
{
    const float32x4_t bound = vdupq_n_f32(limit);
    const uint32x4_t bit = {1, 2, 4, 8};
    uint32x4_t low = vorrq_u32(vbicq_u32(bit, vcltq_f32(x.a, bound)),
                               vbicq_u32(bit << 4, vcltq_f32(x.b, bound)));
    uint32x4_t high = vorrq_u32(vbicq_u32(bit << 8, vcltq_f32(x.c, bound)),
                                vbicq_u32(bit << 12, vcltq_f32(x.d, bound)));
    return vaddvq_u32(vorrq_u32(low, high));
}

QLLM_INLINE float lanes_sum(lanes x)
{
    float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

QLLM_INLINE float lanes_max_all(lanes x)
{
    float32x4_t four = larger(larger(x.a, x.c), larger(x.b, x.d));
    four = larger(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(larger(four, vextq_f32(four, four, 1)), 0);
}

QLLM_INLINE float32x4_t scale_quarter(float32x4_t p, float32x4_t t)
{
    int32x4_t n = vsubq_s32(vreinterpretq_s32_f32(t),
                            vreinterpretq_s32_f32(vdupq_n_f32(QLLM_EXP_ROUND)));
    int32x4_t half = vshrq_n_s32(n, 1), one = vdupq_n_s32(127);
    int32x4_t first = vshlq_n_s32(vaddq_s32(half, one), 23);
    int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(n, half), one), 23);
    return vmulq_f32(vmulq_f32(p, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

QLLM_INLINE lanes lanes_scale(lanes p, lanes t)
{
    return (lanes){scale_quarter(p.a, t.a), scale_quarter(p.b, t.b), scale_quarter(p.c, t.c),
                   scale_quarter(p.d, t.d)};
}

QLLM_INLINE int16x8_t nearest_int16(float32x4_t low, float32x4_t high)
{
    return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(low)), vqmovn_s32(vcvtnq_s32_f32(high)));
}

QLLM_INLINE void lanes_store_int8(int8_t *p, lanes x)
{
    vst1q_s8(p, vcombine_s8(vqmovn_s16(nearest_int16(x.a, x.b)),
                            vqmovn_s16(nearest_int16(x.c, x.d))));
}

/* as they come */
QLLM_INLINE void lanes_store_int16(int16_t *p, lanes x)
{
    vst1q_s16(p, nearest_int16(x.a, x.b));
    vst1q_s16(p + 8, nearest_int16(x.c, x.d));
}

/* of 8 columns: 1 3 5 7 0 2 4 6 */
QLLM_INLINE void lanes_store_quads(int8_t *p, lanes x)
{
    static const uint8_t order[16] = {1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14};
    int8x16_t codes = vcombine_s8(vqmovn_s16(nearest_int16(x.a, x.b)),
                                  vqmovn_s16(nearest_int16(x.c, x.d)));
    vst1q_s8(p, vqtbl1q_s8(codes, vld1q_u8(order)));
}

QLLM_INLINE ilanes ilanes_load(const void *p)
{
    const uint8_t *at = p; /* bytes: any alignment */
    return (ilanes){vreinterpretq_u32_u8(vld1q_u8(at)), vreinterpretq_u32_u8(vld1q_u8(at + 16)),
                    vreinterpretq_u32_u8(vld1q_u8(at + 32)),
                    vreinterpretq_u32_u8(vld1q_u8(at + 48))};
}

QLLM_INLINE ilanes ilanes_set1(int32_t x)
{
    uint32x4_t v = vdupq_n_u32((uint32_t)x);
    return (ilanes){v, v, v, v};
}

QLLM_INLINE ilanes ilanes_add(ilanes x, ilanes y)
{
    return (ilanes){vaddq_u32(x.a, y.a), vaddq_u32(x.b, y.b), vaddq_u32(x.c, y.c),
                    vaddq_u32(x.d, y.d)};
}

QLLM_INLINE ilanes ilanes_and(ilanes x, ilanes y)
{
    return (ilanes){vandq_u32(x.a, y.a), vandq_u32(x.b, y.b), vandq_u32(x.c, y.c),
                    vandq_u32(x.d, y.d)};
}

/* The operator, since the intrinsic wants its count as a literal. */
QLLM_INLINE ilanes ilanes_shift_right(ilanes x, int bits)
{
    return (ilanes){x.a >> bits, x.b >> bits, x.c >> bits, x.d >> bits};
}

QLLM_INLINE int32x4_t ilanes_signed(uint32x4_t x) { return vreinterpretq_s32_u32(x); }
QLLM_INLINE uint32x4_t ilanes_unsigned(int32x4_t x) { return vreinterpretq_u32_s32(x); }

QLLM_INLINE uint32x4_t larger_int(uint32x4_t x, uint32x4_t y)
{
    return ilanes_unsigned(vmaxq_s32(ilanes_signed(x), ilanes_signed(y)));
}

QLLM_INLINE ilanes ilanes_max(ilanes x, ilanes y)
{
    return (ilanes){larger_int(x.a, y.a), larger_int(x.b, y.b), larger_int(x.c, y.c),
                    larger_int(x.d, y.d)};
}

QLLM_INLINE int32_t ilanes_max_all(ilanes x)
{
    uint32x4_t four = larger_int(larger_int(x.a, x.b), larger_int(x.c, x.d));
    return vmaxvq_s32(ilanes_signed(four));
}

QLLM_INLINE ilanes lanes_bits(lanes x)
{
    return (ilanes){vreinterpretq_u32_f32(x.a), vreinterpretq_u32_f32(x.b),
                    vreinterpretq_u32_f32(x.c), vreinterpretq_u32_f32(x.d)};
}

QLLM_INLINE lanes lanes_from_int(ilanes x)
{
    return (lanes){vcvtq_f32_s32(ilanes_signed(x.a)), vcvtq_f32_s32(ilanes_signed(x.b)),
                   vcvtq_f32_s32(ilanes_signed(x.c)), vcvtq_f32_s32(ilanes_signed(x.d))};
}

QLLM_INLINE float32x4_t gather_quarter(const float *base, uint32x4_t index)
{
    float32x4_t out = vdupq_n_f32(base[vgetq_lane_u32(index, 0)]);
    out = vsetq_lane_f32(base[vgetq_lane_u32(index, 1)], out, 1);
    out = vsetq_lane_f32(base[vgetq_lane_u32(index, 2)], out, 2);
    return vsetq_lane_f32(base[vgetq_lane_u32(index, 3)], out, 3);
}

QLLM_INLINE lanes lanes_gather(const float *base, ilanes index)
{
    return (lanes){gather_quarter(base, index.a), gather_quarter(base, index.b),
                   gather_quarter(base, index.c), gather_quarter(base, index.d)};
}

/* bytes of x by number; a number above 15 gives 0 */
QLLM_INLINE uint32x4_t pick_bytes(uint32x4_t x, uint8x16_t numbers)
{
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(x), numbers));
}

QLLM_INLINE ilanes ilanes_unit_codes(ilanes line, int b)
{
    const uint8x16_t first = {0, 128, 128, 128, 1, 128, 128, 128, 2, 128, 128, 128,
                              3, 128, 128, 128};
    uint8x16_t numbers = vaddq_u8(first, vdupq_n_u8((uint8_t)(4 * b)));
    return (ilanes){pick_bytes(line.a, numbers), pick_bytes(line.b, numbers),
                    pick_bytes(line.c, numbers), pick_bytes(line.d, numbers)};
}

/* byte i of each of the 16 values */
typedef uint8x16x4_t lanes_table;

QLLM_INLINE lanes_table lanes_table_load(const float *values)
{
    return vld4q_u8((const uint8_t *)values);
}

/* Sixteen floats from their bytes: plane i holds byte i of each. */
QLLM_INLINE lanes lanes_from_planes(uint8x16_t p0, uint8x16_t p1, uint8x16_t p2, uint8x16_t p3)
{
    uint16x8_t low_first = vreinterpretq_u16_u8(vzip1q_u8(p0, p1));
    uint16x8_t low_second = vreinterpretq_u16_u8(vzip2q_u8(p0, p1));
    uint16x8_t high_first = vreinterpretq_u16_u8(vzip1q_u8(p2, p3));
    uint16x8_t high_second = vreinterpretq_u16_u8(vzip2q_u8(p2, p3));
    return (lanes){vreinterpretq_f32_u16(vzip1q_u16(low_first, high_first)),
                   vreinterpretq_f32_u16(vzip2q_u16(low_first, high_first)),
                   vreinterpretq_f32_u16(vzip1q_u16(low_second, high_second)),
                   vreinterpretq_f32_u16(vzip2q_u16(low_second, high_second))};
}

/* One load sorts the line by the byte of its dwords: register j / 2 then holds the codes of column
 * j, or j and j + 1, of all rows in order. */
QLLM_INLINE lanes lanes_lookup(lanes_table table, const uint8_t *line, int j)
{
    uint8x16_t bytes = vld4q_u8(line).val[j / 2];
    uint8x16_t codes = j % 2 == 0 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
    return lanes_from_planes(vqtbl1q_u8(table.val[0], codes), vqtbl1q_u8(table.val[1], codes),
                             vqtbl1q_u8(table.val[2], codes), vqtbl1q_u8(table.val[3], codes));
}

QLLM_INLINE lanes lanes_from_bits(ilanes x)
{
    return (lanes){vreinterpretq_f32_u32(x.a), vreinterpretq_f32_u32(x.b),
                   vreinterpretq_f32_u32(x.c), vreinterpretq_f32_u32(x.d)};
}

QLLM_INLINE lanes lanes_bf16_low(ilanes line)
{
    return lanes_from_bits((ilanes){line.a << 16, line.b << 16, line.c << 16, line.d << 16});
}

QLLM_INLINE lanes lanes_bf16_high(ilanes line)
{
    return lanes_from_bits(ilanes_and(line, ilanes_set1((int32_t)0xffff0000u)));
}

QLLM_INLINE float32x4_t f16_quarter(const uint8_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

QLLM_INLINE lanes lanes_load_f16(const void *p)
{
    const uint8_t *at = p;
    return (lanes){f16_quarter(at), f16_quarter(at + 8), f16_quarter(at + 16),
                   f16_quarter(at + 24)};
}

QLLM_INLINE ilanes ilanes_dot_start(const int32_t *row_sums)
{
    (void)row_sums;
    return ilanes_set1(0);
}

typedef int8x16_t ilanes_word;

QLLM_INLINE ilanes_word ilanes_dot_word(int32_t x) { return vreinterpretq_s8_s32(vdupq_n_s32(x)); }

QLLM_INLINE uint32x4_t dot_quarter(uint32x4_t sum, uint32x4_t line, int8x16_t x)
{
    int8x16_t w = vreinterpretq_s8_u32(line);
#if defined(__ARM_FEATURE_DOTPROD)
    return ilanes_unsigned(vdotq_s32(ilanes_signed(sum), w, x));
#else
    /* Products in int16, added by pairs: 2 * 128 * 127 = 32512 at most, since |x| <= 127. */
    int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
    return ilanes_unsigned(vpadalq_s16(ilanes_signed(sum), pairs));
#endif
}

QLLM_INLINE ilanes ilanes_dot(ilanes sum, ilanes line, ilanes_word x)
{
    return (ilanes){dot_quarter(sum.a, line.a, x), dot_quarter(sum.b, line.b, x),
                    dot_quarter(sum.c, line.c, x), dot_quarter(sum.d, line.d, x)};
}

typedef struct lanes_codes { uint8x16_t low, high; } lanes_codes; /* bytes of the 16 codes */
typedef struct code_vectors { ilanes v[4]; } code_vectors;

QLLM_INLINE lanes_codes lanes_codes_load(const bool wide, const int16_t *codes)
{
    uint8x16x2_t bytes = vld2q_u8((const uint8_t *)codes);
    (void)wide;
    return (lanes_codes){bytes.val[0], bytes.val[1]};
}

QLLM_INLINE uint32x4_t pick_bytes_of(uint8x16_t table, uint32x4_t numbers)
{
    return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(numbers)));
}

QLLM_INLINE uint32x4_t zipped(bool second, uint8x16_t low, uint8x16_t high)
{
    return vreinterpretq_u32_u8(second ? vzip2q_u8(low, high) : vzip1q_u8(low, high));
}

/* The codes of one column as int16, one a row: rows 0 .. 7, rows 8 .. 15. */
QLLM_INLINE void decode_column(lanes_codes codes, uint8x16_t nibbles, uint32x4_t *first,
                               uint32x4_t *second)
{
    uint8x16_t low = vqtbl1q_u8(codes.low, nibbles), high = vqtbl1q_u8(codes.high, nibbles);
    *first = zipped(false, low, high);
    *second = zipped(true, low, high);
}

/* int16: vector j holds columns 2 j and 2 j + 1, each a half, since multiplying by a number that is
 * the same for all lanes is what Arm's int16 products are good at.  int8: four columns a row. */
QLLM_INLINE code_vectors lanes_decode(const bool wide, lanes_codes codes, const uint8_t *at)
{
    const uint8x16_t mask = vdupq_n_u8(15);
    code_vectors out;
    if (wide) {
        uint8x16x4_t bytes = vld4q_u8(at);
        LANES_UNROLL
        for (int j = 0; j < 4; j++) {
            decode_column(codes, vshrq_n_u8(bytes.val[j], 4), &out.v[j].a, &out.v[j].b);
            decode_column(codes, vandq_u8(bytes.val[j], mask), &out.v[j].c, &out.v[j].d);
        }
        return out;
    }
    ilanes line = ilanes_load(at);
    ilanes odd = ilanes_and(line, ilanes_set1(0x0f0f0f0f));
    ilanes even = ilanes_and(ilanes_shift_right(line, 4), ilanes_set1(0x0f0f0f0f));
    out.v[0] = (ilanes){pick_bytes_of(codes.low, odd.a), pick_bytes_of(codes.low, odd.b),
                        pick_bytes_of(codes.low, odd.c), pick_bytes_of(codes.low, odd.d)};
    out.v[1] = (ilanes){pick_bytes_of(codes.low, even.a), pick_bytes_of(codes.low, even.b),
                        pick_bytes_of(codes.low, even.c), pick_bytes_of(codes.low, even.d)};
    return out;
}

QLLM_INLINE ilanes ilanes_codes_start(const bool wide, int32_t sum_of_x)
{
    (void)wide;
    (void)sum_of_x;
    return ilanes_set1(0);
}

/* sum + w * x[column] of the first or the last four rows of eight */
QLLM_INLINE uint32x4_t add_low_rows(uint32x4_t sum, uint32x4_t w, int16x4_t x, int column)
{
    int16x4_t rows = vget_low_s16(vreinterpretq_s16_u32(w));
    return ilanes_unsigned(column == 0 ? vmlal_lane_s16(ilanes_signed(sum), rows, x, 0)
                                       : vmlal_lane_s16(ilanes_signed(sum), rows, x, 1));
}

QLLM_INLINE uint32x4_t add_high_rows(uint32x4_t sum, uint32x4_t w, int16x4_t x, int column)
{
    int16x8_t rows = vreinterpretq_s16_u32(w);
    return ilanes_unsigned(column == 0 ? vmlal_high_lane_s16(ilanes_signed(sum), rows, x, 0)
                                       : vmlal_high_lane_s16(ilanes_signed(sum), rows, x, 1));
}

QLLM_INLINE ilanes ilanes_dot_codes(const bool wide, ilanes sum, ilanes w, const void *x)
{
    int32_t dword;
    memcpy(&dword, x, sizeof dword);
    if (!wide)
        return ilanes_dot(sum, w, ilanes_dot_word(dword));
    int16x4_t q = vreinterpret_s16_s32(vdup_n_s32(dword));
    sum = (ilanes){add_low_rows(sum.a, w.a, q, 0), add_high_rows(sum.b, w.a, q, 0),
                   add_low_rows(sum.c, w.b, q, 0), add_high_rows(sum.d, w.b, q, 0)};
    return (ilanes){add_low_rows(sum.a, w.c, q, 1), add_high_rows(sum.b, w.c, q, 1),
                    add_low_rows(sum.c, w.d, q, 1), add_high_rows(sum.d, w.d, q, 1)};
}

QLLM_INLINE void lanes_unit_values(const float *values, const uint8_t (*planes)[256], ilanes line,
                                   lanes *out)
{
    (void)planes;
    LANES_UNROLL
    for (int b = 0; b < 4; b++)
        out[b] = lanes_gather(values, ilanes_unit_codes(line, b));
}

QLLM_INLINE float32x4_t int8_quarter(uint32x4_t line, int b)
{
    int32x4_t top = ilanes_signed(line << (24 - 8 * b));
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
}

QLLM_INLINE lanes lanes_int8_column(ilanes line, int b)
{
    return (lanes){int8_quarter(line.a, b), int8_quarter(line.b, b), int8_quarter(line.c, b),
                   int8_quarter(line.d, b)};
}

#endif
