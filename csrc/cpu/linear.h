/* y = x W^T + bias with a packed weight, over a pool of threads: activations of int8 weights are
 * quantized once, then the tiles are split. */
#ifndef QLLM_CPU_LINEAR_H
#define QLLM_CPU_LINEAR_H

#include <stdbool.h>

#include "cpu/cpu_ops.h"
#include "cpu/threads.h"

typedef struct qllm_linear_options {
    float int8_threshold; /* outliers of LLM.int8(): |x| >= threshold; <= 0 switches them off */
    bool int8_batch;      /* bitsandbytes' per-batch form: a row then depends on the others */
} qllm_linear_options;

/* Scratch bytes for a weight of `cols` columns and m rows; -1 on overflow. */
int64_t qllm_cpu_linear_scratch(int64_t cols, int64_t m);

/* x (m, cols) rows at x + r * x_stride, y (m, rows) rows at y + r * y_stride; bias (rows) or NULL;
 * scratch 64-byte aligned.  x and y do not overlap. */
void qllm_cpu_linear(qllm_threads *threads, const qllm_cpu_ops *ops, const qllm_packed *weight,
                     const float *bias, const float *x, int64_t m, int64_t x_stride,
                     const qllm_linear_options *options, void *scratch, float *y, int64_t y_stride);

#endif
