/* Attention of compute="auto": float32 queries over bf16 keys and values in pages (pages.h), on the
 * tensor cores.
 *
 * The sums, for one row and one query head, over the positions j that the row sees:
 *   q' = q * scale, and score_j = q' . k_j (+ bias_j), in float32 as the tensor cores add; q' and the
 *     weights below enter them as two bf16 values each, which together hold 16 to 17 bits
 *   strip   32 positions from a multiple of 32 on: m = largest score, e_j = exp(score_j - m),
 *           l = sum of e_j, o = sum of e_j v_j
 *   split   256 positions from a multiple of 256 on: its strips, one after the other, each merged
 *           into what is there: with m' = max(m, m_s), l' = l exp(m - m') + l_s exp(m_s - m'), and
 *           o' likewise
 *   the splits are merged the same way, and the result is o / l.
 * Strips and splits of which a row sees nothing change nothing.  So a row's result depends on that
 * row and its keys alone: not on the other rows, nor on who shares its pages, nor on the form. */
#ifndef QLLM_KERNELS_ATTENTION_H
#define QLLM_KERNELS_ATTENTION_H

#include "pages.h"
#include "runtime.h"

enum {
    GPU_STRIP = 32,
    GPU_SPLIT = 256,
    GPU_SPLIT_STRIPS = GPU_SPLIT / GPU_STRIP,
    GPU_SPLIT_PAGES = GPU_SPLIT / GPU_PAGE
};

/* How the work is cut; SPLITS and ROWS give the same bits. */
typedef enum gpu_attention_form {
    GPU_ATTENTION_SPLITS, /* a block for each split: few rows of many sequences each */
    GPU_ATTENTION_ROWS,   /* a warp for all splits: many rows of few sequences */
    GPU_ATTENTION_PLAIN   /* heads that the tensor cores cannot take; 128 positions in turn */
} gpu_attention_form;

/* Device pointers.  Rows whose first page is negative see nothing; their output is not written. */
typedef struct gpu_attention {
    int rows;
    int heads, kv_heads, head_dim;
    float scale;
    int window;                /* positions seen, the own included; 0: all */
    const float *q;            /* query head i of key-value head g of row r, (head_dim) values at */
    int64_t q_stride, q_group; /* q + r * q_stride + g * q_group + i * head_dim */
    float *out;                /* (rows, heads * head_dim), row r at out + r * out_stride */
    int64_t out_stride;
    const int32_t *positions;  /* (rows) */
    const int32_t *page_index; /* (rows, max_pages) */
    void *const *page_base;
    int max_pages;
    int64_t page_offset;       /* as in gpu_heads (skinny.h) */
    const float *bias;         /* of ALiBi: bias[head * bias_stride + j], or NULL */
    int64_t bias_stride;
    void *scratch;             /* gpu_attention_scratch bytes, prepared by gpu_attention_begin */
} gpu_attention;

/* The form for a number of rows that stand for `sequences` runs of rows of one sequence. */
gpu_attention_form gpu_attention_choose(const gpu_attention *attention, int sequences);

/* What the forms of heads of that width are called, in words. Static. */
const char *gpu_attention_name(int64_t head_dim);

/* Bytes of scratch, the same for all forms. */
int64_t gpu_attention_scratch(const gpu_attention *attention);

/* Once for all layers of a step: prepares the scratch, and gives rows without pages outputs of zero
 * and rows of zeros in x (rows, hidden), so that nothing that was left there is taken for a number. */
qllm_status gpu_attention_begin(const gpu_attention *attention, float *x, int64_t hidden,
                                gpu_stream stream, qllm_error *error);

/* Launches; does not wait.  q must not overlap out. */
qllm_status gpu_attend(const gpu_device *device, const gpu_attention *attention,
                       gpu_attention_form form, gpu_stream stream, qllm_error *error);

#endif
