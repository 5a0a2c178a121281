/* One step of a batch on the CPU, composed of the small functions of cpu_ops.
 *
 * A step first checks everything and makes room for everything (buffers, position tables, keys and
 * values); from then on nothing can fail, and the lengths of the sequences change at the very end.
 * Rows are worked on in chunks of QLLM_STEP_ROWS, so that buffers do not grow with the batch.
 *
 * Every row goes through the same sums whatever stands beside it (cpu/cpu_ops.h,
 * core/linear_ref.h), so its logits are bit-identical in any batch, chunking, split over threads
 * and fork.  The one exception is the "batch" form of int8 outliers, which by its definition looks
 * at all rows that a linear layer works on together: there, a chunk. */
#ifndef QLLM_DECODER_STEP_H
#define QLLM_DECODER_STEP_H

#include <pthread.h>

#include "cpu/linear.h"
#include "decoder/kv_cache.h"
#include "decoder/positions.h"
#include "decoder/weights.h"

enum { QLLM_STEP_ROWS = 256 };

/* One row of a chunk. */
typedef struct qllm_step_row {
    const qllm_sequence *sequence;
    int64_t token, position;
    int64_t path, path_length; /* its sequence's blocks in qllm_scratch.paths: first, number */
    const qllm_kv_block *block; /* holds `position` */
    int64_t wanted;            /* its row of logits, or -1 */
} qllm_step_row;

/* Buffers of a step; they grow and are kept.  Float rows have strides that are multiples of 16. */
typedef struct qllm_scratch {
    int64_t rows;            /* that the row buffers hold */
    int64_t hidden_stride, qkv_stride, heads_stride, mlp_stride;
    qllm_step_row *row;      /* (rows) */
    float *x;                /* (rows, hidden) the residual stream */
    float *normed, *normed2; /* (rows, hidden) */
    float *branch, *branch2; /* (rows, hidden) results of attention and mlp */
    float *qkv;              /* (rows, (heads + 2 kv_heads) * head_dim) */
    float *attended;         /* (rows, heads * head_dim) */
    float *gate, *up;        /* (rows, intermediate) */
    void *linear;            /* of qllm_cpu_linear */
    int64_t paths_capacity, spans_capacity, scores_capacity;
    const qllm_kv_block **paths; /* (paths_capacity) */
    qllm_kv_span *spans;         /* (threads, spans_capacity) */
    float *scores;               /* (threads, scores_capacity) */
    qllm_attention *tasks;       /* (threads) */
    int64_t row_bytes, attention_bytes; /* held by the two groups above */
} qllm_scratch;

/* The decoder of the CPU device. */
struct qllm_decoder {
    qllm_decoder_config config; /* owns its arrays */
    const qllm_cpu_ops *ops;
    qllm_isa isa;
    qllm_threads *threads;
    qllm_packer packer; /* of weights, on the same threads */
    qllm_linear_options linear_options;
    pthread_mutex_t lock; /* held by a step, and while weights or sequences change */
    qllm_weights weights;
    qllm_rope rope;
    qllm_alibi alibi;
    qllm_kv_cache cache;
    qllm_scratch scratch;
};

/* As in core/backend.h; the caller holds the lock. */
qllm_status qllm_cpu_step(qllm_decoder *decoder, qllm_sequence *const *sequences,
                          const int64_t *tokens, const bool *want, int64_t n, float *logits,
                          qllm_error *error);

/* The parts of a step, as in core/backend.h; the caller holds the lock. */
qllm_status qllm_cpu_embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                           qllm_error *error);
qllm_status qllm_cpu_blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                            float *hidden, qllm_error *error);
qllm_status qllm_cpu_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                          qllm_error *error);

/* Makes the buffers hold `rows` rows, paths of `paths` blocks in all and of `spans` blocks each,
 * and `positions` positions; on failure they hold what they held. */
qllm_status qllm_scratch_grow(qllm_decoder *decoder, int64_t rows, int64_t paths, int64_t spans,
                              int64_t positions, qllm_error *error);
void qllm_scratch_clear(qllm_scratch *scratch);

/* Runs the first n rows of scratch.row through all layers and writes the logits of wanted rows. */
void qllm_forward(qllm_decoder *decoder, int64_t n, float *logits);

/* The layers alone, of the first n rows: hidden (n, hidden) goes in and comes out. */
void qllm_forward_blocks(qllm_decoder *decoder, int64_t n, float *hidden);

/* Final norm and output embedding of hidden (n, hidden): logits (n, vocab). */
void qllm_forward_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits);

#endif
