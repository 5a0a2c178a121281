/* y = x W^T + bias with packed weights, over a pool of threads: x is rounded once to what the tier
 * of the weights takes, then the tiles are split. */
#ifndef QLLM_CPU_LINEAR_H
#define QLLM_CPU_LINEAR_H

#include <stdbool.h>

#include "core/compute.h"
#include "cpu/cpu_ops.h"
#include "cpu/threads.h"

typedef struct qllm_linear_options {
    qllm_compute compute;
    float int8_threshold; /* outliers of LLM.int8(): |x| >= threshold; <= 0 switches them off */
    bool int8_batch;      /* bitsandbytes' per-batch form: a row then depends on the others */
} qllm_linear_options;

/* One of several weights that are multiplied with the same x. */
typedef struct qllm_linear_part {
    const qllm_packed *weight;
    const float *bias; /* (rows) or NULL */
    float *y;          /* row r at y + r * y_stride */
    int64_t y_stride;
} qllm_linear_part;

enum { QLLM_LINEAR_PARTS = 3 };

/* What a weight computes with under a mode: 4-bit weights whose blocks end with the rows take int8
 * in `int8` and in `auto` bf16x2 where the set offers it, else int16; bf16 weights take bf16x2 or
 * bf16 in both where the set offers one of them; everything else is exact. */
qllm_tier qllm_cpu_linear_tier(const qllm_cpu_ops *ops, const qllm_packed *weight,
                               qllm_compute compute);

/* Scratch bytes for weights of `cols` columns and m rows; -1 on overflow. */
int64_t qllm_cpu_linear_scratch(int64_t cols, int64_t m);

/* x (m, cols) rows at x + r * x_stride; 1 to QLLM_LINEAR_PARTS parts of `cols` columns each, in one
 * job where they take x in the same form; scratch 64-byte aligned.  x and the y do not overlap. */
void qllm_cpu_linear(qllm_threads *threads, const qllm_cpu_ops *ops, const qllm_linear_part *parts,
                     int n_parts, const float *x, int64_t m, int64_t x_stride,
                     const qllm_linear_options *options, void *scratch);

/* m rows that the caller has rounded as LLM.int8() has it: q (m, cols) contiguous, in units of
 * absmax (m) / 127, and columns, ascending, which are added from x (m, cols) float32 in every
 * row. */
typedef struct qllm_cpu_linear_int8_rows {
    const int8_t *q;
    const float *absmax;
    const int64_t *outliers; /* (n_outliers) */
    int64_t n_outliers;
    const float *x;          /* NULL when there are no outliers */
    int64_t m;
} qllm_cpu_linear_int8_rows;

/* The product of such rows and one int8 weight; scratch as for qllm_cpu_linear. */
void qllm_cpu_linear_int8(qllm_threads *threads, const qllm_cpu_ops *ops,
                          const qllm_linear_part *part, const qllm_cpu_linear_int8_rows *rows,
                          void *scratch);

#endif
