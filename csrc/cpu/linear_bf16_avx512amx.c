/* Tier bf16x2: bf16 weights by x rounded to bf16 in the matrix units (AMX). */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/squares.h"

#define SQUARES_DOT SQUARE_DOT_BF16
#include "cpu/linear_squares.h"

static void finish_row(const squares_job *job, int64_t tile, int64_t row, const float *sums)
{
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(job->packed, tile);
    lanes value = lanes_load(sums);
    if (job->bias != NULL)
        value = lanes_add(value, lanes_load_n(job->bias + o, n));
    lanes_store_n(job->y + row * job->y_stride + o, value, n);
}

void qllm_linear_bf16_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    squares_job job = {.packed = packed, .bias = bias, .in = in, .y = y, .y_stride = y_stride,
                       .steps = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP};
    linear_squares(&job, begin, end);
}
