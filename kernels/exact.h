/* Kernels of compute="exact": the bits of the CPU's exact mode.  Every sum has the order of
 * core/linear_ref.h or cpu/cpu_ops.h and every formula is core's own; what runs side by side is
 * what these leave open.  They read weights as standard bytes, and serve compute="auto" where a
 * weight does not fit its tiles.
 *
 * Pointers are device memory.  Functions launch on `stream`, wait for nothing and allocate nothing;
 * they return the code of the launch. */
#ifndef QLLM_KERNELS_EXACT_H
#define QLLM_KERNELS_EXACT_H

#include "decoder.h"
#include "weight.h"

/* ------------------------------------------------------------------ exact_linear.cu */

/* Rows x of a linear layer, and how LLM.int8() is to treat them. */
typedef struct gpu_exact_rows {
    const float *x; /* row i at x + i * stride */
    int64_t stride;
    int rows;       /* 0 is allowed */
    float threshold; /* of int8 outliers */
    bool batch;      /* the per-batch form: these rows are the batch */
    void *scratch;   /* int8 weights: gpu_exact_multiply_scratch bytes, in use until it is done */
} gpu_exact_rows;

/* y = x W^T + bias, row i at y + i * y_stride, for a weight that is not tiled: the bits of
 * qllm_linear_ref, or of qllm_linear_int8_batch. */
qllm_gpu_error gpu_exact_multiply(const gpu_weight *weight, const gpu_exact_rows *x, float *y,
                                  int64_t y_stride, gpu_stream stream);

/* Bytes for `rows` rows of an int8 weight of `cols` columns; -1 where they are too many. */
int64_t gpu_exact_multiply_scratch(int64_t rows, int64_t cols);

/* The same for a layer of a decoder, with its options; scratch at the start of scratch.extra, of
 * which gpu_exact_linear_scratch says the bytes for all weights that are not tiled (-1: too many).
 * With int8_batch `rows` are those of the chunk, without the rows that fill it up. */
qllm_status gpu_exact_linear(const qllm_decoder *decoder, const gpu_weight *weight, const float *x,
                             int64_t x_stride, int rows, float *y, int64_t y_stride,
                             qllm_error *error);
int64_t gpu_exact_linear_scratch(const qllm_decoder *decoder, int64_t rows);

/* --------------------------------------------------------------------- exact_ops.cu */

/* Row i of y is row tokens[i] of the weight (a float format, not tiled) as float32; no gaps. */
qllm_gpu_error gpu_exact_rows_of(const gpu_weight *weight, const int32_t *tokens, int rows,
                                 float *y, gpu_stream stream);

/* rms_norm and layer_norm of cpu_ops.h by rows of n values without gaps; y may be x unless row_of
 * is given: then row i of y comes from row row_of[i] of x. */
typedef struct gpu_exact_norm {
    qllm_norm_kind kind;
    const float *weight, *bias; /* (n); bias or NULL */
    int64_t n;
    float eps;
} gpu_exact_norm;
qllm_gpu_error gpu_exact_norm_rows(const gpu_exact_norm *norm, const float *x,
                                   const int32_t *row_of, int rows, float *y, gpu_stream stream);

/* y = act(gate) * up, or act(gate) where up is NULL, for n values; y may be gate or up. */
qllm_gpu_error gpu_exact_activate(qllm_activation kind, const float *gate, const float *up,
                                  int64_t n, float *y, gpu_stream stream);

/* x += a, n values */
qllm_gpu_error gpu_exact_add(const float *a, int64_t n, float *x, gpu_stream stream);

/* What attention has to know of its rows: a row of qkv holds, for key-value head g, its query heads
 * one behind the other at g * q_group, its key at k + g * kv_group, its value at v + g * kv_group.
 *
 * A page (pages.h) holds for each layer and key-value head the keys as (head_dim, GPU_PAGE), so
 * that threads at neighbouring positions read side by side, then the values as
 * (GPU_PAGE, head_dim). */
typedef struct gpu_exact_heads {
    int heads, kv_heads, head_dim;
    int64_t q_group, k, v, kv_group, stride; /* floats; of a row: stride */
    int64_t page_offset;                     /* floats in a page before the layer's */
    const int32_t *positions;                /* (rows) */
    const int32_t *page_index;               /* (rows, max_pages) */
    void *const *page_base;
    int max_pages;
    int half;                 /* rotated pairs of a head; 0: no rotation */
    const float *cos, *sin;   /* (positions, half) */
    const float *q_norm, *k_norm; /* (head_dim) weights of an RMS norm, or NULL */
    float eps;
    float scale;
    const float *bias;        /* ALiBi: bias[h * bias_stride + j] for position j, or NULL */
    int64_t bias_stride;
    int64_t window;           /* positions that a row sees, its own included; 0: all */
} gpu_exact_heads;

/* Queries and keys get their norm and rotation, queries in place; keys and values go to the pages,
 * but not where the index says -1. */
qllm_gpu_error gpu_exact_place(const gpu_exact_heads *heads, float *qkv, int rows,
                               gpu_stream stream);

/* out (rows, heads * head_dim) = attention of the rows over the positions up to their own, as
 * qllm_attention of cpu_ops.h; positions_end: the largest position + 1. */
qllm_gpu_error gpu_exact_attend(const gpu_exact_heads *heads, const float *qkv, int rows,
                                int positions_end, float *out, gpu_stream stream);

#endif
