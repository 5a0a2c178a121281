/* What a position contributes: cos and sin of RoPE, or the bias of ALiBi.  Tables over positions
 * that grow on demand; entries are a function of the config and the position alone. */
#ifndef QLLM_DECODER_POSITIONS_H
#define QLLM_DECODER_POSITIONS_H

#include "decoder/config.h"

/* RoPE (Su et al., arXiv 2104.09864).  Pair i at position t has the angle (float)t * inv_freq[i],
 * rounded to float32 as transformers does; cos and sin are rounded to float32, then multiplied by
 * rope_scale.  With rope_dynamic_factor, positions from rope_original_positions on have their own
 * inv_freq (see config.h), in float32 steps as transformers computes it from a tensor length. */
typedef struct qllm_rope {
    int64_t capacity; /* positions computed */
    float *cos, *sin; /* (capacity, rotary_dim / 2) */
} qllm_rope;

/* ALiBi (Press et al., arXiv 2108.12409) as transformers' Falcon rounds it: bias of head h at key
 * position j is bf16(bf16(slope_h) * bf16(j)) / sqrt(head_dim), the division in float32.  The bias
 * does not depend on the query: a constant per row does not change a softmax. */
typedef struct qllm_alibi {
    int64_t capacity; /* positions computed */
    float *bias;      /* (heads, capacity) */
} qllm_alibi;

/* Makes entries for positions [0, positions), 1 <= positions <= max_positions; on failure the table
 * is as before. */
qllm_status qllm_rope_grow(qllm_rope *rope, const qllm_decoder_config *config, int64_t positions,
                           qllm_error *error);
qllm_status qllm_alibi_grow(qllm_alibi *alibi, const qllm_decoder_config *config, int64_t positions,
                            qllm_error *error);

void qllm_rope_clear(qllm_rope *rope);
void qllm_alibi_clear(qllm_alibi *alibi);

#endif
