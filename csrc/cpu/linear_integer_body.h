/* The linear kernels of the tiers int16 and int8, written once on top of sixteen lanes; see
 * linear_body.h.  A line of codes is decoded in registers once for all rows of a pass; the sum of a
 * block is exact in int32, so its order is free, and one fma a block adds it to the output: one
 * kernel serves decode, small batches and prefill alike. */
#ifndef QLLM_CPU_LINEAR_INTEGER_BODY_H
#define QLLM_CPU_LINEAR_INTEGER_BODY_H

#include "cpu/cpu_ops.h"
#include "cpu/tile_stream.h"

enum { INTEGER_ROWS_MAX = 8, INTEGER_CHAINS_MAX = 4 };

/* sum[m][0] += the products of `lines` lines from `at` on with row m's values from q[m] on. */
QLLM_INLINE void add_lines(const bool wide, const int rows, const int chains, int64_t lines,
                           lanes_codes codes, const uint8_t *at, const uint8_t *const *q,
                           ilanes (*sum)[INTEGER_CHAINS_MAX])
{
    const int vectors = wide ? 4 : 2;
    for (int64_t line = 0; line < lines; line++) {
        qllm_prefetch_codes(at + line * QLLM_LINE);
        code_vectors w = lanes_decode(wide, codes, at + line * QLLM_LINE);
        LANES_UNROLL
        for (int j = 0; j < vectors; j++)
            LANES_UNROLL
            for (int m = 0; m < rows; m++)
                sum[m][j % chains] = ilanes_dot_codes(wide, sum[m][j % chains], w.v[j],
                                                      q[m] + 4 * (line * vectors + j));
    }
    LANES_UNROLL
    for (int c = chains; c > 1; c /= 2)
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            LANES_UNROLL
            for (int i = 0; i < c / 2; i++)
                sum[m][i] = ilanes_add(sum[m][i], sum[m][i + c / 2]);
}

/* One tile, `rows` rows of x from row `row` on. */
QLLM_INLINE void integer_tile(const bool wide, const bool nested, const int rows,
                              const qllm_packed *packed, const float *bias, const qllm_rows *in,
                              int64_t tile, int64_t row, float *out, int64_t out_stride)
{
    const int chains = rows < LANES_INTEGER_CHAINS ? LANES_INTEGER_CHAINS / rows : 1;
    int64_t block = qllm_activation_block(packed->blocksize), blocks = packed->cols / block;
    lanes_codes codes = lanes_codes_load(wide, wide ? packed->codes16 : packed->codes8);
    tile_stream s;
    lanes y[INTEGER_ROWS_MAX];
    stream_open(&s, packed, tile);
    LANES_UNROLL
    for (int m = 0; m < rows; m++)
        y[m] = lanes_zero();
    for (int64_t b = 0; b < blocks; b++) {
        int64_t g = b * block / QLLM_GROUP;
        ilanes sum[INTEGER_ROWS_MAX][INTEGER_CHAINS_MAX];
        const uint8_t *q[INTEGER_ROWS_MAX];
        LANES_UNROLL
        for (int m = 0; m < rows; m++) {
            int32_t of_x = wide ? 0 : in->block_sums[(row + m) * blocks + b];
            q[m] = (const uint8_t *)in->q + (row + m) * in->q_stride + b * block * (wide ? 2 : 1);
            sum[m][0] = ilanes_codes_start(wide, of_x);
            LANES_UNROLL
            for (int c = 1; c < chains; c++)
                sum[m][c] = ilanes_set1(0);
        }
        read_unit_if_first(nested, &s, g);
        const uint8_t *at = group_at(QLLM_LAYOUT_BLOCKS, nested, &s, g);
        if (block == QLLM_ACTIVATION_BLOCK)
            add_lines(wide, rows, chains, QLLM_ACTIVATION_BLOCK / QLLM_STEP, codes, at, q, sum);
        else
            add_lines(wide, rows, chains, QLLM_BLOCKSIZE_MIN / QLLM_STEP, codes, at, q, sum);
        lanes absmax = scale_at(QLLM_LAYOUT_BLOCKS, nested, &s, g);
        LANES_UNROLL
        for (int m = 0; m < rows; m++) {
            lanes scale = lanes_mul(absmax, lanes_set1(in->scale[(row + m) * blocks + b]));
            y[m] = lanes_fma(scale, lanes_from_int(sum[m][0]), y[m]);
        }
    }
    int64_t o = tile * QLLM_TILE_ROWS, left = packed->rows - o;
    int64_t n = left < QLLM_TILE_ROWS ? left : QLLM_TILE_ROWS;
    lanes unit = lanes_set1(wide ? packed->unit16 : packed->unit8);
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        lanes value = lanes_mul(y[m], unit);
        if (bias != NULL)
            value = lanes_add(value, lanes_load_n(bias + o, n));
        lanes_store_n(out + (row + m) * out_stride + o, value, n);
    }
}

QLLM_INLINE void linear_integer(const bool wide, const bool nested, const qllm_packed *packed,
                                const float *bias, const qllm_rows *in, int64_t begin, int64_t end,
                                float *y, int64_t y_stride)
{
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t row = 0;
        for (; LANES_INTEGER_ROWS >= 8 && row + 8 <= in->m; row += 8)
            integer_tile(wide, nested, 8, packed, bias, in, tile, row, y, y_stride);
        for (; LANES_INTEGER_ROWS >= 4 && row + 4 <= in->m; row += 4)
            integer_tile(wide, nested, 4, packed, bias, in, tile, row, y, y_stride);
        for (; LANES_INTEGER_ROWS >= 2 && row + 2 <= in->m; row += 2)
            integer_tile(wide, nested, 2, packed, bias, in, tile, row, y, y_stride);
        for (; row < in->m; row++)
            integer_tile(wide, nested, 1, packed, bias, in, tile, row, y, y_stride);
    }
}

#endif
