/* Eight float64 and eight uint64 lanes in four 128-bit registers of Armv8-A: see dlanes_scalar.h
 * for what each function means. */
#ifndef QLLM_CPU_DLANES_NEON_H
#define QLLM_CPU_DLANES_NEON_H

#include <arm_neon.h>
#include <stdint.h>

#include "core/exp.h"
#include "cpu/inline.h"

enum { QLANES_SIDE_BY_SIDE = 1 };

/* a: lanes 0 and 1, b: 2 and 3, c: 4 and 5, d: 6 and 7 */
typedef struct dlanes { float64x2_t a, b, c, d; } dlanes;
typedef struct qlanes { uint64x2_t a, b, c, d; } qlanes;

QLLM_INLINE dlanes dlanes_set1(double x)
{
    float64x2_t v = vdupq_n_f64(x);
    return (dlanes){v, v, v, v};
}

QLLM_INLINE dlanes dlanes_load(const double *p)
{
    return (dlanes){vld1q_f64(p), vld1q_f64(p + 2), vld1q_f64(p + 4), vld1q_f64(p + 6)};
}

QLLM_INLINE void dlanes_store(double *p, dlanes x)
{
    vst1q_f64(p, x.a);
    vst1q_f64(p + 2, x.b);
    vst1q_f64(p + 4, x.c);
    vst1q_f64(p + 6, x.d);
}

QLLM_INLINE dlanes dlanes_load_float(const float *p)
{
    float32x4_t low = vld1q_f32(p), high = vld1q_f32(p + 4);
    return (dlanes){vcvt_f64_f32(vget_low_f32(low)), vcvt_high_f64_f32(low),
                    vcvt_f64_f32(vget_low_f32(high)), vcvt_high_f64_f32(high)};
}

QLLM_INLINE dlanes dlanes_add(dlanes x, dlanes y)
{
    return (dlanes){vaddq_f64(x.a, y.a), vaddq_f64(x.b, y.b), vaddq_f64(x.c, y.c),
                    vaddq_f64(x.d, y.d)};
}

QLLM_INLINE dlanes dlanes_sub(dlanes x, dlanes y)
{
    return (dlanes){vsubq_f64(x.a, y.a), vsubq_f64(x.b, y.b), vsubq_f64(x.c, y.c),
                    vsubq_f64(x.d, y.d)};
}

QLLM_INLINE dlanes dlanes_mul(dlanes x, dlanes y)
{
    return (dlanes){vmulq_f64(x.a, y.a), vmulq_f64(x.b, y.b), vmulq_f64(x.c, y.c),
                    vmulq_f64(x.d, y.d)};
}

QLLM_INLINE dlanes dlanes_div(dlanes x, dlanes y)
{
    return (dlanes){vdivq_f64(x.a, y.a), vdivq_f64(x.b, y.b), vdivq_f64(x.c, y.c),
                    vdivq_f64(x.d, y.d)};
}

QLLM_INLINE dlanes dlanes_fma(dlanes x, dlanes y, dlanes z)
{
    return (dlanes){vfmaq_f64(z.a, x.a, y.a), vfmaq_f64(z.b, x.b, y.b), vfmaq_f64(z.c, x.c, y.c),
                    vfmaq_f64(z.d, x.d, y.d)};
}

QLLM_INLINE float64x2_t larger_double(float64x2_t x, float64x2_t y)
{
    return vbslq_f64(vcgtq_f64(x, y), x, y);
}

QLLM_INLINE dlanes dlanes_max(dlanes x, dlanes y)
{
    return (dlanes){larger_double(x.a, y.a), larger_double(x.b, y.b), larger_double(x.c, y.c),
                    larger_double(x.d, y.d)};
}

QLLM_INLINE dlanes dlanes_abs(dlanes x)
{
    return (dlanes){vabsq_f64(x.a), vabsq_f64(x.b), vabsq_f64(x.c), vabsq_f64(x.d)};
}

QLLM_INLINE float64x2_t keep_pair(float64x2_t x, float64x2_t limit, float64x2_t value)
{
    return vreinterpretq_f64_u64(vandq_u64(vcgeq_f64(x, limit), vreinterpretq_u64_f64(value)));
}

QLLM_INLINE dlanes dlanes_keep(dlanes x, dlanes limit, dlanes value)
{
    return (dlanes){keep_pair(x.a, limit.a, value.a), keep_pair(x.b, limit.b, value.b),
                    keep_pair(x.c, limit.c, value.c), keep_pair(x.d, limit.d, value.d)};
}

typedef const uint64_t *dlanes_table;

QLLM_INLINE dlanes_table dlanes_table_load(const uint64_t table[16]) { return table; }

QLLM_INLINE float64x2_t power_pair(dlanes_table table, float64x2_t t)
{
    uint64x2_t bits = vreinterpretq_u64_f64(t);
    uint64x2_t entry = vdupq_n_u64(table[vgetq_lane_u64(bits, 0) & 15]);
    entry = vsetq_lane_u64(table[vgetq_lane_u64(bits, 1) & 15], entry, 1);
    return vreinterpretq_f64_u64(vaddq_u64(entry, vshlq_n_u64(bits, 48)));
}

QLLM_INLINE dlanes dlanes_power(dlanes_table table, dlanes t)
{
    return (dlanes){power_pair(table, t.a), power_pair(table, t.b), power_pair(table, t.c),
                    power_pair(table, t.d)};
}

QLLM_INLINE qlanes qlanes_set1(uint64_t x)
{
    uint64x2_t v = vdupq_n_u64(x);
    return (qlanes){v, v, v, v};
}

QLLM_INLINE qlanes qlanes_add(qlanes x, qlanes y)
{
    return (qlanes){vaddq_u64(x.a, y.a), vaddq_u64(x.b, y.b), vaddq_u64(x.c, y.c),
                    vaddq_u64(x.d, y.d)};
}

QLLM_INLINE qlanes qlanes_count(uint64_t x)
{
    return qlanes_add(qlanes_set1(x), (qlanes){{0, 1}, {2, 3}, {4, 5}, {6, 7}});
}

QLLM_INLINE qlanes qlanes_xor3(qlanes x, qlanes y, qlanes z)
{
    return (qlanes){veorq_u64(veorq_u64(x.a, y.a), z.a), veorq_u64(veorq_u64(x.b, y.b), z.b),
                    veorq_u64(veorq_u64(x.c, y.c), z.c), veorq_u64(veorq_u64(x.d, y.d), z.d)};
}

QLLM_INLINE uint64x2_t mul_pair(uint64x2_t x, uint64x2_t y)
{
    return vmull_u32(vmovn_u64(x), vmovn_u64(y));
}

QLLM_INLINE qlanes qlanes_mul(qlanes x, qlanes y)
{
    return (qlanes){mul_pair(x.a, y.a), mul_pair(x.b, y.b), mul_pair(x.c, y.c),
                    mul_pair(x.d, y.d)};
}

QLLM_INLINE qlanes qlanes_high(qlanes x)
{
    return (qlanes){vshrq_n_u64(x.a, 32), vshrq_n_u64(x.b, 32), vshrq_n_u64(x.c, 32),
                    vshrq_n_u64(x.d, 32)};
}

/* the low halves of four lanes */
QLLM_INLINE uint32x4_t low_halves(uint64x2_t x, uint64x2_t y)
{
    return vcombine_u32(vmovn_u64(x), vmovn_u64(y));
}

QLLM_INLINE void qlanes_store_words(uint32_t words[32], const qlanes c[4])
{
    uint32x4x4_t first = {{low_halves(c[0].a, c[0].b), low_halves(c[1].a, c[1].b),
                           low_halves(c[2].a, c[2].b), low_halves(c[3].a, c[3].b)}};
    uint32x4x4_t second = {{low_halves(c[0].c, c[0].d), low_halves(c[1].c, c[1].d),
                            low_halves(c[2].c, c[2].d), low_halves(c[3].c, c[3].d)}};
    vst4q_u32(words, first); /* one after the other, word by word */
    vst4q_u32(words + 16, second);
}

#endif
