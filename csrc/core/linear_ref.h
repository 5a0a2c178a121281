/* The oracle of every linear kernel: y = x W^T + bias, plain C, with the order of summation that
 * all kernels of a tier (core/compute.h) keep.  It is defined here and nowhere else.
 *
 * Tier exact.  k is cut into groups of QLLM_GROUP.  Inside group g one chain
 * p_g = fma(w_k, x_k, p_g) from +0 over ascending k; across groups one chain y = fma(s_g, p_g, y)
 * from +0 over ascending g; then y + bias.
 *   4-bit with cols % blocksize == 0:   w_k = table value of the code, s_g = absmax of the block
 *   every other float-valued weight:    w_k = dequantized float32 value, s_g = 1
 *   int8 (LLM.int8(), threshold 6 by default): with the int8 row q of x, its scale sx and outlier
 *     columns O from qllm_int8_activation, d = sum_k q_k * data_k exactly in int32,
 *     s = absmax_r * (1/127), y = (float)d * (sx * s), then y = fma(x_k, data_k * s, y) over
 *     ascending k in O; then + bias.
 *
 * Tiers int16 and int8, for 4-bit weights with cols % blocksize == 0.  k is cut into blocks b of
 * qllm_activation_block; with q, sx of qllm_block_activation and the integer codes c and their unit
 * of qllm_integer_codes (core/activation.h), d_b = sum_k c_k * q_k exactly in int32;
 * y = fma(absmax_b * sx_b, (float)d_b, y) from +0 over ascending b; then y * unit, then + bias.
 *
 * Tier bf16, for bf16 weights.  x rounded to bf16 (qllm_bf16_activation); k is cut into groups of
 * QLLM_GROUP, a missing column behind the last counts as w = x = 0.  Inside group g one chain
 * p_g = qllm_bf16_dot(p_g; w_k, w_k+1; x_k, x_k+1) from +0 over ascending even k; y = y + p_g from
 * +0 over ascending g; then + bias.
 *
 * Tier bf16x2, for bf16 weights and for 4-bit weights with cols % blocksize == 0.  x rounded to
 * bf16; k is cut into groups of QLLM_GROUP, a missing column behind the last counts as w = x = 0.
 * The 16 pairs of a group are (k, k + qllm_pair_distance) in ascending order of k, and
 * qllm_bf16_pairs adds them to a sum.
 *   bf16:   y = the groups, ascending, added to +0; then + bias.
 *   4-bit:  with blocks b of qllm_activation_block and, for w, the codes and their unit of
 *           qllm_bf16_codes: s_b = the groups of the block, ascending, added to +0;
 *           y = fma(absmax_b, s_b, y) from +0 over ascending b; then y * unit, then + bias.
 *
 * The result of a row depends on that row alone, so it is the same in any batch. */
#ifndef QLLM_CORE_LINEAR_REF_H
#define QLLM_CORE_LINEAR_REF_H

#include <stdint.h>

#include "core/compute.h"
#include "core/qweight.h"

enum { QLLM_GROUP = 32 };

/* Columns from one to the other of a pair in tier bf16x2: for 4-bit weights so many that a shift of
 * a 32-bit word of codes brings pairs together. */
static inline int64_t qllm_pair_distance(bool codes)
{
    return codes ? 4 : 1;
}

/* The first column of pair i of a group. */
static inline int64_t qllm_pair_column(int64_t i, int64_t distance)
{
    return i / distance * 2 * distance + i % distance;
}

/* Outlier columns of LLM.int8(): |x| >= threshold; bitsandbytes' and transformers' default is 6. */
#define QLLM_INT8_THRESHOLD 6.0f

/* x (m, cols), bias (rows) or NULL, y (m, rows); all float32, row-major, contiguous. int8 needs
 * cols <= QLLM_INT8_MAX_COLS so that the int32 sum cannot overflow.  `threshold` is used by int8
 * only; <= 0 switches the outliers off.  Fails only for lack of memory, or when an int8 weight is
 * too wide. */
qllm_status qllm_linear_ref(const qllm_qweight *weight, const float *bias, const float *x,
                            int64_t m, float threshold, float *y, qllm_error *error);

enum { QLLM_INT8_MAX_COLS = 133143 }; /* floor((2^31 - 1) / 127^2) */

/* Whether a tier is defined for the weight. */
bool qllm_tier_fits(qllm_tier tier, const qllm_qweight *weight);

/* The same in a tier other than exact; one that is not defined for the weight is refused. */
qllm_status qllm_linear_tier_ref(const qllm_qweight *weight, qllm_tier tier, const float *bias,
                                 const float *x, int64_t m, float *y, qllm_error *error);

/* bitsandbytes' per-batch form of LLM.int8(): a column that holds an outlier in any row is zeroed
 * in the int8 part of every row and added in float32 for every row, so that a row's result depends
 * on the others.  Offered to reproduce figures made with that library. */
qllm_status qllm_linear_int8_batch(const qllm_qweight *weight, const float *bias, const float *x,
                                   int64_t m, float threshold, float *y, qllm_error *error);

#endif
