/* What a decoder is, for all families and devices: sizes, the kind of block, norm, activation and
 * position.  qllm/architectures.py derives it from a config.json. */
#ifndef QLLM_DECODER_CONFIG_H
#define QLLM_DECODER_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

typedef enum qllm_norm_kind { QLLM_NORM_RMS, QLLM_NORM_LAYER } qllm_norm_kind;
typedef enum qllm_position_kind { QLLM_POSITION_ROPE, QLLM_POSITION_ALIBI } qllm_position_kind;
typedef enum qllm_activation { QLLM_ACT_SILU, QLLM_ACT_GELU, QLLM_ACT_GELU_TANH } qllm_activation;

/* serial:    x += attention(norm_1(x)); x += mlp(norm_2(x))    Llama, Mistral, Qwen, Falcon-RW
 * parallel:  n = norm_1(x); x += attention(n) + mlp(n)         Falcon 7B, 11B
 * parallel2: x += attention(norm_1(x)) + mlp(norm_2(x))        Falcon 40B, 180B */
typedef enum qllm_block_kind {
    QLLM_BLOCK_SERIAL,
    QLLM_BLOCK_PARALLEL,
    QLLM_BLOCK_PARALLEL2
} qllm_block_kind;

typedef struct qllm_decoder_config {
    int64_t vocab, hidden, layers, heads, kv_heads, head_dim, intermediate, max_positions;
    qllm_block_kind block;
    qllm_norm_kind norm;
    float norm_eps;
    qllm_activation activation;
    bool gated;      /* mlp = down(act(gate) * up); else down(act(up)) */
    bool fused_qkv;  /* one matrix; per key-value head: its query heads, then key, then value */
    bool qk_norm;    /* RMS norm over head_dim on each query and key head before RoPE (Qwen3) */
    float attention_scale; /* of q . k; usually 1 / sqrt(head_dim) */
    qllm_position_kind position;
    int64_t rotary_dim;    /* even, <= head_dim: leading part of a head that is rotated */
    const float *rope_inv_freq; /* (rotary_dim / 2): angle of pair i at t is t * inv_freq[i] */
    float rope_scale;      /* factor on cos and sin (yarn); 1 otherwise */
    /* dynamic NTK: position t uses base' = base * ((factor * L / original) - (factor - 1)) ^
     * (rotary_dim / (rotary_dim - 2)) with L = max(t + 1, original): what a decode loop of
     * transformers computes, and a function of t alone.  factor 0: off. */
    double rope_dynamic_factor, rope_base;
    int64_t rope_original_positions;
    const float *alibi_slopes;     /* (heads), for QLLM_POSITION_ALIBI */
    const int64_t *sliding_window; /* (layers): positions seen, the own included; 0 = all */
} qllm_decoder_config;

/* Refuses sizes below 1, above sane bounds, or that do not fit together, naming the field. */
qllm_status qllm_decoder_config_check(const qllm_decoder_config *config, qllm_error *error);

/* A copy that owns its arrays; those that do not apply are NULL in it.  On failure it is empty. */
qllm_status qllm_decoder_config_copy(const qllm_decoder_config *config, qllm_decoder_config *out,
                                     qllm_error *error);

/* Frees the arrays of a copy and empties it. */
void qllm_decoder_config_clear(qllm_decoder_config *copy);

#endif
