/* Which weights a config needs: their names, shapes and order.  A function of the config alone, the
 * same for every device.
 *
 * Order: "embedding", the parts of layer 0, of layer 1, ..., "final_norm.weight",
 * "final_norm.bias" (layer norm only), "head". */
#ifndef QLLM_DECODER_SLOTS_H
#define QLLM_DECODER_SLOTS_H

#include "core/backend.h"
#include "decoder/config.h"

/* The parts of a layer, in the order of their slots; "layers.i." stands before the names. */
typedef enum qllm_part {
    QLLM_PART_ATTENTION_NORM,      /* "attention_norm.weight" (hidden) */
    QLLM_PART_ATTENTION_NORM_BIAS, /* "attention_norm.bias" (hidden), layer norm only */
    QLLM_PART_MLP_NORM,            /* "mlp_norm.weight" (hidden), not for QLLM_BLOCK_PARALLEL */
    QLLM_PART_MLP_NORM_BIAS,
    QLLM_PART_Q,                   /* (heads * head_dim, hidden) */
    QLLM_PART_K,                   /* (kv_heads * head_dim, hidden) */
    QLLM_PART_V,
    QLLM_PART_QKV,                 /* ((heads + 2 kv_heads) * head_dim, hidden), for fused_qkv */
    QLLM_PART_Q_NORM,              /* "q_norm.weight" (head_dim), for qk_norm */
    QLLM_PART_K_NORM,
    QLLM_PART_O,                   /* (hidden, heads * head_dim) */
    QLLM_PART_GATE,                /* (intermediate, hidden), for gated */
    QLLM_PART_UP,                  /* (intermediate, hidden) */
    QLLM_PART_DOWN,                /* (hidden, intermediate) */
    QLLM_PART_COUNT
} qllm_part;

int64_t qllm_slot_count(const qllm_decoder_config *config);

/* Index of a slot, or -1 when the config has no such part. */
int64_t qllm_slot_of_embedding(const qllm_decoder_config *config);
int64_t qllm_slot_of_part(const qllm_decoder_config *config, int64_t layer, qllm_part part);
int64_t qllm_slot_of_final_norm(const qllm_decoder_config *config);
int64_t qllm_slot_of_final_norm_bias(const qllm_decoder_config *config);
int64_t qllm_slot_of_head(const qllm_decoder_config *config);

/* Name, kind, shape and whether it is optional; `set` is false. */
void qllm_slot_describe(const qllm_decoder_config *config, int64_t index, qllm_slot *out);

/* The index of the slot of that name, or -1. */
int64_t qllm_slot_find(const qllm_decoder_config *config, const char *name);

#endif
