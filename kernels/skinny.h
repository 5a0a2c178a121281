/* Linear layers of compute="auto": y = after(before(x) W^T + bias) with tiled weights (weight.h) on
 * the tensor cores, everything between two linear layers fused to one side or the other.
 *
 * The sums.  The columns are cut into tiles of 64 and the tiles, n of them, into GPU_SLICES slices:
 * slice s holds the tiles [s n / 8, (s + 1) n / 8).  Inside a slice tiles go by ascending column:
 *   4-bit  tile sums of the table's codes rounded to bf16 times x rounded to bf16 (to nearest, ties
 *          to even) in float32, as the tensor cores add; y_s = fma(absmax, tile sum, y_s)
 *   bf16   weights times x rounded to bf16, one sum in float32, as the tensor cores add
 *   int8   LLM.int8() as core/linear_ref.h has it, which is exact in every order
 * y = y_0 + y_1 + ... by ascending s, then + bias.  So a row's result depends on that row, the
 * format and the columns alone: not on other rows, nor on their number, nor on what is fused. */
#ifndef QLLM_KERNELS_SKINNY_H
#define QLLM_KERNELS_SKINNY_H

#include "weight.h"

enum {
    GPU_SLICES = 8,         /* of the columns: the warps of a block */
    GPU_LINEAR_WEIGHTS = 3  /* side by side in one launch */
};

typedef enum gpu_norm { GPU_NORM_NONE, GPU_NORM_RMS, GPU_NORM_LAYER } gpu_norm;

/* The rows x, and what happens to them first.  Device pointers. */
typedef struct gpu_linear_input {
    const float *x;
    int64_t stride;        /* row i at x + (row_of == NULL ? i : row_of[i]) * stride */
    const int32_t *row_of; /* (rows) or NULL; a negative entry stands for a row of zeros */
    int rows;              /* at least 1 */
    gpu_norm norm;         /* formulas of cpu/cpu_ops.h, sums in an order of their own */
    const float *scale;    /* (cols), of the norm */
    const float *bias;     /* (cols), of the layer norm, or NULL */
    float eps;
    float threshold;       /* int8 weights: outliers of LLM.int8(); <= 0: none */
    void *scratch;         /* gpu_linear_scratch(rows, cols) bytes, aligned to 16 */
} gpu_linear_input;

/* GPU_AFTER_HEADS: the weights are q, k, v, or one fused matrix whose rows are, per key-value head,
 * its query heads, then key, then value.  Queries and keys are rotated (pairs (i, i + half) of a
 * head's leading 2 half values); keys and values are stored as bf16 in the pages of the row's
 * sequence, unless the entry of page_index is negative.  Fits when half % 16 == 0 and
 * head_dim % 16 == 0; half 0 stores without rotation. */
typedef struct gpu_heads {
    int heads, kv_heads, head_dim, half;
    const int32_t *positions;   /* (rows) */
    const float *cos, *sin;     /* (positions, half) */
    float *q;                   /* (rows, heads * head_dim), row i at q + i * q_stride */
    int64_t q_stride;
    const int32_t *page_index;  /* (rows, max_pages) */
    void *const *page_base;
    int max_pages;
    int64_t page_offset;        /* bf16 values from a page's start to this layer's part of it:
                                   [kv_head][keys (page, head_dim) | values (page, head_dim)] */
} gpu_heads;

typedef enum gpu_after {
    GPU_AFTER_STORE, /* y[w] = v */
    GPU_AFTER_ADD,   /* y[w] += v */
    GPU_AFTER_ACT,   /* y[w] = act(v) */
    GPU_AFTER_GATE,  /* weights gate, up of the same shape: y[0] = act(gate) * up */
    GPU_AFTER_HEADS,
    GPU_AFTER_HEADS_ACT /* the last weight w as ACT, those before it as HEADS */
} gpu_after;

/* What happens to the sums v (bias added).  y must not be x. */
typedef struct gpu_linear_output {
    gpu_after after;
    float *y[GPU_LINEAR_WEIGHTS];          /* row i of weight w at y[w] + i * stride[w] */
    int64_t stride[GPU_LINEAR_WEIGHTS];
    int activation;                        /* qllm_activation of decoder/config.h */
    gpu_heads heads;
} gpu_linear_output;

/* Whether one call can take these weights together: all tiled, of one format, blocksize and number
 * of columns, and their shapes what `after` asks for. */
bool gpu_linear_fits(const gpu_weight *const *weights, int n, const gpu_linear_output *output);

/* Bytes of scratch that a call of that many rows and columns may use. */
int64_t gpu_linear_scratch(int64_t rows, int64_t cols);

/* Launches, for 1 to 3 weights that fit and any number of rows; does not wait. */
qllm_status gpu_linear(const gpu_device *device, const gpu_weight *const *weights, int n,
                       const gpu_linear_input *input, const gpu_linear_output *output,
                       gpu_stream stream, qllm_error *error);

/* What runs for a format and a number of rows: "nf4 tensor cores, few rows". Static. */
const char *gpu_linear_name(qllm_format format, int64_t rows);

#endif
