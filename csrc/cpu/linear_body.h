/* The linear kernels for float-valued weights, written once on top of sixteen lanes = the 16 output
 * rows of a tile.  Included by linear_<set>.c after its lanes_<set>.h.
 *
 * The order of summation is that of core/linear_ref.h whatever the kernel: lanes are outputs, so
 * one chain per group of 32 columns and one chain across groups is what a lane computes in any
 * case.  Speed comes from independent chains side by side: groups, rows of x, tiles.
 *
 *   fused:  few rows of x, four at a time; codes are decoded in registers, once for these four
 *   block:  more rows; BLOCK_COLUMNS columns of a few tiles are decoded into a small buffer, which
 *           every row then uses.  There is no other copy of decoded weights anywhere. */
#ifndef QLLM_CPU_LINEAR_BODY_H
#define QLLM_CPU_LINEAR_BODY_H

#include "core/linear_ref.h"
#include "core/quant.h"
#include "cpu/cpu_ops.h"
#include "cpu/linear_names.h"
#include "cpu/packed_layout.h"
#include "cpu/tile_stream.h"

enum {
    FUSED_ROWS_MAX = 4, /* in one pass */
    CHAINS_MAX = 2,     /* divides 4 blocks, so that a run of groups stays inside a unit */
    BLOCK_COLUMNS = 128,
    BLOCK_GROUPS = BLOCK_COLUMNS / QLLM_GROUP
};

/* Column j (0 .. 7) of the step at `at`, 16 rows. */
QLLM_INLINE lanes weight_at(qllm_layout kind, const uint8_t *at, int j, lanes_table table)
{
    switch (kind) {
    case QLLM_LAYOUT_F32: return lanes_load((const float *)(const void *)at + 16 * j);
    case QLLM_LAYOUT_F16: return lanes_load_f16(at + j * (QLLM_LINE / 2));
    case QLLM_LAYOUT_BF16: {
        ilanes pair = ilanes_load(at + j / 2 * QLLM_LINE);
        return j % 2 == 0 ? lanes_bf16_low(pair) : lanes_bf16_high(pair);
    }
    default: return lanes_lookup(table, at, j);
    }
}

QLLM_INLINE void prefetch_step(qllm_layout kind, const uint8_t *at)
{
    LANES_UNROLL
    for (int64_t line = 0; line < step_bytes(kind); line += QLLM_LINE)
        if (kind == QLLM_LAYOUT_BLOCKS)
            qllm_prefetch_codes(at + line);
        else
            qllm_prefetch(at + line);
}

/* y[m] += the groups g .. g + chains - 1, for `rows` rows of x. */
QLLM_INLINE void add_groups(qllm_layout kind, bool nested, const int rows, const int chains,
                            const tile_stream *s, int64_t g, lanes_table table,
                            const float *const *x, lanes *y)
{
    lanes p[CHAINS_MAX][FUSED_ROWS_MAX];
    const uint8_t *at[CHAINS_MAX];
    LANES_UNROLL
    for (int c = 0; c < chains; c++) {
        at[c] = group_at(kind, nested, s, g + c);
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            p[c][m] = lanes_zero();
    }
    for (int step = 0; step < GROUP_STEPS; step++) {
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            prefetch_step(kind, at[c] + step * step_bytes(kind));
        LANES_UNROLL
        for (int j = 0; j < QLLM_STEP; j++) {
            LANES_UNROLL
            for (int c = 0; c < chains; c++) {
                int64_t k = (g + c) * QLLM_GROUP + step * QLLM_STEP + j;
                lanes w = weight_at(kind, at[c] + step * step_bytes(kind), j, table);
                LANES_UNROLL
                for (int m = 0; m < rows; m++)
                    p[c][m] = lanes_fma(w, lanes_set1(x[m][k]), p[c][m]);
            }
        }
    }
    LANES_UNROLL
    for (int c = 0; c < chains; c++) {
        lanes scale = scale_at(kind, nested, s, g + c);
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            y[m] = lanes_fma(scale, p[c][m], y[m]);
    }
}

/* The columns behind the last whole group; only the float layouts have such. */
QLLM_INLINE void add_tail(qllm_layout kind, const int rows, const tile_stream *s, lanes_table table,
                          const float *const *x, lanes *y)
{
    int64_t first = s->groups * QLLM_GROUP, cols = s->packed->cols;
    lanes p[FUSED_ROWS_MAX];
    for (int m = 0; m < rows; m++)
        p[m] = lanes_zero();
    for (int64_t k = first; k < cols; k++) {
        lanes w = weight_at(kind, s->base + k / QLLM_STEP * step_bytes(kind), (int)(k % QLLM_STEP),
                            table);
        for (int m = 0; m < rows; m++)
            p[m] = lanes_fma(w, lanes_set1(x[m][k]), p[m]);
    }
    for (int m = 0; m < rows && first < cols; m++)
        y[m] = lanes_add(y[m], p[m]);
}

/* One tile, `rows` rows of x from row `row` on. */
QLLM_INLINE void fused_tile(qllm_layout kind, bool nested, const int rows,
                            const qllm_packed *packed, int64_t tile, const float *bias,
                            const qllm_rows *in, int64_t row, float *out, int64_t out_stride)
{
    /* the wide layouts are read too fast for more than one stream */
    const int most = kind == QLLM_LAYOUT_BLOCKS ? LANES_FUSED_CHAINS : 1;
    const int chains = rows >= most ? 1 : most / rows;
    tile_stream s;
    lanes y[FUSED_ROWS_MAX];
    const float *x[FUSED_ROWS_MAX];
    stream_open(&s, packed, tile);
    lanes_table table = lanes_table_load(packed->code);
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        x[m] = in->x + (row + m) * in->stride;
        y[m] = lanes_zero();
    }
    int64_t g = 0;
    for (; g + chains <= s.groups; g += chains) {
        read_unit_if_first(nested, &s, g);
        add_groups(kind, nested, rows, chains, &s, g, table, x, y);
    }
    for (; g < s.groups; g++) {
        read_unit_if_first(nested, &s, g);
        add_groups(kind, nested, rows, 1, &s, g, table, x, y);
    }
    if (kind != QLLM_LAYOUT_BLOCKS)
        add_tail(kind, rows, &s, table, x, y);
    int64_t o = tile * QLLM_TILE_ROWS;
    int64_t n = packed->rows - o < QLLM_TILE_ROWS ? packed->rows - o : QLLM_TILE_ROWS;
    for (int m = 0; m < rows; m++) {
        if (bias != NULL)
            y[m] = lanes_add(y[m], lanes_load_n(bias + o, n));
        lanes_store_n(out + (row + m) * out_stride + o, y[m], n);
    }
}

QLLM_INLINE void fused(qllm_layout kind, bool nested, const qllm_packed *packed, const float *bias,
                       const qllm_rows *in, int64_t tile, float *out, int64_t out_stride)
{
    int64_t row = 0;
    if (LANES_FUSED_ROWS >= 4)
        for (; row + 4 <= in->m; row += 4)
            fused_tile(kind, nested, 4, packed, tile, bias, in, row, out, out_stride);
    if (LANES_FUSED_ROWS >= 2)
        for (; row + 2 <= in->m; row += 2)
            fused_tile(kind, nested, 2, packed, tile, bias, in, row, out, out_stride);
    for (; row < in->m; row++)
        fused_tile(kind, nested, 1, packed, tile, bias, in, row, out, out_stride);
}

/* A block of up to BLOCK_COLUMNS columns of some tiles: per tile where line k holds column k of 16
 * rows as floats, and the scales of its groups. */
typedef struct block {
    const float *w[LANES_BLOCK_TILES];
    _Alignas(64) float decoded[LANES_BLOCK_TILES][BLOCK_COLUMNS][16];
    float scales[BLOCK_GROUPS][LANES_BLOCK_TILES][16];
} block;

/* BYTES: rows that end inside a block, decoded element by element through the core. */
static void decode_bytes(const qllm_packed *packed, int64_t tile, int64_t first, int64_t n,
                         float (*out)[16])
{
    float row[BLOCK_COLUMNS];
    for (int64_t r = 0; r < QLLM_TILE_ROWS; r++) {
        int64_t o = tile * QLLM_TILE_ROWS + r;
        bool inside = o < packed->rows;
        if (inside)
            qllm_dequantize(&packed->standard, o * packed->cols + first, n, row);
        for (int64_t k = 0; k < n; k++)
            out[k][r] = inside ? row[k] : 0.0f;
    }
}

/* Columns [first, first + n) of one tile; first is a multiple of BLOCK_COLUMNS. */
QLLM_INLINE void decode_tile(qllm_layout kind, bool nested, const qllm_packed *packed, int64_t tile,
                             int64_t first, int64_t n, block *b, int t)
{
    tile_stream s;
    lanes_table table = lanes_table_load(packed->code);
    stream_open(&s, packed, tile);
    b->w[t] = b->decoded[t][0];
    if (kind == QLLM_LAYOUT_F32)
        b->w[t] = (const float *)(const void *)s.base + first * 16;
    else if (kind == QLLM_LAYOUT_BYTES)
        decode_bytes(packed, tile, first, n, b->decoded[t]);
    else
        for (int64_t k = 0; k < n; k += QLLM_STEP) {
            const uint8_t *at = group_at(kind, nested, &s, (first + k) / QLLM_GROUP) +
                                (first + k) % QLLM_GROUP / QLLM_STEP * step_bytes(kind);
            LANES_UNROLL
            for (int j = 0; j < QLLM_STEP; j++)
                lanes_store(b->decoded[t][k + j], weight_at(kind, at, j, table));
        }
    for (int64_t g = 0; g * QLLM_GROUP < n; g++) {
        int64_t group = first / QLLM_GROUP + g;
        if (nested && (g == 0 || (group & (QLLM_UNIT_BLOCKS * s.block_groups - 1)) == 0))
            stream_read_unit(&s, group / (QLLM_UNIT_BLOCKS * s.block_groups));
        lanes_store(b->scales[g][t], scale_at(kind, nested, &s, group));
    }
}

/* The outputs of one call of the register block: where they go, and what to do first and last. */
typedef struct block_out {
    float *y;
    int64_t stride;
    int64_t width[LANES_BLOCK_TILES]; /* outputs of each tile, 16 but for the last of a matrix */
    const float *bias;                /* for these tiles, in the last block of columns; else NULL */
    bool fresh;                       /* the first block of columns: y starts at 0 */
} block_out;

/* y += block for `rows` rows of x and `tiles` tiles. */
QLLM_INLINE void multiply(const int rows, const int tiles, const block *b, int64_t n,
                          const float *x, int64_t stride, const block_out *out)
{
    for (int64_t g = 0; g * QLLM_GROUP < n; g++) {
        lanes p[LANES_BLOCK_ROWS][LANES_BLOCK_TILES];
        int64_t end = n - g * QLLM_GROUP < QLLM_GROUP ? n : (g + 1) * QLLM_GROUP;
        LANES_UNROLL
        for (int r = 0; r < rows; r++)
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                p[r][t] = lanes_zero();
        for (int64_t k = g * QLLM_GROUP; k < end; k++) {
            lanes w[LANES_BLOCK_TILES];
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                w[t] = lanes_load(b->w[t] + k * 16);
            LANES_UNROLL
            for (int r = 0; r < rows; r++) {
                lanes value = lanes_set1(x[r * stride + k]);
                LANES_UNROLL
                for (int t = 0; t < tiles; t++)
                    p[r][t] = lanes_fma(w[t], value, p[r][t]);
            }
        }
        bool last = end == n;
        LANES_UNROLL
        for (int r = 0; r < rows; r++)
            LANES_UNROLL
            for (int t = 0; t < tiles; t++) {
                float *y = out->y + r * out->stride + 16 * t;
                lanes sum = lanes_zero();
                if (g > 0 || !out->fresh)
                    sum = lanes_load_n(y, out->width[t]);
                sum = lanes_fma(lanes_load(b->scales[g][t]), p[r][t], sum);
                if (last && out->bias != NULL)
                    sum = lanes_add(sum, lanes_load_n(out->bias + 16 * t, out->width[t]));
                lanes_store_n(y, sum, out->width[t]);
            }
    }
}

/* All rows of x in strips of the register block. */
QLLM_INLINE void multiply_rows(const int tiles, const block *b, int64_t first, int64_t n,
                               const qllm_rows *in, block_out out)
{
    int64_t row = 0;
    float *y = out.y;
    for (; row + LANES_BLOCK_ROWS <= in->m; row += LANES_BLOCK_ROWS) {
        out.y = y + row * out.stride;
        multiply(LANES_BLOCK_ROWS, tiles, b, n, in->x + row * in->stride + first, in->stride, &out);
    }
    for (; LANES_BLOCK_ROWS > 2 && row + 2 <= in->m; row += 2) {
        out.y = y + row * out.stride;
        multiply(LANES_BLOCK_ROWS > 2 ? 2 : 1, tiles, b, n, in->x + row * in->stride + first,
                 in->stride, &out);
    }
    for (; row < in->m; row++) {
        out.y = y + row * out.stride;
        multiply(1, tiles, b, n, in->x + row * in->stride + first, in->stride, &out);
    }
}

QLLM_INLINE void block_tiles(qllm_layout kind, bool nested, const int tiles,
                             const qllm_packed *packed, const float *bias, const qllm_rows *in,
                             int64_t tile, float *y, int64_t y_stride)
{
    block b;
    block_out out = {.y = y + tile * QLLM_TILE_ROWS, .stride = y_stride};
    for (int t = 0; t < tiles; t++) {
        int64_t left = packed->rows - (tile + t) * QLLM_TILE_ROWS;
        out.width[t] = left < QLLM_TILE_ROWS ? left : QLLM_TILE_ROWS;
    }
    for (int64_t first = 0; first < packed->cols; first += BLOCK_COLUMNS) {
        int64_t left = packed->cols - first, n = left < BLOCK_COLUMNS ? left : BLOCK_COLUMNS;
        for (int t = 0; t < tiles; t++)
            decode_tile(kind, nested, packed, tile + t, first, n, &b, t);
        out.fresh = first == 0;
        out.bias = bias != NULL && left <= BLOCK_COLUMNS ? bias + tile * QLLM_TILE_ROWS : NULL;
        multiply_rows(tiles, &b, first, n, in, out);
    }
}

/* A matrix without columns: nothing but the bias. */
static void write_bias(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                       int64_t tile, float *y, int64_t y_stride)
{
    int64_t first = tile * QLLM_TILE_ROWS, end = first + QLLM_TILE_ROWS;
    end = end < packed->rows ? end : packed->rows;
    for (int64_t r = 0; r < in->m; r++)
        for (int64_t o = first; o < end; o++)
            y[r * y_stride + o] = bias != NULL ? 0.0f + bias[o] : 0.0f;
}

/* The kernel of one layout over tiles [begin, end). */
QLLM_INLINE void linear_layout(qllm_layout kind, bool nested, const qllm_packed *packed,
                               const float *bias, const qllm_rows *in, int64_t begin, int64_t end,
                               float *y, int64_t y_stride)
{
    int64_t tile = begin;
    if (packed->cols == 0)
        for (; tile < end; tile++)
            write_bias(packed, bias, in, tile, y, y_stride);
    if (in->m <= FEW_ROWS && kind != QLLM_LAYOUT_BYTES)
        for (; tile < end; tile++)
            fused(kind, nested, packed, bias, in, tile, y, y_stride);
    for (; tile + LANES_BLOCK_TILES <= end; tile += LANES_BLOCK_TILES)
        block_tiles(kind, nested, LANES_BLOCK_TILES, packed, bias, in, tile, y, y_stride);
    for (; tile < end; tile++)
        block_tiles(kind, nested, 1, packed, bias, in, tile, y, y_stride);
}

#endif
