/* The linear kernel for int8 weights, written once on top of sixteen lanes; see linear_body.h.  The
 * sum of a lane is exact in int32, so its order is free. */
#ifndef QLLM_CPU_LINEAR_INT8_BODY_H
#define QLLM_CPU_LINEAR_INT8_BODY_H

#include <string.h>

#include "cpu/cpu_ops.h"
#include "cpu/linear_int8_finish.h"

enum { INT8_CHAINS = 4 }; /* sums side by side where one row and one tile are all there is */

QLLM_INLINE int32_t four_codes(const int8_t *q)
{
    int32_t word;
    memcpy(&word, q, sizeof word);
    return word;
}

/* `rows` rows of x from `row` on by `tiles` tiles from `tile` on. */
QLLM_INLINE void int8_block(const int rows, const int tiles, const qllm_packed *packed,
                            const float *bias, const qllm_rows *in, int64_t tile, int64_t row,
                            float *y, int64_t y_stride)
{
    ilanes sum[LANES_BLOCK_ROWS][LANES_INT8_TILES];
    const uint8_t *base = qllm_packed_tile(packed, tile);
    int64_t padded = (packed->cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD;
    const int8_t *q = (const int8_t *)in->q + row * in->q_stride;
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            sum[r][t] = ilanes_dot_start(packed->row_sums + (tile + t) * QLLM_TILE_ROWS);
    for (int64_t k = 0; k < padded; k += 4) {
        ilanes w[LANES_INT8_TILES];
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            w[t] = ilanes_load(base + t * packed->tile_bytes + k / 4 * QLLM_LINE);
        LANES_UNROLL
        for (int r = 0; r < rows; r++) {
            ilanes_word x = ilanes_dot_word(four_codes(q + r * in->q_stride + k));
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                sum[r][t] = ilanes_dot(sum[r][t], w[t], x);
        }
    }
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            finish_int8(packed, bias, in, tile + t, row + r, sum[r][t], y, y_stride);
}

/* One row by one tile, which is streamed once: chains over interleaved lines. */
QLLM_INLINE void int8_single(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                             int64_t tile, int64_t row, float *y, int64_t y_stride)
{
    ilanes sum[INT8_CHAINS];
    const uint8_t *base = qllm_packed_tile(packed, tile);
    int64_t padded = (packed->cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD;
    const int8_t *q = (const int8_t *)in->q + row * in->q_stride;
    sum[0] = ilanes_dot_start(packed->row_sums + tile * QLLM_TILE_ROWS);
    LANES_UNROLL
    for (int c = 1; c < INT8_CHAINS; c++)
        sum[c] = ilanes_set1(0);
    for (int64_t k = 0; k < padded; k += 4 * INT8_CHAINS) {
        LANES_UNROLL
        for (int c = 0; c < INT8_CHAINS; c++) {
            const uint8_t *line = base + (k / 4 + c) * QLLM_LINE;
            qllm_prefetch(line);
            sum[c] = ilanes_dot(sum[c], ilanes_load(line),
                                ilanes_dot_word(four_codes(q + k + 4 * c)));
        }
    }
    for (int c = 1; c < INT8_CHAINS; c++)
        sum[0] = ilanes_add(sum[0], sum[c]);
    finish_int8(packed, bias, in, tile, row, sum[0], y, y_stride);
}

/* All rows of x by `tiles` tiles. */
QLLM_INLINE void int8_tiles(const int tiles, const qllm_packed *packed, const float *bias,
                            const qllm_rows *in, int64_t tile, float *y, int64_t y_stride)
{
    int64_t row = 0;
    for (; row + LANES_BLOCK_ROWS <= in->m; row += LANES_BLOCK_ROWS)
        int8_block(LANES_BLOCK_ROWS, tiles, packed, bias, in, tile, row, y, y_stride);
    for (; LANES_BLOCK_ROWS > 2 && row + 2 <= in->m; row += 2)
        int8_block(LANES_BLOCK_ROWS > 2 ? 2 : 1, tiles, packed, bias, in, tile, row, y, y_stride);
    for (; row < in->m; row++)
        int8_block(1, tiles, packed, bias, in, tile, row, y, y_stride);
}

static void linear_int8(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                             int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t tile = begin;
    if (in->m == 1)
        for (; tile < end; tile++)
            int8_single(packed, bias, in, tile, 0, y, y_stride);
    for (; tile + LANES_INT8_TILES <= end; tile += LANES_INT8_TILES)
        int8_tiles(LANES_INT8_TILES, packed, bias, in, tile, y, y_stride);
    for (; tile < end; tile++)
        int8_tiles(1, packed, bias, in, tile, y, y_stride);
}

#endif
