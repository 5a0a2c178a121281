/* Encoding with four 128-bit registers of Armv8-A: see encode_lanes_scalar.h for what each function
 * means. */
#ifndef QLLM_CPU_ENCODE_LANES_NEON_H
#define QLLM_CPU_ENCODE_LANES_NEON_H

#include <string.h>

#include "cpu/encode.h"
#include "cpu/lanes_neon.h"

QLLM_INLINE void ilanes_store(void *p, ilanes x)
{
    uint8_t *at = p; /* bytes: any alignment */
    vst1q_u8(at, vreinterpretq_u8_u32(x.a));
    vst1q_u8(at + 16, vreinterpretq_u8_u32(x.b));
    vst1q_u8(at + 32, vreinterpretq_u8_u32(x.c));
    vst1q_u8(at + 48, vreinterpretq_u8_u32(x.d));
}

QLLM_INLINE ilanes ilanes_load_bytes(const void *p, int64_t n)
{
    uint8_t bytes[64] = {0};
    if (n == 64)
        return ilanes_load(p);
    memcpy(bytes, p, (size_t)n);
    return ilanes_load(bytes);
}

QLLM_INLINE void ilanes_store_bytes(void *p, ilanes x, int64_t n)
{
    uint8_t bytes[64];
    ilanes_store(n == 64 ? p : bytes, x);
    if (n < 64)
        memcpy(p, bytes, (size_t)n);
}

QLLM_INLINE ilanes ilanes_sub(ilanes x, ilanes y)
{
    return (ilanes){vsubq_u32(x.a, y.a), vsubq_u32(x.b, y.b), vsubq_u32(x.c, y.c),
                    vsubq_u32(x.d, y.d)};
}

QLLM_INLINE ilanes ilanes_negative(ilanes x)
{
    return (ilanes){vcltzq_s32(ilanes_signed(x.a)), vcltzq_s32(ilanes_signed(x.b)),
                    vcltzq_s32(ilanes_signed(x.c)), vcltzq_s32(ilanes_signed(x.d))};
}

QLLM_INLINE lanes ilanes_as_float(ilanes x) { return lanes_from_bits(x); }

QLLM_INLINE uint32x4_t bf16_quarter(const uint8_t *p)
{
    return vshlq_n_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p))), 16);
}

QLLM_INLINE lanes lanes_load_bf16(const void *p)
{
    const uint8_t *at = p;
    return lanes_from_bits((ilanes){bf16_quarter(at), bf16_quarter(at + 8), bf16_quarter(at + 16),
                                    bf16_quarter(at + 24)});
}

QLLM_INLINE void lanes_deinterleave(lanes x, lanes y, lanes *even, lanes *odd)
{
    *even = (lanes){vuzp1q_f32(x.a, x.b), vuzp1q_f32(x.c, x.d), vuzp1q_f32(y.a, y.b),
                    vuzp1q_f32(y.c, y.d)};
    *odd = (lanes){vuzp2q_f32(x.a, x.b), vuzp2q_f32(x.c, x.d), vuzp2q_f32(y.a, y.b),
                   vuzp2q_f32(y.c, y.d)};
}

QLLM_INLINE float32x4_t round_f16_quarter(float32x4_t x)
{
    return vcvt_f32_f16(vcvt_f16_f32(x));
}

QLLM_INLINE lanes lanes_round_f16(lanes x)
{
    return (lanes){round_f16_quarter(x.a), round_f16_quarter(x.b), round_f16_quarter(x.c),
                   round_f16_quarter(x.d)};
}

QLLM_INLINE uint16x8_t halves(uint32x4_t x) { return vreinterpretq_u16_u32(x); }
QLLM_INLINE uint32x4_t dwords(uint16x8_t x) { return vreinterpretq_u32_u16(x); }

QLLM_INLINE ilanes ilanes_max_halves(ilanes x, ilanes y)
{
    return (ilanes){dwords(vmaxq_u16(halves(x.a), halves(y.a))),
                    dwords(vmaxq_u16(halves(x.b), halves(y.b))),
                    dwords(vmaxq_u16(halves(x.c), halves(y.c))),
                    dwords(vmaxq_u16(halves(x.d), halves(y.d)))};
}

QLLM_INLINE uint32_t ilanes_max_all_halves(ilanes x)
{
    return vmaxvq_u16(vmaxq_u16(vmaxq_u16(halves(x.a), halves(x.b)),
                                vmaxq_u16(halves(x.c), halves(x.d))));
}

QLLM_INLINE uint32x4_t exceeds_quarter(float32x4_t x, float32x4_t y)
{
    return vshrq_n_u32(vcgtq_f32(x, y), 31);
}

QLLM_INLINE ilanes lanes_exceeds(lanes x, lanes y)
{
    return (ilanes){exceeds_quarter(x.a, y.a), exceeds_quarter(x.b, y.b),
                    exceeds_quarter(x.c, y.c), exceeds_quarter(x.d, y.d)};
}

QLLM_INLINE void ilanes_store_low_bytes(uint8_t *p, ilanes x)
{
    uint16x8_t low = vuzp1q_u16(halves(x.a), halves(x.b));
    uint16x8_t high = vuzp1q_u16(halves(x.c), halves(x.d));
    vst1q_u8(p, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
}

QLLM_INLINE ilanes ilanes_from_float(lanes x)
{
    return (ilanes){ilanes_unsigned(vcvtq_s32_f32(x.a)), ilanes_unsigned(vcvtq_s32_f32(x.b)),
                    ilanes_unsigned(vcvtq_s32_f32(x.c)), ilanes_unsigned(vcvtq_s32_f32(x.d))};
}

QLLM_INLINE uint32x4_t low_pairs(uint32x4_t x, uint32x4_t y)
{
    return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
}

QLLM_INLINE uint32x4_t high_pairs(uint32x4_t x, uint32x4_t y)
{
    return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
}

/* Dword j of quarter i becomes dword i of the dwords j. */
QLLM_INLINE ilanes transpose_4x4(uint32x4_t r0, uint32x4_t r1, uint32x4_t r2, uint32x4_t r3)
{
    uint32x4_t even_top = vtrn1q_u32(r0, r1), odd_top = vtrn2q_u32(r0, r1);
    uint32x4_t even_low = vtrn1q_u32(r2, r3), odd_low = vtrn2q_u32(r2, r3);
    return (ilanes){low_pairs(even_top, even_low), low_pairs(odd_top, odd_low),
                    high_pairs(even_top, even_low), high_pairs(odd_top, odd_low)};
}

/* Sixteen squares of 4 x 4: those of one quarter of all rows become four rows. */
QLLM_INLINE void ilanes_transpose(ilanes rows[16])
{
    ilanes square[4][4]; /* of rows 4 i .. 4 i + 3, quarter j */
    QLLM_UNROLL
    for (int i = 0; i < 4; i++) {
        const ilanes *r = rows + 4 * i;
        square[i][0] = transpose_4x4(r[0].a, r[1].a, r[2].a, r[3].a);
        square[i][1] = transpose_4x4(r[0].b, r[1].b, r[2].b, r[3].b);
        square[i][2] = transpose_4x4(r[0].c, r[1].c, r[2].c, r[3].c);
        square[i][3] = transpose_4x4(r[0].d, r[1].d, r[2].d, r[3].d);
    }
    QLLM_UNROLL
    for (int j = 0; j < 4; j++) {
        const ilanes a = square[0][j], b = square[1][j], c = square[2][j], d = square[3][j];
        rows[4 * j] = (ilanes){a.a, b.a, c.a, d.a};
        rows[4 * j + 1] = (ilanes){a.b, b.b, c.b, d.b};
        rows[4 * j + 2] = (ilanes){a.c, b.c, c.c, d.c};
        rows[4 * j + 3] = (ilanes){a.d, b.d, c.d, d.d};
    }
}

QLLM_INLINE ilanes ilanes_split_halves(ilanes x)
{
    uint16x8_t a = halves(x.a), b = halves(x.b), c = halves(x.c), d = halves(x.d);
    return (ilanes){dwords(vuzp1q_u16(a, b)), dwords(vuzp1q_u16(c, d)), dwords(vuzp2q_u16(a, b)),
                    dwords(vuzp2q_u16(c, d))};
}

QLLM_INLINE ilanes ilanes_join_halves(ilanes x)
{
    uint16x8_t a = halves(x.a), b = halves(x.b), c = halves(x.c), d = halves(x.d);
    return (ilanes){dwords(vzip1q_u16(a, c)), dwords(vzip2q_u16(a, c)), dwords(vzip1q_u16(b, d)),
                    dwords(vzip2q_u16(b, d))};
}

/* A search in four steps: the thresholds that each step asks about, by what is known so far. */
typedef struct lanes_coder {
    float32x4_t first, second[2];
    uint8x16_t third;    /* bytes of 4 thresholds */
    uint8x16x2_t fourth; /* and of 8 */
    uint8x16_t codes;
} lanes_coder;

QLLM_INLINE lanes_coder lanes_coder_load(const qllm_code_table *table)
{
    const float *t = table->thresholds;
    const float32x4_t third = {t[1], t[5], t[9], t[13]};
    const float32x4_t fourth[2] = {{t[0], t[2], t[4], t[6]}, {t[8], t[10], t[12], t[14]}};
    return (lanes_coder){
        vdupq_n_f32(t[7]),
        {vdupq_n_f32(t[3]), vdupq_n_f32(t[11])},
        vreinterpretq_u8_f32(third),
        {{vreinterpretq_u8_f32(fourth[0]), vreinterpretq_u8_f32(fourth[1])}},
        vld1q_u8(table->codes)};
}

/* The numbers of the four bytes of float i, for dwords i. */
QLLM_INLINE uint8x16_t bytes_of(uint32x4_t i)
{
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), i, vdupq_n_u32(0x04040404u)));
}

/* The number of thresholds below x; a comparison that holds is -1. */
QLLM_INLINE uint32x4_t thresholds_below(const lanes_coder *coder, float32x4_t x)
{
    uint32x4_t above = vcgtq_f32(x, coder->first);
    float32x4_t asked = vbslq_f32(above, coder->second[1], coder->second[0]);
    uint32x4_t known = vaddq_u32(vaddq_u32(above, above), vcgtq_f32(x, asked));
    known = vsubq_u32(vdupq_n_u32(0), known); /* 0 .. 3 */
    asked = vreinterpretq_f32_u8(vqtbl1q_u8(coder->third, bytes_of(known)));
    known = vsubq_u32(vaddq_u32(known, known), vcgtq_f32(x, asked));
    asked = vreinterpretq_f32_u8(vqtbl2q_u8(coder->fourth, bytes_of(known)));
    return vsubq_u32(vaddq_u32(known, known), vcgtq_f32(x, asked));
}

QLLM_INLINE uint32x4_t code_quarter(const lanes_coder *coder, bool is_fp4, float32x4_t x)
{
    uint32x4_t below = thresholds_below(coder, x);
    if (!is_fp4)
        return below;
    below = vorrq_u32(below, vdupq_n_u32(0x80808000u)); /* numbers of no byte: 0 */
    return vreinterpretq_u32_u8(vqtbl1q_u8(coder->codes, vreinterpretq_u8_u32(below)));
}

QLLM_INLINE uint32x4_t code_pair_quarter(const lanes_coder *coder, bool is_fp4, float32x4_t even,
                                         float32x4_t odd)
{
    return vorrq_u32(vshlq_n_u32(code_quarter(coder, is_fp4, even), 4),
                     code_quarter(coder, is_fp4, odd));
}

QLLM_INLINE ilanes lanes_code_pairs(lanes_coder coder, bool is_fp4, lanes even, lanes odd)
{
    return (ilanes){code_pair_quarter(&coder, is_fp4, even.a, odd.a),
                    code_pair_quarter(&coder, is_fp4, even.b, odd.b),
                    code_pair_quarter(&coder, is_fp4, even.c, odd.c),
                    code_pair_quarter(&coder, is_fp4, even.d, odd.d)};
}

typedef struct value_table { const float *code; } value_table;

QLLM_INLINE value_table value_table_load(const float code[16])
{
    return (value_table){code};
}

QLLM_INLINE lanes lanes_values(value_table table, const uint8_t *bytes)
{
    float out[16];
    for (int i = 0; i < 8; i++) {
        out[2 * i] = table.code[bytes[i] >> 4];
        out[2 * i + 1] = table.code[bytes[i] & 15];
    }
    return lanes_load(out);
}

#endif
