/* The `linear` and `linear_name` of an instruction set: one instance of the bodies per layout.
 * Included by linear_<set>.c after its lanes_<set>.h. */
#ifndef QLLM_CPU_LINEAR_TABLE_H
#define QLLM_CPU_LINEAR_TABLE_H

#include "cpu/linear_body.h"
#include "cpu/linear_int8_body.h"

#define LINEAR_INSTANCE(name, kind, nested)                                                       \
    static void name(const qllm_packed *packed, const float *bias, const qllm_rows *in,           \
                     int64_t begin, int64_t end, float *y, int64_t y_stride)                      \
    {                                                                                             \
        linear_layout(kind, nested, packed, bias, in, begin, end, y, y_stride);                   \
    }

LINEAR_INSTANCE(linear_f32, QLLM_LAYOUT_F32, false)
LINEAR_INSTANCE(linear_f16, QLLM_LAYOUT_F16, false)
LINEAR_INSTANCE(linear_bf16, QLLM_LAYOUT_BF16, false)
LINEAR_INSTANCE(linear_blocks, QLLM_LAYOUT_BLOCKS, false)
LINEAR_INSTANCE(linear_nested, QLLM_LAYOUT_BLOCKS, true)
LINEAR_INSTANCE(linear_bytes, QLLM_LAYOUT_BYTES, false)

static void linear_any(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                       int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    switch (packed->layout) {
    case QLLM_LAYOUT_F32: linear_f32(packed, bias, in, begin, end, y, y_stride); break;
    case QLLM_LAYOUT_F16: linear_f16(packed, bias, in, begin, end, y, y_stride); break;
    case QLLM_LAYOUT_BF16: linear_bf16(packed, bias, in, begin, end, y, y_stride); break;
    case QLLM_LAYOUT_INT8: linear_int8(packed, bias, in, begin, end, y, y_stride); break;
    case QLLM_LAYOUT_BYTES: linear_bytes(packed, bias, in, begin, end, y, y_stride); break;
    case QLLM_LAYOUT_BLOCKS:
        if (qllm_packed_nested(packed))
            linear_nested(packed, bias, in, begin, end, y, y_stride);
        else
            linear_blocks(packed, bias, in, begin, end, y, y_stride);
        break;
    }
}

static const char *linear_any_name(const qllm_packed *packed, int64_t m)
{
    static const char *const fused_names[QLLM_FORMAT_COUNT] = {
        "f32 " LANES_ISA ", 1-4 rows",           "f16 " LANES_ISA ", 1-4 rows",
        "bf16 " LANES_ISA ", 1-4 rows",          "nf4 " LANES_ISA ", fused, 1-4 rows",
        "fp4 " LANES_ISA ", fused, 1-4 rows",    "nf4-dq " LANES_ISA ", fused, 1-4 rows",
        "fp4-dq " LANES_ISA ", fused, 1-4 rows", "int8 " LANES_ISA ", 1 row",
    };
    static const char *const block_names[QLLM_FORMAT_COUNT] = {
        "f32 " LANES_ISA ", blocks of rows",    "f16 " LANES_ISA ", blocks of rows",
        "bf16 " LANES_ISA ", blocks of rows",   "nf4 " LANES_ISA ", blocks of rows",
        "fp4 " LANES_ISA ", blocks of rows",    "nf4-dq " LANES_ISA ", blocks of rows",
        "fp4-dq " LANES_ISA ", blocks of rows", "int8 " LANES_ISA ", blocks of rows",
    };
    static const char *const bytes_names[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", blocks across row ends",
    };
    if (packed->layout == QLLM_LAYOUT_BYTES)
        return bytes_names[packed->format];
    int64_t few = packed->layout == QLLM_LAYOUT_INT8 ? 1 : FUSED_ROWS_MAX;
    return m <= few ? fused_names[packed->format] : block_names[packed->format];
}

#endif
