/* What compute="auto" does to rows between its linear layers and attention where that is not fused
 * into one of them. */
#ifndef QLLM_KERNELS_SMALL_H
#define QLLM_KERNELS_SMALL_H

#include "skinny.h"

/* Row i of x is row tokens[i] of a tiled bf16 embedding, without gaps. */
qllm_status gpu_embed_tiled(const gpu_weight *embedding, const int32_t *tokens, int rows, float *x,
                            gpu_stream stream, qllm_error *error);

/* Heads as linear layers have stored them: in a row of qkv first all query heads, then all keys,
 * then all values, or, fused, for each key-value head its query heads, its key, its value. */
typedef struct gpu_place {
    float *qkv;
    int64_t stride;               /* row i at qkv + i * stride */
    bool fused;
    const float *q_norm, *k_norm; /* (head_dim) weights of an RMS norm over each head, or NULL */
    float eps;
    gpu_heads heads;              /* its q is not used */
} gpu_place;

/* Queries and keys get their norm, then their rotation, queries in place; keys and values go to the
 * pages as bf16, unless the entry of page_index is negative. */
qllm_status gpu_place_heads(const gpu_place *place, int rows, gpu_stream stream,
                            qllm_error *error);

#endif
