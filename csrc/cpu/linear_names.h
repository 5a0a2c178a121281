/* The `linear_name` of an instruction set.  Included by linear_<set>.c after LANES_ISA is
 * defined. */
#ifndef QLLM_CPU_LINEAR_NAMES_H
#define QLLM_CPU_LINEAR_NAMES_H

#include "cpu/cpu_ops.h"
#include "cpu/packed_layout.h"

static const char *linear_any_name(const qllm_packed *packed, qllm_tier tier, int64_t m)
{
    static const char *const fused[QLLM_FORMAT_COUNT] = {
        "f32 " LANES_ISA ", few rows",           "f16 " LANES_ISA ", few rows",
        "bf16 " LANES_ISA ", few rows",          "nf4 " LANES_ISA ", fused, few rows",
        "fp4 " LANES_ISA ", fused, few rows",    "nf4-dq " LANES_ISA ", fused, few rows",
        "fp4-dq " LANES_ISA ", fused, few rows", "int8 " LANES_ISA ", 1 row",
    };
    static const char *const blocks[QLLM_FORMAT_COUNT] = {
        "f32 " LANES_ISA ", blocks of rows",    "f16 " LANES_ISA ", blocks of rows",
        "bf16 " LANES_ISA ", blocks of rows",   "nf4 " LANES_ISA ", blocks of rows",
        "fp4 " LANES_ISA ", blocks of rows",    "nf4-dq " LANES_ISA ", blocks of rows",
        "fp4-dq " LANES_ISA ", blocks of rows", "int8 " LANES_ISA ", blocks of rows",
    };
    static const char *const bytes[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", blocks across row ends",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", blocks across row ends",
    };
    static const char *const int16[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", int16 activations",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", int16 activations",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", int16 activations",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", int16 activations",
    };
    static const char *const int8[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", int8 activations",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", int8 activations",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", int8 activations",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", int8 activations",
    };
    switch (tier) {
    case QLLM_TIER_INT16: return int16[packed->format];
    case QLLM_TIER_INT8: return int8[packed->format];
    case QLLM_TIER_BF16: return "bf16 " LANES_ISA ", bf16 activations";
    default: break;
    }
    if (packed->layout == QLLM_LAYOUT_BYTES)
        return bytes[packed->format];
    int64_t few = packed->layout == QLLM_LAYOUT_INT8 ? 1 : QLLM_FEW_ROWS;
    return m <= few ? fused[packed->format] : blocks[packed->format];
}

#endif
