/* int8 weights by rows of LLM.int8() in the matrix units (AMX): the sum over all columns is exact
 * in int32, whichever way it is taken. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include "cpu/kernels.h"
#include "cpu/linear_int8_finish.h"
#include "cpu/squares.h"

#define SQUARES_DOT(sum, x, weights) SQUARE_DOT(ss, sum, x, weights)
#include "cpu/linear_squares.h"

static void finish_row(const squares_job *job, int64_t tile, int64_t row, const float *sums)
{
    finish_int8(job->packed, job->bias, job->in, tile, row, ilanes_load(sums), job->y,
                job->y_stride);
}

void qllm_linear_int8_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    squares_job job = {.packed = packed, .bias = bias, .in = in, .y = y, .y_stride = y_stride,
                       .steps = (packed->cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD};
    linear_squares(&job, begin, end);
}
