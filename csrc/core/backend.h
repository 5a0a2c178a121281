/* The coarse seam: what a device offers, as one table of functions.  The CPU fills it with decoder/
 * and cpu/ (decoder/cpu_backend.c); a plugin fills it with its own kernels.  Whoever assembles the
 * program registers the entries, so that nothing in core knows a device.
 *
 * A decoder is used by one step at a time: the device serialises set_*, step, fork and truncate by
 * itself, so every function may be called from any thread.  No function prints, exits or aborts. */
#ifndef QLLM_CORE_BACKEND_H
#define QLLM_CORE_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "core/compute.h"
#include "core/logit_stats.h"
#include "core/quant.h"
#include "core/qweight.h"
#include "core/sampler.h"

enum { QLLM_BACKEND_ABI = 6, QLLM_BACKEND_CAPACITY = 8, QLLM_SLOT_NAME_CAPACITY = 64 };

struct qllm_decoder_config; /* decoder/config.h: the same for every device */

typedef struct qllm_decoder qllm_decoder;   /* each device defines its own */
typedef struct qllm_sequence qllm_sequence; /* keys and values of one sequence, on the device */

typedef struct qllm_decoder_options {
    int index;            /* of the devices of this kind, from 0 on; a CPU: 0 */
    const char *variant;  /* of the kernels (a CPU: instruction set); NULL: the device's choice */
    int threads;          /* host threads; 0: the device's choice */
    qllm_compute compute;
    float int8_threshold; /* outliers of LLM.int8(): |x| >= threshold; <= 0 switches them off */
    bool int8_batch;      /* bitsandbytes' per-batch form: a row then depends on the others */
} qllm_decoder_options;

typedef enum qllm_slot_kind {
    QLLM_SLOT_LINEAR,    /* (rows, cols), any format, with an optional bias (rows) */
    QLLM_SLOT_VECTOR,    /* float32 (rows) */
    QLLM_SLOT_EMBEDDING  /* (rows, cols), a float format */
} qllm_slot_kind;

typedef struct qllm_slot {
    char name[QLLM_SLOT_NAME_CAPACITY];
    qllm_slot_kind kind;
    int64_t rows, cols; /* cols is 1 for a vector */
    bool optional;      /* zero when it is not set */
    bool set;
} qllm_slot;

/* Bytes held now. */
typedef struct qllm_decoder_bytes {
    int64_t weights;   /* linear layers with their biases, and vectors */
    int64_t embedding; /* 0 when it is the head's weight */
    int64_t kv_cache;  /* keys and values of all sequences, shared parts counted once */
    int64_t scratch;   /* everything else that lasts: buffers of a step, position tables */
} qllm_decoder_bytes;

/* A token to be drawn from one row of logits of a step, as by qllm_sample. */
typedef struct qllm_draw {
    int64_t row;            /* of the wanted rows of the step */
    qllm_sampling sampling;
    uint32_t step;
    const int64_t *history; /* (n_history) token ids for the repetition penalty */
    int64_t n_history;
    bool round_bf16;        /* the logits are rounded to bf16 first, to nearest, ties to even */
} qllm_draw;

typedef struct qllm_decoder_info {
    const char *variant; /* texts live as long as the decoder */
    const char *model;   /* of the processor */
    const char *compute; /* "exact", "auto" or "int8" */
    const char *attention; /* in which type keys and values are held, and what reads them */
    int threads;
    float int8_threshold;
    bool int8_batch;
} qllm_decoder_info;

/* A device itself, whether a decoder uses it or not. */
typedef struct qllm_device_facts {
    char name[96];
    char variant[16]; /* of the kernels: "sm_90" */
    char driver[48];  /* and its version */
    int64_t memory_bytes, free_bytes;
} qllm_device_facts;

/* What it can do at best, as measured. */
typedef struct qllm_device_limits {
    double read_bytes_per_second;  /* of its memory, by a kernel that only reads */
    double copy_bytes_per_second;  /* reads and writes added */
    double edge_seconds;           /* from one kernel of a graph to the next, when they do nothing;
                                      0 without graphs */
    double dependent_edge_seconds; /* the same when each may start before the one before it ends */
} qllm_device_limits;

/* A linear layer alone, for tensors that another library holds on the device; each device defines
 * its own.  It is never changed, so any number of threads may call it. */
typedef struct qllm_device_linear qllm_device_linear;

/* y = x W^T + bias; addresses of the device's memory. */
typedef struct qllm_linear_call {
    const void *x; /* (m, cols) of dtype, without gaps */
    qllm_dtype dtype;
    int64_t m;
    const void *bias; /* (rows) of bias_dtype, or NULL */
    qllm_dtype bias_dtype;
    void *y;       /* (m, rows) of dtype, without gaps; rounded once, to nearest, ties to even */
    void *scratch; /* linear_scratch bytes, aligned to 16, the call's own until its work is done */
    void *stream;  /* the device's handle of a stream (CUDA: cudaStream_t), NULL: its default one */
} qllm_linear_call;

typedef struct qllm_backend {
    int abi;          /* QLLM_BACKEND_ABI of the headers it was built with */
    const char *name; /* "cpu" */

    /* The device of that index; NULL: the device is the processor. */
    qllm_status (*device)(int index, qllm_device_facts *out, qllm_error *error);
    /* Measures it with twice `bytes` of its memory; NULL: not offered. */
    qllm_status (*limits)(int index, int64_t bytes, qllm_device_limits *out, qllm_error *error);

    /* Copies a weight to device `index`; `threshold` as int8_threshold of qllm_decoder_options, by
     * rows.  The calling thread's current device is afterwards what it was, here and below.  NULL:
     * not offered, nor are the functions behind it. */
    qllm_status (*linear_create)(int index, const qllm_qweight *weight, qllm_compute compute,
                                 float threshold, qllm_device_linear **out, qllm_error *error);
    void (*linear_destroy)(qllm_device_linear *layer); /* waits for the device; NULL is allowed */
    int64_t (*linear_nbytes)(const qllm_device_linear *layer); /* of the device's memory */
    const char *(*linear_name)(const qllm_device_linear *layer, int64_t m); /* static */
    /* Bytes of scratch of a call, of which the dtypes, m and whether there is a bias are read; -1:
     * more than can be counted. */
    int64_t (*linear_scratch)(const qllm_device_linear *layer, const qllm_linear_call *call);
    /* Gives the work to the stream: waits for nothing and takes no memory.  The bits of a decoder's
     * linear layer on this device in that mode, rounded to dtype; so a row of y depends on that row
     * of x alone. */
    qllm_status (*linear)(const qllm_device_linear *layer, const qllm_linear_call *call,
                          qllm_error *error);
    /* Rows [first, first + n) of W, exactly, to out (n, cols) on the device, by the stream. */
    qllm_status (*linear_dequantize)(const qllm_device_linear *layer, int64_t first, int64_t n,
                                     float *out, void *stream, qllm_error *error);

    /* The config and what it points to are copied. */
    qllm_status (*decoder_create)(const struct qllm_decoder_config *config,
                                  const qllm_decoder_options *options, qllm_decoder **out,
                                  qllm_error *error);
    void (*decoder_destroy)(qllm_decoder *decoder); /* after its sequences; NULL is allowed */

    /* Slots in a stable order. */
    int64_t (*slot_count)(const qllm_decoder *decoder);
    void (*slot)(qllm_decoder *decoder, int64_t index, qllm_slot *out);

    /* Each copies, and replaces what the slot held; on failure the slot keeps what it had. */
    qllm_status (*set_linear)(qllm_decoder *decoder, const char *slot, const qllm_qweight *weight,
                              const float *bias, int64_t bias_length, qllm_error *error);
    qllm_status (*set_vector)(qllm_decoder *decoder, const char *slot, const float *values,
                              int64_t n, qllm_error *error);
    qllm_status (*set_embedding)(qllm_decoder *decoder, const qllm_qweight *weight,
                                 qllm_error *error);
    /* The same straight from unquantized values, such as those of a mapped file: quantized to
     * `format` (the 4-bit ones with `blocksize`) as by qllm_quantize without allow_nonfinite, with
     * no second copy on the way.  `name` is the tensor's, for error sentences. */
    qllm_status (*load_linear)(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                               qllm_format format, int64_t blocksize, const char *name,
                               const float *bias, int64_t bias_length, qllm_error *error);
    qllm_status (*load_embedding)(qllm_decoder *decoder, const qllm_tensor *values,
                                  qllm_format format, const char *name, qllm_error *error);
    /* The embedding becomes the weight that the slot "head" has now, in a float format, and is held
     * once.  When the head is set anew, the embedding keeps what it was. */
    qllm_status (*tie_embedding)(qllm_decoder *decoder, qllm_error *error);

    /* The weight of core/random_weight.h, made on the device, for a linear slot or "embedding" (a
     * float format): to measure speed with.  NULL: not offered, the caller sets one. */
    qllm_status (*set_random)(qllm_decoder *decoder, const char *slot, qllm_format format,
                              int64_t blocksize, uint64_t seed, qllm_error *error);

    /* Standard bytes of a linear slot or of the embedding, as they were set; the caller clears. */
    qllm_status (*get_linear)(qllm_decoder *decoder, const char *slot, qllm_qweight *out,
                              qllm_error *error);
    /* Their error against unquantized values, as by qllm_quantization_error. */
    qllm_status (*linear_error)(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                                const char *name, qllm_quant_error *out, qllm_error *error);

    qllm_status (*sequence_create)(qllm_decoder *decoder, qllm_sequence **out, qllm_error *error);
    /* A sequence that shares what `from` has stored so far; both go on independently. */
    qllm_status (*sequence_fork)(qllm_sequence *from, qllm_sequence **out, qllm_error *error);
    qllm_status (*sequence_truncate)(qllm_sequence *sequence, int64_t length, qllm_error *error);
    int64_t (*sequence_length)(const qllm_sequence *sequence);
    void (*sequence_destroy)(qllm_sequence *sequence); /* NULL is allowed */

    /* One row per (sequences[i], tokens[i]), n >= 0; the rows of one sequence are consecutive and
     * are its next positions.  want (n), or NULL for all rows; logits (wanted rows, vocab) float32
     * in the order of the rows.  On failure no sequence has changed. */
    qllm_status (*step)(qllm_decoder *decoder, qllm_sequence *const *sequences,
                        const int64_t *tokens, const bool *want, int64_t n, float *logits,
                        qllm_error *error);

    /* The three parts of a step, for who holds the blocks of a model one after the other; each
     * needs its own slots alone.  embed: rows of the embedding, hidden (n, hidden) float32.
     * blocks: a row of hidden per row of a step, which goes through all layers of this decoder and
     * is replaced by what comes out; what is said of sequences there holds.  head: the final norm
     * and the output embedding, logits (n, vocab).  One after the other they give the bits of a
     * step. */
    qllm_status (*embed)(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                         qllm_error *error);
    qllm_status (*blocks)(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                          float *hidden, qllm_error *error);
    qllm_status (*head)(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                        qllm_error *error);

    /* A step, and then the draws from its logits, any number from each row, in ascending order of
     * the rows: out (n_draws).  The results have the bits of qllm_sample for the logits of `step`,
     * which are written to logits (wanted rows, vocab) too unless it is NULL.  On failure, that of
     * a draw too, no sequence has changed.  NULL: not offered, the caller draws on the host. */
    qllm_status (*step_draw)(qllm_decoder *decoder, qllm_sequence *const *sequences,
                             const int64_t *tokens, const bool *want, int64_t n,
                             const qllm_draw *draws, int64_t n_draws, qllm_sampled *out,
                             float *logits, qllm_error *error);

    /* qllm_logit_stats_row, with its bits, for rows (rows, vocab) in host memory, vocab the
     * decoder's: targets (rows) or NULL, the arrays of out (rows, n_temperatures), same_top (rows).
     * NULL: not offered, the caller computes on the host. */
    qllm_status (*logit_stats)(qllm_decoder *decoder, const float *ref, const float *test,
                               int64_t rows, const double *temperatures, int64_t n_temperatures,
                               const int64_t *targets, const qllm_logit_stats *out,
                               uint8_t *same_top, qllm_error *error);

    void (*nbytes)(qllm_decoder *decoder, qllm_decoder_bytes *out);
    void (*info)(const qllm_decoder *decoder, qllm_decoder_info *out);
    /* The distinct names of the kernels that linear layers of `format` run with: at most `capacity`
     * into `names`, returns how many; 0 when no slot holds the format.  Static texts. */
    int (*kernels)(qllm_decoder *decoder, qllm_format format, const char **names, int capacity);
} qllm_backend;

/* The one function that a plugin exports: its table, which lasts for the life of the process; NULL
 * with a sentence where its device cannot be used. */
#define QLLM_DEVICE_TABLE "qllm_device_table"
typedef const qllm_backend *(*qllm_device_table_function)(qllm_error *error);

/* Adds an entry, which must last for the life of the process.  Registering the same entry again is
 * allowed; another ABI number or a second entry of the same name is an error. */
qllm_status qllm_backend_register(const qllm_backend *backend, qllm_error *error);

/* The entry of that name; an unknown one is refused with the list of those that there are. */
qllm_status qllm_backend_find(const char *name, const qllm_backend **out, qllm_error *error);

/* Entry `index` in order of registration, NULL behind the last. */
const qllm_backend *qllm_backend_at(int index);

#endif
