/* Compute modes, and to what each rounds the activations of a linear layer.
 *
 *   exact  float32 activations; int8 weights as LLM.int8() defines
 *   auto   the fastest tier whose rounding of activations is no coarser than bf16's
 *   int8   as auto, but 4-bit weights take int8 activations: coarser, only when asked for
 *
 * What a weight computes with under a mode is its tier.  The order of summation is a function of
 * (format, tier, K) alone: core/linear_ref.h. */
#ifndef QLLM_CORE_COMPUTE_H
#define QLLM_CORE_COMPUTE_H

#include "core/status.h"

typedef enum qllm_compute {
    QLLM_COMPUTE_EXACT,
    QLLM_COMPUTE_AUTO,
    QLLM_COMPUTE_INT8,
    QLLM_COMPUTE_COUNT
} qllm_compute;

typedef enum qllm_tier {
    QLLM_TIER_EXACT,  /* float32 x; int8 weights: LLM.int8() */
    QLLM_TIER_INT16,  /* 4-bit weights: x as int16 per block of 64 */
    QLLM_TIER_INT8,   /* 4-bit weights: x as int8 per block of 64 */
    QLLM_TIER_BF16,   /* bf16 weights: x as bf16 */
    QLLM_TIER_BF16X2, /* bf16 and 4-bit weights: x as bf16, sums in two chains */
    QLLM_TIER_COUNT
} qllm_tier;

const char *qllm_compute_name(qllm_compute compute); /* "exact", "auto", "int8" */

/* The mode of that name; an unknown one is refused with the list. */
qllm_status qllm_compute_find(const char *name, qllm_compute *out, qllm_error *error);

const char *qllm_tier_name(qllm_tier tier); /* "exact", "int16", "int8", "bf16", "bf16x2" */
qllm_status qllm_tier_find(const char *name, qllm_tier *out, qllm_error *error);

#endif
