/* The linear kernels for float-valued weights, written once on top of sixteen lanes = the 16 output
 * rows of a tile.  Included by linear_<set>.c after its lanes_<set>.h.
 *
 * The order of summation is that of core/linear_ref.h whatever the kernel: lanes are outputs, so
 * one chain per group of 32 columns and one chain across groups is what a lane computes in any
 * case.  Speed comes from independent chains side by side: groups, rows of x, tiles.
 *
 *   fused:  few rows of x, four at a time; codes are decoded in registers, once for these four
 *   block:  more rows; BLOCK_COLUMNS columns of a few tiles are decoded into a small buffer, which
 *           PASS_ROWS rows then use.  There is no other copy of decoded weights anywhere. */
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
    BLOCK_COLUMNS = QLLM_X_COLUMNS,
    BLOCK_GROUPS = BLOCK_COLUMNS / QLLM_GROUP,
    PASS_ROWS = 43 * QLLM_X_PANEL, /* of x; their outputs by some tiles are in one piece */
    PASS_BYTES = 1 << 20           /* of x stay in the second-level cache while all tiles use
                                      them */
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
    LANES_UNROLL
    for (int m = 0; m < rows; m++)
        p[m] = lanes_zero();
    for (int64_t k = first; k < cols; k++) {
        lanes w = weight_at(kind, s->base + k / QLLM_STEP * step_bytes(kind), (int)(k % QLLM_STEP),
                            table);
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            p[m] = lanes_fma(w, lanes_set1(x[m][k]), p[m]);
    }
    if (first < cols) {
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            y[m] = lanes_add(y[m], p[m]);
    }
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
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(packed, tile);
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

/* What all calls of the register block for some tiles and columns share. */
typedef struct block_job {
    const block *weights;
    int64_t columns;
    bool fresh;       /* the first columns: y starts at 0 */
    const float *ask; /* outputs of row 0 by the next tiles, which are asked for meanwhile, or
                         NULL */
    int64_t ask_stride;
} block_job;

/* Outputs of the rows of a pass for some tiles, in one piece: in a matrix they lie far apart, and
 * often in the same places of a cache. */
typedef struct strip {
    _Alignas(64) float y[PASS_ROWS][LANES_BLOCK_TILES][16];
} strip;

/* p += column k, for `rows` rows of a panel of `width` rows, from x on. */
QLLM_INLINE void add_column(const int rows, const int tiles, const block *b, const float *x,
                            int64_t width, int64_t k, lanes (*p)[LANES_BLOCK_TILES])
{
    lanes w[LANES_BLOCK_TILES];
    LANES_UNROLL
    for (int t = 0; t < tiles; t++)
        w[t] = lanes_load(b->w[t] + k * 16);
    LANES_UNROLL
    for (int r = 0; r < rows; r++) {
        lanes value = lanes_set1(x[k * width + r]);
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            p[r][t] = lanes_add_product(p[r][t], w[t], value);
    }
}

/* p = the sums of a group of columns from k on, or of what is left of it. */
QLLM_INLINE void sum_group(const int rows, const int tiles, const block_job *job, const float *x,
                           int64_t width, int64_t k, lanes (*p)[LANES_BLOCK_TILES])
{
    int64_t end = job->columns - k < QLLM_GROUP ? job->columns : k + QLLM_GROUP;
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            p[r][t] = lanes_zero();
    if (rows == LANES_BLOCK_ROWS && end - k == QLLM_GROUP) {
        /* all of it: the end of a loop of 32 turns would be guessed wrong */
        LANES_UNROLL_GROUP
        for (int j = 0; j < QLLM_GROUP; j++)
            add_column(rows, tiles, job->weights, x, width, k + j, p);
    } else {
        for (; k < end; k++)
            add_column(rows, tiles, job->weights, x, width, k, p);
    }
}

/* y += the columns of the job, for `rows` rows of a panel of `width` rows, from x on, and `tiles`
 * tiles; y stays in registers where the set has enough of them. */
QLLM_INLINE void block_rows(const int rows, const int tiles, const block_job *shared,
                            const float *x, int64_t width, float (*out)[LANES_BLOCK_TILES][16])
{
    const block_job job = *shared;
    if (rows == QLLM_X_PANEL)
        width = QLLM_X_PANEL; /* a constant */
    lanes y[LANES_BLOCK_ROWS][LANES_BLOCK_TILES];
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            y[r][t] = job.fresh ? lanes_zero() : lanes_load(out[r][t]);
    for (int64_t g = 0, k = 0; k < job.columns; g++, k += QLLM_GROUP) {
        lanes p[LANES_BLOCK_ROWS][LANES_BLOCK_TILES];
        sum_group(rows, tiles, &job, x, width, k, p);
        LANES_UNROLL
        for (int t = 0; t < tiles; t++) {
            lanes scale = lanes_load(job.weights->scales[g][t]);
            LANES_UNROLL
            for (int r = 0; r < rows; r++)
                y[r][t] = lanes_fma(scale, p[r][t], y[r][t]);
        }
    }
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            lanes_store(out[r][t], y[r][t]);
}

/* Functions of their own, whatever the layout: in the middle of a long one gcc 12 spills. */
typedef void block_rows_kernel(const block_job *job, const float *x, int64_t width,
                               float (*y)[LANES_BLOCK_TILES][16]);
#define BLOCK_ROWS_INSTANCE(name, rows, tiles)                                                    \
    static __attribute__((noinline)) void name(const block_job *job, const float *x,              \
                                               int64_t width,                                     \
                                               float (*y)[LANES_BLOCK_TILES][16])                 \
    {                                                                                             \
        block_rows(rows, tiles, job, x, width, y);                                                \
    }

enum { BLOCK_ROWS_FEW = LANES_BLOCK_ROWS > 2 ? 2 : 1 };

BLOCK_ROWS_INSTANCE(block_rows_wide, LANES_BLOCK_ROWS, LANES_BLOCK_TILES)
BLOCK_ROWS_INSTANCE(block_few_wide, BLOCK_ROWS_FEW, LANES_BLOCK_TILES)
BLOCK_ROWS_INSTANCE(block_one_wide, 1, LANES_BLOCK_TILES)
BLOCK_ROWS_INSTANCE(block_rows_narrow, LANES_BLOCK_ROWS, 1)
BLOCK_ROWS_INSTANCE(block_few_narrow, BLOCK_ROWS_FEW, 1)
BLOCK_ROWS_INSTANCE(block_one_narrow, 1, 1)

/* The rows [row, end) of x, whole panels but for the last of all, and the columns of the job, which
 * begin with `first`. */
QLLM_INLINE void block_all_rows(const int tiles, const block_job *job, const qllm_rows *in,
                                int64_t first, int64_t row, int64_t end, strip *s)
{
    block_rows_kernel *all = tiles > 1 ? block_rows_wide : block_rows_narrow;
    block_rows_kernel *few = tiles > 1 ? block_few_wide : block_few_narrow;
    block_rows_kernel *one = tiles > 1 ? block_one_wide : block_one_narrow;
    for (int64_t f = row; f < end; f += QLLM_X_PANEL) {
        int64_t n = end - f < QLLM_X_PANEL ? end - f : QLLM_X_PANEL, r = 0;
        const float *x = (const float *)in->q + qllm_x_panel(in->m, in->cols, f, first);
        for (int64_t i = f; job->ask != NULL && i < f + n; i++)
            for (int t = 0; t < tiles; t++)
                __builtin_prefetch(job->ask + i * job->ask_stride + 16 * t, 1, 2);
        for (; r + LANES_BLOCK_ROWS <= n; r += LANES_BLOCK_ROWS)
            all(job, x + r, n, s->y + f - row + r);
        for (; r + BLOCK_ROWS_FEW <= n; r += BLOCK_ROWS_FEW)
            few(job, x + r, n, s->y + f - row + r);
        for (; r < n; r++)
            one(job, x + r, n, s->y + f - row + r);
    }
}

QLLM_INLINE void load_strip(const int tiles, const qllm_packed *packed, int64_t tile,
                            const float *y, int64_t y_stride, int64_t rows, strip *s)
{
    for (int64_t r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++)
            lanes_store(s->y[r][t], lanes_load_n(y + r * y_stride + 16 * (tile + t),
                                                 qllm_tile_outputs(packed, tile + t)));
}

QLLM_INLINE void store_strip(const int tiles, const qllm_packed *packed, int64_t tile,
                             const float *bias, int64_t rows, const strip *s, float *y,
                             int64_t y_stride)
{
    for (int64_t r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) {
            int64_t o = 16 * (tile + t), n = qllm_tile_outputs(packed, tile + t);
            lanes value = lanes_load(s->y[r][t]);
            if (bias != NULL)
                value = lanes_add(value, lanes_load_n(bias + o, n));
            lanes_store_n(y + r * y_stride + o, value, n);
        }
}

/* Rows [row, end) of x by `tiles` tiles, the columns [first, last). */
QLLM_INLINE void block_tiles(qllm_layout kind, bool nested, const int tiles,
                             const qllm_packed *packed, const float *bias, const qllm_rows *in,
                             int64_t tile, int64_t row, int64_t end, int64_t first, int64_t last,
                             float *y, int64_t y_stride)
{
    block b;
    strip s;
    bool ahead = tile + tiles < packed->tiles;
    block_job job = {.weights = &b, .ask_stride = y_stride};
    if (first > 0)
        load_strip(tiles, packed, tile, y + row * y_stride, y_stride, end - row, &s);
    for (int64_t at = first; at < last; at += job.columns) {
        job.columns = last - at < BLOCK_COLUMNS ? last - at : BLOCK_COLUMNS;
        job.fresh = at == 0;
        job.ask = at + job.columns == last && ahead ? y + 16 * (tile + tiles) : NULL;
        for (int t = 0; t < tiles; t++)
            decode_tile(kind, nested, packed, tile + t, at, job.columns, &b, t);
        block_all_rows(tiles, &job, in, at, row, end, &s);
    }
    store_strip(tiles, packed, tile, last == packed->cols ? bias : NULL, end - row, &s,
                y + row * y_stride, y_stride);
}

/* All tiles use some columns of x while these are in the second-level cache. */
QLLM_INLINE void blocks(qllm_layout kind, bool nested, const qllm_packed *packed,
                        const float *bias, const qllm_rows *in, int64_t begin, int64_t end,
                        float *y, int64_t y_stride)
{
    int64_t passes = (in->m + PASS_ROWS - 1) / PASS_ROWS;
    int64_t panels = ((in->m + passes - 1) / passes + QLLM_X_PANEL - 1) / QLLM_X_PANEL;
    int64_t rows = panels * QLLM_X_PANEL;
    int64_t most = PASS_BYTES / (rows * (int64_t)sizeof(float)) / BLOCK_COLUMNS * BLOCK_COLUMNS;
    for (int64_t row = 0; row < in->m; row += rows) {
        int64_t stop = row + rows < in->m ? row + rows : in->m;
        for (int64_t first = 0, last; first < packed->cols; first = last) {
            int64_t tile = begin;
            last = first + most < packed->cols ? first + most : packed->cols;
            for (; tile + LANES_BLOCK_TILES <= end; tile += LANES_BLOCK_TILES)
                block_tiles(kind, nested, LANES_BLOCK_TILES, packed, bias, in, tile, row, stop,
                            first, last, y, y_stride);
            for (; tile < end; tile++)
                block_tiles(kind, nested, 1, packed, bias, in, tile, row, stop, first, last, y,
                            y_stride);
        }
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

/* The kernel of one layout over tiles [begin, end); `many` is its `blocks`. */
QLLM_INLINE void linear_layout(qllm_layout kind, bool nested, qllm_linear_kernel *many,
                               const qllm_packed *packed, const float *bias, const qllm_rows *in,
                               int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t tile = begin;
    if (packed->cols == 0)
        for (; tile < end; tile++)
            write_bias(packed, bias, in, tile, y, y_stride);
    else if (in->m > QLLM_FEW_ROWS || kind == QLLM_LAYOUT_BYTES)
        many(packed, bias, in, begin, end, y, y_stride);
    else
        for (; tile < end; tile++)
            fused(kind, nested, packed, bias, in, tile, y, y_stride);
}

#endif
