/* A decoder on a GPU: what its files share.
 *
 *   backend.cu        the table of core/backend.h, and a decoder's life
 *   slots_device.cu   weights by slot
 *   pages.h, pages.cu keys and values: sequences that fork
 *   step.cu, step_buffers.cu
 *                     a step: its rows, cut into chunks, onto the device and its logits back
 *   forward_exact.cu, forward_auto.cu   the layers of compute="exact" and "auto", launches alone
 *
 * A decoder works on one stream, and its lock is held by whatever touches weights, buffers or
 * sequences, so that the order of the stream is the order of all that happens. */
#ifndef QLLM_KERNELS_DECODER_H
#define QLLM_KERNELS_DECODER_H

#include <pthread.h>

#include "pages.h"
#include "runtime.h"
#include "sampler.h"
#include "weight.h"

extern "C" {
#include "core/backend.h"
#include "decoder/checks.h"
#include "decoder/config.h"
#include "decoder/positions.h"
#include "decoder/slots.h"
}

enum { GPU_STEP_ROWS = 512 }; /* rows of a chunk; 256, the CPU's, with int8_batch */

/* The rows of one chunk.  Arrays are device memory that stays where it is until
 * qllm_decoder.generation changes; they are filled up to `padded` rows, the next power of two, with
 * rows that mean nothing: token 0, position 0, no pages, not wanted. */
typedef struct gpu_rows {
    int n, padded;
    int wanted;                /* rows of logits; `padded` when every row is wanted */
    int sequences;             /* runs of rows of one sequence; 0 for rows without */
    int positions_end;         /* the largest position of the chunk + 1 */
    int max_pages;             /* a power of two */
    const int32_t *tokens;     /* (padded); not set for rows that come as hidden states */
    const int32_t *positions;  /* (padded) */
    const int32_t *logits_row; /* (padded): the row of scratch.logits, or -1 */
    const int32_t *row_of;     /* (padded): the row that logits row i belongs to, or -1 */
    const int32_t *page_index; /* (padded, max_pages): page number of positions [64 p, 64 p + 64) of
                                  the row's sequence, -1 behind its last page */
    void *const *page_base;    /* page number -> its memory (pages.h) */
} gpu_rows;

/* Buffers of a chunk, one after the other in one piece of memory; they grow, as powers of two, and
 * are kept.  Rows have no gaps between them. */
typedef struct gpu_scratch {
    int64_t rows;            /* that the row buffers hold */
    int64_t row_bytes;       /* of all of them */
    void *row_memory;
    float *x;                /* (rows, hidden) the residual stream */
    float *normed, *normed2; /* (rows, hidden) */
    float *branch, *branch2; /* (rows, hidden) results of attention and mlp */
    float *qkv;              /* (rows, (heads + 2 kv_heads) * head_dim) */
    float *attended;         /* (rows, heads * head_dim) */
    float *gate, *up;        /* (rows, intermediate) */
    int64_t logits_rows;
    float *logits;           /* (logits_rows, vocab) */
    int64_t extra_bytes;
    void *extra;             /* of the layers: gpu_exact_scratch or gpu_auto_scratch */
} gpu_scratch;

/* Tables over positions, as decoder/positions.h computes them, on the device. */
typedef struct gpu_positions {
    int64_t capacity;
    float *cos, *sin; /* (capacity, rotary_dim / 2) */
    float *bias;      /* (heads, capacity) of ALiBi */
} gpu_positions;

typedef struct gpu_step gpu_step;     /* step.h */
typedef struct gpu_graphs gpu_graphs; /* forward_auto.cu */

struct qllm_decoder {
    qllm_decoder_config config; /* owns its arrays */
    bool exact;
    float int8_threshold;
    bool int8_batch;
    gpu_device device;
    char variant[16];     /* of the kernels: "sm_90" */
    gpu_stream stream;
    pthread_mutex_t lock;
    int64_t generation;   /* changes whenever memory that a launch was given may have moved */

    int64_t slots;        /* by index of decoder/slots.h: */
    gpu_weight *linears;  /* (slots); data NULL: not set */
    float **vectors;      /* (slots) device memory, or NULL */
    gpu_weight own_embedding;
    const gpu_weight *embedding; /* NULL: not set; &own_embedding, or &linears[the head] */

    qllm_rope rope;       /* host */
    qllm_alibi alibi;
    gpu_positions positions;
    gpu_pages pages;
    gpu_scratch scratch;
    gpu_sampler sampler;  /* its device is &device */
    gpu_step *step;
    gpu_graphs *graphs;   /* NULL until forward_auto makes some */
};

/* The vector of a slot such as qllm_slot_of_part gives it, or NULL (index -1, or an optional vector
 * that is not set: zeros). */
static inline const float *gpu_vector(const qllm_decoder *decoder, int64_t slot)
{
    return slot < 0 ? NULL : decoder->vectors[slot];
}

/* The layers.  Each launches on decoder->stream and does not wait nor allocate; QLLM_INTERNAL when
 * a launch fails.  embed: scratch.x from tokens.  layers: scratch.x through all layers, keys and
 * values into the pages.  head: final norm and output embedding of the `wanted` rows of row_of,
 * into scratch.logits.  Rows >= n may be computed, nothing of them is stored in pages or read. */
qllm_status gpu_exact_embed(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error);
qllm_status gpu_exact_layers(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error);
qllm_status gpu_exact_head(qllm_decoder *decoder, const gpu_rows *rows, int wanted,
                           qllm_error *error);
qllm_status gpu_auto_embed(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error);
qllm_status gpu_auto_layers(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error);
qllm_status gpu_auto_head(qllm_decoder *decoder, const gpu_rows *rows, int wanted,
                          qllm_error *error);

/* Bytes of scratch.extra that a chunk of `rows` rows needs whose sequences reach `positions`; -1
 * where that is more than can be addressed. */
int64_t gpu_exact_scratch(const qllm_decoder *decoder, int64_t rows, int64_t positions);
int64_t gpu_auto_scratch(const qllm_decoder *decoder, int64_t rows, int64_t positions);

/* Frees decoder->graphs; NULL is allowed. */
void gpu_auto_graphs_destroy(gpu_graphs *graphs);

/* What the exact linear kernel of a format is called: "nf4 cuda, exact". Static. */
const char *gpu_exact_linear_name(qllm_format format);

/* slots_device.cu: as in core/backend.h; the caller holds the lock. */
qllm_status gpu_slots_init(qllm_decoder *decoder, qllm_error *error);
void gpu_slots_clear(qllm_decoder *decoder);
bool gpu_slot_is_set(const qllm_decoder *decoder, int64_t index);
qllm_status gpu_slot_put_linear(qllm_decoder *decoder, const qllm_weight_source *source,
                                qllm_error *error);
qllm_status gpu_slot_put_vector(qllm_decoder *decoder, const char *slot, const float *values,
                                int64_t n, qllm_error *error);
qllm_status gpu_slot_put_embedding(qllm_decoder *decoder, const qllm_weight_source *source,
                                   qllm_error *error);
qllm_status gpu_slot_put_random(qllm_decoder *decoder, const char *name, qllm_format format,
                                int64_t blocksize, uint64_t seed, qllm_error *error);
qllm_status gpu_slot_tie(qllm_decoder *decoder, qllm_error *error);
qllm_status gpu_slot_get(qllm_decoder *decoder, const char *slot, qllm_qweight *out,
                         qllm_error *error);
void gpu_slots_bytes(const qllm_decoder *decoder, int64_t *weights, int64_t *embedding);
int gpu_slots_kernels(const qllm_decoder *decoder, qllm_format format, const char **names,
                      int capacity);
/* The slots in [begin, end) are set, as far as they are needed. */
qllm_status gpu_slots_check(const qllm_decoder *decoder, int64_t begin, int64_t end,
                            qllm_error *error);

/* step.cu: as in core/backend.h; the caller holds the lock. */
qllm_status gpu_step_init(qllm_decoder *decoder, qllm_error *error);
void gpu_step_clear(qllm_decoder *decoder);
qllm_status gpu_step_run(qllm_decoder *decoder, qllm_sequence *const *sequences,
                         const int64_t *tokens, const bool *want, int64_t n, float *logits,
                         qllm_error *error);
qllm_status gpu_step_draw(qllm_decoder *decoder, qllm_sequence *const *sequences,
                          const int64_t *tokens, const bool *want, int64_t n,
                          const qllm_draw *draws, int64_t n_draws, qllm_sampled *out,
                          float *logits, qllm_error *error);
qllm_status gpu_step_embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                           qllm_error *error);
qllm_status gpu_step_blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                            float *hidden, qllm_error *error);
qllm_status gpu_step_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                          qllm_error *error);

/* limits.cu: as in core/backend.h. */
qllm_status gpu_limits(int index, int64_t bytes, qllm_device_limits *out, qllm_error *error);

/* sampler.cu.  Draws from rows of logits on the device, (rows, vocab): rows [first, first + rows)
 * of those that the draws name.  Waits for the results, which have the bits of qllm_sample.  Errors
 * are those of qllm_sample, with "row i: " in front for draws[i - number]. */
qllm_status gpu_draw(qllm_decoder *decoder, const float *logits, int64_t first, int64_t rows,
                     const qllm_draw *draws, int64_t n_draws, int64_t number, qllm_sampled *out,
                     qllm_error *error);

/* logit_stats.cu: as in core/backend.h; "row i: " in front of errors. */
qllm_status gpu_logit_stats(qllm_decoder *decoder, const float *ref, const float *test,
                            int64_t rows, const double *temperatures, int64_t n_temperatures,
                            const int64_t *targets, const qllm_logit_stats *out,
                            uint8_t *same_top, qllm_error *error);

#endif
