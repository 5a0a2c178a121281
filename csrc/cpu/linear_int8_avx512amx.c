/* int8 weights by many rows of LLM.int8() in the matrix units (AMX): the sum over all columns is
 * exact in int32, whichever way it is taken.  Weights are squares as they lie (packed_layout.h),
 * and so are rows of x.  Two panels of rows by two tiles of weights are multiplied at a time, some
 * columns of which stay in the first-level cache while all panels use them; between columns, sums
 * wait in memory. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "cpu/kernels.h"
#include "cpu/linear_int8_finish.h"
#include "cpu/squares.h"

enum {
    PANELS = 16,  /* of x, which stay in the second-level cache while all tiles use them */
    STEPS = 16,   /* squares of weights that follow one another for all panels */
    TILES = 2
};

typedef int32_t square_sums[SQUARE_LINES][16];

typedef struct int8_job {
    const qllm_packed *packed;
    const float *bias;
    const qllm_rows *in;
    float *y;
    int64_t y_stride;
    int64_t panel;             /* rows of one */
    int64_t panels;            /* so many, from the rows `first` on */
    int64_t first[PANELS];
} int8_job;

/* sums[panel][tile] += `steps` squares of weights from step `step` on.  Each line that follows is
 * asked for once, by the first panels. */
QLLM_INLINE void add_squares(const int panels, const int tiles, const int8_job *job, int64_t tile,
                             int64_t panel, int64_t step, int64_t steps, square_sums (*sums)[TILES])
{
    int64_t stride = job->in->q_stride, tile_bytes = job->packed->tile_bytes;
    const uint8_t *w = qllm_packed_tile(job->packed, tile) + step * SQUARE;
    const uint8_t *x = (const uint8_t *)job->in->q + job->first[panel] * stride + step * 64;
    const uint8_t *x1 = x;
    if (panels > 1)
        x1 = (const uint8_t *)job->in->q + job->first[panel + 1] * stride + step * 64;
    SQUARE_LOAD(0, sums[0][0], 64);
    if (tiles > 1)
        SQUARE_LOAD(1, sums[0][1], 64);
    if (panels > 1)
        SQUARE_LOAD(2, sums[1][0], 64);
    if (panels > 1 && tiles > 1)
        SQUARE_LOAD(3, sums[1][1], 64);
    for (int64_t i = 0; i < steps; i++, x += 64, x1 += 64, w += SQUARE) {
        for (int line = 0; panel == 0 && line < SQUARE_LINES; line++) {
            __builtin_prefetch(w + STEPS * SQUARE + line * QLLM_LINE, 0, 2);
            if (tiles > 1)
                __builtin_prefetch(w + tile_bytes + STEPS * SQUARE + line * QLLM_LINE, 0, 2);
        }
        SQUARE_LOAD(4, w, QLLM_LINE);
        SQUARE_LOAD(6, x, stride);
        SQUARE_DOT(ss, 0, 6, 4);
        if (panels > 1) {
            SQUARE_LOAD(7, x1, stride);
            SQUARE_DOT(ss, 2, 7, 4);
        }
        if (tiles > 1) {
            SQUARE_LOAD(5, w + tile_bytes, QLLM_LINE);
            SQUARE_DOT(ss, 1, 6, 5);
        }
        if (panels > 1 && tiles > 1)
            SQUARE_DOT(ss, 3, 7, 5);
    }
    SQUARE_STORE(0, sums[0][0]);
    if (tiles > 1)
        SQUARE_STORE(1, sums[0][1]);
    if (panels > 1)
        SQUARE_STORE(2, sums[1][0]);
    if (panels > 1 && tiles > 1)
        SQUARE_STORE(3, sums[1][1]);
}

/* All panels of the job by `tiles` tiles. */
QLLM_INLINE void multiply_tiles(const int tiles, const int8_job *job, int64_t tile)
{
    _Alignas(64) square_sums sums[PANELS][TILES];
    int64_t all = (job->packed->cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD;
    memset(sums, 0, sizeof sums[0] * (size_t)job->panels);
    for (int64_t step = 0; step < all; step += STEPS) {
        int64_t steps = all - step < STEPS ? all - step : STEPS, p = 0;
        for (; p + 2 <= job->panels; p += 2)
            add_squares(2, tiles, job, tile, p, step, steps, sums + p);
        if (p < job->panels)
            add_squares(1, tiles, job, tile, p, step, steps, sums + p);
    }
    for (int64_t p = 0; p < job->panels; p++)
        for (int t = 0; t < tiles; t++)
            for (int64_t r = 0; r < job->panel; r++)
                finish_int8(job->packed, job->bias, job->in, tile + t, job->first[p] + r,
                            ilanes_load(sums[p][t][r]), job->y, job->y_stride);
}

/* Panels of as many rows each; the last begins where it ends with the last row, so that some rows
 * may be computed twice. */
void qllm_linear_int8_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t all = (in->m + SQUARE_LINES - 1) / SQUARE_LINES;
    int8_job job = {.packed = packed, .bias = bias, .in = in, .y = y, .y_stride = y_stride,
                    .panel = (in->m + all - 1) / all};
    squares_open(job.panel, 64);
    for (int64_t p = 0; p < all; p += job.panels) {
        int64_t tile = begin;
        job.panels = all - p < PANELS ? all - p : PANELS;
        for (int64_t i = 0; i < job.panels; i++) {
            int64_t row = (p + i) * job.panel, last = in->m - job.panel;
            job.first[i] = row < last ? row : last;
        }
        for (; tile + TILES <= end; tile += TILES)
            multiply_tiles(TILES, &job, tile);
        for (; tile < end; tile++)
            multiply_tiles(1, &job, tile);
    }
    squares_close();
}
