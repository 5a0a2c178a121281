/* The `linear` of an instruction set: one instance of the bodies per layout and tier. Included by
 * linear_<set>.c after its lanes_<set>.h. */
#ifndef QLLM_CPU_LINEAR_TABLE_H
#define QLLM_CPU_LINEAR_TABLE_H

#include "cpu/kernels.h"
#include "cpu/linear_body.h"
#include "cpu/linear_int8_body.h"
#include "cpu/linear_integer_body.h"
#include "cpu/linear_names.h"

#define LINEAR_INSTANCE(name, body, kind, nested)                                                 \
    static void name(const qllm_packed *packed, const float *bias, const qllm_rows *in,           \
                     int64_t begin, int64_t end, float *y, int64_t y_stride)                      \
    {                                                                                             \
        body(kind, nested, packed, bias, in, begin, end, y, y_stride);                            \
    }

/* Many rows in a function of their own, or gcc 12 spills in the loops for few. */
#define LAYOUT_INSTANCE(name, kind, nested)                                                       \
    static __attribute__((noinline)) void name##_many(                                            \
        const qllm_packed *packed, const float *bias, const qllm_rows *in, int64_t begin,         \
        int64_t end, float *y, int64_t y_stride)                                                  \
    {                                                                                             \
        blocks(kind, nested, packed, bias, in, begin, end, y, y_stride);                          \
    }                                                                                             \
    static void name(const qllm_packed *packed, const float *bias, const qllm_rows *in,           \
                     int64_t begin, int64_t end, float *y, int64_t y_stride)                      \
    {                                                                                             \
        linear_layout(kind, nested, name##_many, packed, bias, in, begin, end, y, y_stride);      \
    }

LAYOUT_INSTANCE(linear_f32, QLLM_LAYOUT_F32, false)
LAYOUT_INSTANCE(linear_f16, QLLM_LAYOUT_F16, false)
LAYOUT_INSTANCE(linear_bf16, QLLM_LAYOUT_BF16, false)
LAYOUT_INSTANCE(linear_blocks, QLLM_LAYOUT_BLOCKS, false)
LAYOUT_INSTANCE(linear_nested, QLLM_LAYOUT_BLOCKS, true)
LAYOUT_INSTANCE(linear_bytes, QLLM_LAYOUT_BYTES, false)
LINEAR_INSTANCE(linear_blocks_int16, linear_integer, true, false)
LINEAR_INSTANCE(linear_nested_int16, linear_integer, true, true)
LINEAR_INSTANCE(linear_blocks_int8, linear_integer, false, false)
LINEAR_INSTANCE(linear_nested_int8, linear_integer, false, true)

static qllm_linear_kernel *kernel_of(const qllm_packed *packed, qllm_tier tier)
{
    bool nested = qllm_packed_nested(packed);
    if (tier == QLLM_TIER_INT16)
        return nested ? linear_nested_int16 : linear_blocks_int16;
    if (tier == QLLM_TIER_INT8)
        return nested ? linear_nested_int8 : linear_blocks_int8;
    switch (packed->layout) {
    case QLLM_LAYOUT_F32: return linear_f32;
    case QLLM_LAYOUT_F16: return linear_f16;
    case QLLM_LAYOUT_BF16: return linear_bf16;
    case QLLM_LAYOUT_INT8: return linear_int8;
    case QLLM_LAYOUT_BYTES: return linear_bytes;
    case QLLM_LAYOUT_BLOCKS: break;
    }
    return nested ? linear_nested : linear_blocks;
}

static void linear_any(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                       int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    kernel_of(packed, in->tier)(packed, bias, in, begin, end, y, y_stride);
}

#endif
