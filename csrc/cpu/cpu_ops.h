/* The fine seam: one table of small functions per instruction set.  Every table computes the same
 * bits: elementwise functions use the same operations in the same order (core/elementary.h has the
 * exponential), and sums run in the order written here.
 *
 * lane sum of n values: 16 partial sums from +0, partial j over elements j, j + 16, j + 32, ... in
 * ascending order, then partial j += partial j + 8 (j < 8), + 4 (j < 4), + 2, + 1. */
#ifndef QLLM_CPU_CPU_OPS_H
#define QLLM_CPU_CPU_OPS_H

#include <stdint.h>

#include "core/activation.h"
#include "cpu/features.h"
#include "cpu/packed.h"

enum {
    QLLM_KV_PANEL = 16,      /* positions whose keys are interleaved */
    QLLM_ATTENTION_HEADS = 4, /* query heads that share one reading of keys and values */
    QLLM_FEW_ROWS = 16,       /* more rows of x take the block kernel of tier exact */
    QLLM_X_PANEL = 6,         /* of which so many are interleaved, whatever the set, ... */
    QLLM_X_COLUMNS = 256      /* ... this number of columns at a time */
};

/* Keys and values of consecutive positions for one key-value head.  Key element (i, d) lies at
 * k[(i / 16) * head_dim * 16 + d * 16 + i % 16], value element (i, d) at v[i * head_dim + d]. The
 * last key panel is complete memory (contents beyond count are finite and ignored). */
typedef struct qllm_kv_span {
    const float *k, *v;
    int64_t count;
} qllm_kv_span;

/* One row of a batch and one key-value head: `heads` query heads attend to positions
 * [begin, end) of the spans, which follow one another from position 0.
 *   score_j = fma chain over d ascending of q_d * k_jd from +0, then fma(dot, scale, bias_j)
 *             (dot * scale without a bias)
 *   e_j = exp(score_j - max score), out_d = (fma chain over j ascending of e_j * v_jd from +0)
 *         * (1 / lane sum of e_begin .. e_end-1) */
typedef struct qllm_attention {
    const float *q;         /* (heads, head_dim), contiguous */
    int64_t heads, head_dim;
    const qllm_kv_span *spans;
    int64_t n_spans;
    int64_t begin, end;     /* 0 <= begin < end <= sum of counts */
    float scale;
    const float *bias;      /* bias[h * bias_stride + j] for position j, or NULL */
    int64_t bias_stride;
    float *scores;          /* scratch: qllm_attention_scratch(end - begin, heads) floats */
    float *out;             /* (heads, head_dim), contiguous */
} qllm_attention;

static inline int64_t qllm_attention_scratch(int64_t positions, int64_t heads)
{
    int64_t rows = heads < QLLM_ATTENTION_HEADS ? heads : QLLM_ATTENTION_HEADS;
    return rows * ((positions + 2 * QLLM_KV_PANEL + 15) / 16 * 16);
}

/* The input of a linear layer: x (m, cols) float32, row r at x + r * stride, and its rounded form
 * `q`, row r at q + r * q_stride bytes:
 *   tier exact, float weights   the block kernel takes float32 in panels: qllm_x_panel
 *   tier exact, int8 weights    int8, cols padded with zeros to 64: qllm_int8_activation
 *   tiers int16 and int8        int16 or int8 by blocks, in the order that the set's kernels take
 *   tier bf16                   bf16, cols padded with zeros to 32
 *   tier bf16x2                 bf16, in panels: qllm_cpu_ops.pairs_activation
 * In panels of `panel` rows, where that is not 0, the panel from row r on lies at q + r * q_stride
 * (qllm_cpu_ops.panel_activation); behind the last row stand zeros up to a whole panel. */
typedef struct qllm_rows {
    const float *x;
    int64_t m, cols, stride;
    qllm_tier tier;
    const void *q;             /* NULL where every kernel takes x itself */
    int64_t panel;
    int64_t q_stride;
    const float *scale;        /* (m), or (m, blocks) in the tiers int16 and int8, in panels
                                  (panels, blocks, panel) */
    const int32_t *block_sums; /* (m, blocks) sums of the q of a block; tier int8 */
    const int32_t *outliers;   /* row r: outliers[r * cols .. + n_outliers[r]], ascending */
    const int64_t *n_outliers; /* (m) */
} qllm_rows;

/* Where in q the element of row f and column c stands, the first of the panel that f begins and of
 * QLLM_X_COLUMNS columns; element (r, k) is k * n + r floats behind it, n being QLLM_X_PANEL or the
 * rows that are left for the last panel.  So all panels of some columns lie in one piece. */
static inline int64_t qllm_x_panel(int64_t m, int64_t cols, int64_t f, int64_t c)
{
    int64_t width = cols - c < QLLM_X_COLUMNS ? cols - c : QLLM_X_COLUMNS;
    return c * m + f * width;
}

typedef struct qllm_cpu_ops {
    const char *name;

    /* y[r * y_stride + o] for the outputs o of tiles [tile_begin, tile_end), every row r: exactly
     * the sums of core/linear_ref.h.  bias (rows) or NULL. */
    void (*linear)(const qllm_packed *weight, const float *bias, const qllm_rows *rows,
                   int64_t tile_begin, int64_t tile_end, float *y, int64_t y_stride);
    /* What `linear` runs for a weight, a tier and m rows: "nf4 avx512, fused, few rows". Static. */
    const char *(*linear_name)(const qllm_packed *weight, qllm_tier tier, int64_t m);
    /* As qllm_int8_activation of core/quant.h; columns 64 i to 64 i + 63 go to q + i * step, zeros
     * behind cols up to a multiple of 64. */
    void (*int8_activation)(const float *x, int64_t cols, float threshold, int8_t *q, int64_t step,
                            float *scale, int32_t *outliers, int64_t *n_outliers);
    /* A row in the form of tier int16 or int8: qllm_block_activation for each `block` values (a
     * multiple of 16 that divides cols).  q in the set's own order; scale and sums (cols / block),
     * sums only in tier int8. */
    void (*block_activation)(qllm_tier tier, const float *x, int64_t cols, int64_t block, void *q,
                             float *scale, int32_t *sums);
    /* Sets that take m rows in the form of tier int8 or bf16x2 by panels say how many rows
     * each has, 0: no panels.  All together have at most twice as many rows as x.  Others: NULL.
     * `distance` is that of the pairs of tier bf16x2. */
    int64_t (*panel_rows)(qllm_tier tier, int64_t distance, int64_t m);
    /* A row in tier int8 as block_activation has it, but without sums, into a panel of `rows` rows:
     * q is the row's first block.  A panel has, of each block, a square: `block` bytes of every
     * row.  The row's scales go to scale[0], scale[rows], ... */
    void (*panel_activation)(const float *x, int64_t cols, int64_t block, int64_t rows, int8_t *q,
                             float *scale);
    /* qllm_bf16_activation of a row for tier bf16x2, into a panel of `rows` rows: q is the row's
     * first group.  A panel has, of each group, 64 bytes of every row, pairs of columns that are
     * `distance` apart (qllm_pair_distance), zeros behind the last column.  NULL: the set
     * does not offer the tier; else it is the one of `auto`, and panel_rows knows it. */
    void (*pairs_activation)(const float *x, int64_t cols, int64_t distance, int64_t rows,
                             uint16_t *q);
    /* qllm_bf16_activation of a row, zeros behind up to a multiple of 32.  NULL: the set gains
     * nothing by tier bf16 and does not offer it. */
    void (*bf16_activation)(const float *x, int64_t cols, uint16_t *q);

    /* y = w * (x * (1 / sqrt(lane sum of x * x / n + eps))); y may be x */
    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *y);
    /* mean = lane sum of x / n, var = lane sum of (x - mean)^2 / n;
     * y = fma((x - mean) * (1 / sqrt(var + eps)), w, bias), without bias the product; y may be x */
    void (*layer_norm)(const float *x, const float *weight, const float *bias, int64_t n, float eps,
                       float *y);
    /* rotates pairs (i, i + half): x_i = fma(x_i, cos_i, -(x_i+half * sin_i)),
     * x_i+half = fma(x_i+half, cos_i, x_i * sin_i) with the old values */
    void (*rope)(float *x, const float *cos, const float *sin, int64_t half);
    void (*attention)(const qllm_attention *args);
    /* The same by parts, which threads may share, for at most QLLM_ATTENTION_HEADS heads: the
     * scores of the spans [first, last); when all are there, the weights of each head h; when all
     * are there, the vectors [first, last) of 16 elements of every head's output. */
    void (*attention_scores)(const qllm_attention *args, int64_t first, int64_t last);
    void (*attention_weights)(const qllm_attention *args, int64_t h);
    void (*attention_values)(const qllm_attention *args, int64_t first, int64_t last);
    /* y = act(gate) * up; up NULL: y = act(gate); y may be gate.
     * silu: x / (1 + exp(-x)); gelu: x/2 (1 + erf(x/sqrt 2)); gelu_tanh: its tanh form;
     * exactly the operations of core/elementary.h */
    void (*silu)(const float *gate, const float *up, int64_t n, float *y);
    void (*gelu)(const float *gate, const float *up, int64_t n, float *y);
    void (*gelu_tanh)(const float *gate, const float *up, int64_t n, float *y);
    void (*add)(const float *a, int64_t n, float *x); /* x += a */
} qllm_cpu_ops;

/* The table of a compiled and supported set (cpu/features.h). */
const qllm_cpu_ops *qllm_cpu_ops_get(qllm_isa isa);

#endif
