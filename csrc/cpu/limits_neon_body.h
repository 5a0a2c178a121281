/* The limits of 64-bit Arm; limits_neondot.c is compiled for the dot product extension. */
#ifndef QLLM_CPU_LIMITS_NEON_BODY_H
#define QLLM_CPU_LIMITS_NEON_BODY_H

#include <arm_neon.h>
#include <stddef.h>

#include "cpu/inline.h"
#include "cpu/limits_tables.h"

enum { READ_SUMS = 8, SUMS = 16 }; /* chains enough to hide the latency of every unit */

static uint64_t read_all(const uint8_t *data, int64_t bytes)
{
    uint8x16_t sum[READ_SUMS];
    QLLM_UNROLL
    for (int i = 0; i < READ_SUMS; i++)
        sum[i] = vdupq_n_u8(0);
    for (const uint8_t *end = data + bytes; data < end; data += sizeof sum) {
        QLLM_UNROLL
        for (int i = 0; i < READ_SUMS; i++)
            sum[i] = veorq_u8(sum[i], vld1q_u8(data + 16 * i));
    }
    QLLM_UNROLL
    for (int i = 1; i < READ_SUMS; i++)
        sum[0] = veorq_u8(sum[0], sum[i]);
    uint64x2_t words = vreinterpretq_u64_u8(sum[0]);
    return vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
}

static int32x4_t ones(qllm_unit unit)
{
    switch (unit) {
    case QLLM_UNIT_F32: return vreinterpretq_s32_f32(vdupq_n_f32(1.0f));
    case QLLM_UNIT_INT16: return vreinterpretq_s32_s16(vdupq_n_s16(1));
    default: return vreinterpretq_s32_s8(vdupq_n_s8(1));
    }
}

/* The instructions by name; volatile, so that equal products of equal ones are computed all the
 * same. */
QLLM_INLINE int32x4_t add_product(qllm_unit unit, int32x4_t sum, int32x4_t a, int32x4_t b)
{
    switch (unit) {
    case QLLM_UNIT_F32:
        __asm__ volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(a), "w"(b));
        break;
    case QLLM_UNIT_INT16:
        __asm__ volatile("smlal %0.4s, %1.4h, %2.4h" : "+w"(sum) : "w"(a), "w"(b));
        break;
    default: {
#if defined(__ARM_FEATURE_DOTPROD)
        __asm__ volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
#else /* 16-bit products, then sums of two in 32 bits */
        int32x4_t product;
        __asm__ volatile("smull %1.8h, %2.8b, %3.8b\n\tsadalp %0.4s, %1.8h"
                         : "+w"(sum), "=&w"(product) : "w"(a), "w"(b));
#endif
        break;
    }
    }
    return sum;
}

static int64_t sum_of_lanes(qllm_unit unit, int32x4_t sum)
{
    float real[4];
    int64_t all = 0;
    if (unit != QLLM_UNIT_F32)
        return vaddlvq_s32(sum);
    vst1q_f32(real, vreinterpretq_f32_s32(sum));
    for (int i = 0; i < 4; i++)
        all += (int64_t)real[i];
    return all;
}

QLLM_INLINE int64_t multiply_ones(qllm_unit unit, int64_t turns)
{
    int32x4_t sum[SUMS], a = ones(unit), b = a;
    int64_t all = 0;
    QLLM_UNROLL
    for (int i = 0; i < SUMS; i++)
        sum[i] = vdupq_n_s32(0);
    for (int64_t turn = 0; turn < turns; turn++) {
        QLLM_UNROLL
        for (int i = 0; i < SUMS; i++)
            sum[i] = add_product(unit, sum[i], a, b);
    }
    QLLM_UNROLL
    for (int i = 0; i < SUMS; i++)
        all += sum_of_lanes(unit, sum[i]);
    return all;
}

static int64_t multiply(qllm_unit unit, int64_t turns)
{
    switch (unit) {
    case QLLM_UNIT_F32: return multiply_ones(QLLM_UNIT_F32, turns);
    case QLLM_UNIT_INT16: return multiply_ones(QLLM_UNIT_INT16, turns);
    default: return multiply_ones(QLLM_UNIT_INT8, turns);
    }
}

#endif
