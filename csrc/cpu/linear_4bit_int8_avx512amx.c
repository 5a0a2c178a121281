/* Tier int8: 4-bit weights by int8 rows in the matrix units (AMX).
 *
 * The sum of a block is exact in int32, whichever way it is taken.  x comes in panels of up to 16
 * rows (qllm_cpu_ops.panel_activation), a square of each block.  Some blocks of a tile of weights
 * are decoded at a time, for all panels. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "cpu/kernels.h"
#include "cpu/squares.h"
#include "cpu/tile_stream.h"

enum {
    STRIP_BLOCKS = 32,       /* blocks that are decoded at a time */
    PASS_BYTES = 1 << 20,    /* of x stay in the second-level cache while all tiles use them */
    PASS_ROWS = 256
};

/* Some blocks of one tile of weights. */
typedef struct strip {
    _Alignas(64) uint8_t codes[STRIP_BLOCKS][SQUARE]; /* line i: columns 4 i to 4 i + 3 */
    _Alignas(64) float absmax[STRIP_BLOCKS][QLLM_TILE_ROWS];
} strip;

/* The 16 codes in bytes, in every quarter, since vpermb reads six bits of an index. */
static __m512i table_of(const qllm_packed *packed)
{
    __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)packed->codes8);
    return _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(words));
}

QLLM_INLINE void decode_block(__m512i table, const uint8_t *at, int64_t lines, uint8_t *to)
{
    for (int64_t line = 0; line < lines; line++, at += QLLM_LINE, to += 2 * QLLM_LINE) {
        __m512i lower = _mm512_loadu_si512(at);
        __m512i upper = _mm512_srli_epi16(lower, 4);
        qllm_prefetch_codes(at);
        _mm512_store_si512(to, _mm512_permutexvar_epi8(lower, table));
        _mm512_store_si512(to + QLLM_LINE, _mm512_permutexvar_epi8(upper, table));
    }
}

/* What all calls for some columns and rows share. */
typedef struct panel_job {
    const qllm_packed *packed;
    const qllm_rows *in;
    const float *bias;
    float *y;
    int64_t y_stride;
    int64_t block, blocks;      /* columns of a block, blocks of a row */
    int64_t first_row, end_row; /* of x: whole panels but for the last */
} panel_job;

static void decode_strip(const bool nested, const panel_job *job, tile_stream *s, int64_t first,
                         int64_t blocks, strip *out)
{
    __m512i table = table_of(job->packed);
    int64_t unit_groups = QLLM_UNIT_BLOCKS * s->block_groups, groups = job->block / QLLM_GROUP;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t g = (first + b) * groups;
        if (nested && (b == 0 || g % unit_groups == 0))
            stream_read_unit(s, g / unit_groups);
        decode_block(table, group_at(QLLM_LAYOUT_BLOCKS, nested, s, g), job->block / QLLM_STEP,
                     out->codes[b]);
        lanes_store(out->absmax[b], scale_at(QLLM_LAYOUT_BLOCKS, nested, s, g));
    }
}

/* The sums of a block of one panel as they leave their square. */
typedef struct square_sums { _Alignas(64) int32_t of[SQUARE_LINES][16]; } square_sums;

/* y[m] += the scaled sums of rows [from, to). */
QLLM_INLINE void add_sums(const int from, const int to, const square_sums *sums, const float *scale,
                          lanes absmax, lanes *y)
{
    LANES_UNROLL
    for (int m = from; m < to; m++)
        y[m] = lanes_fma(lanes_mul(absmax, lanes_set1(scale[m])),
                         lanes_from_int(ilanes_load(sums->of[m])), y[m]);
}

/* Where a panel and a strip are being read. */
typedef struct panel_place {
    const uint8_t *x, *codes;
    const float *scale, *absmax; /* of the block whose sums are added next */
    square_sums *kept, *ready;
} panel_place;

/* One turn: starts the products of block i, stores the sums of block i - 1 and adds those of block
 * i - 2, since a store waits for its products and a load waits for a store that it meets. */
QLLM_INLINE void take_turn(const int rows, const bool start, const bool keep, const bool add,
                           int64_t block, panel_place *at, lanes *y)
{
    const int half = rows / 2;
    lanes absmax = add ? lanes_load(at->absmax) : lanes_zero();
    if (add)
        add_sums(0, half, at->ready, at->scale, absmax, y);
    if (start) {
        SQUARE_LOAD(4, at->codes, QLLM_LINE);
        SQUARE_LOAD(6, at->x, block);
    }
    if (add)
        add_sums(half, half + rows / 4, at->ready, at->scale, absmax, y);
    if (keep)
        SQUARE_STORE(0, at->kept);
    if (start) {
        SQUARE_ZERO(0);
        SQUARE_DOT(ss, 0, 6, 4);
        at->x += rows * block;
        at->codes += SQUARE;
    }
    if (add) {
        add_sums(half + rows / 4, rows, at->ready, at->scale, absmax, y);
        at->scale += rows;
        at->absmax += QLLM_TILE_ROWS;
    }
    square_sums *ready = at->kept;
    at->kept = at->ready;
    at->ready = ready;
}

/* y[m] += `blocks` blocks of a panel. */
QLLM_INLINE void add_blocks(const int rows, int64_t blocks, int64_t block,
                            panel_place at, lanes *y)
{
    square_sums sums[2];
    at.kept = &sums[0];
    at.ready = &sums[1];
    take_turn(rows, true, false, false, block, &at, y);
    if (blocks > 1) {
        take_turn(rows, true, true, false, block, &at, y);
        for (int64_t i = 2; i < blocks; i++)
            take_turn(rows, true, true, true, block, &at, y);
        take_turn(rows, false, true, true, block, &at, y);
    } else {
        take_turn(rows, false, true, false, block, &at, y);
    }
    take_turn(rows, false, false, true, block, &at, y);
}

/* The panel from row `row` on, `blocks` blocks of a strip from block `first` on. */
QLLM_INLINE void multiply_panel(const int rows, const panel_job *job, int64_t row,
                                int64_t tile, int64_t first, int64_t blocks, const strip *w)
{
    lanes y[SQUARE_LINES];
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(job->packed, tile);
    int64_t stride = job->y_stride, valid = job->in->m - row;
    panel_place at = {
        .x = (const uint8_t *)job->in->q + row * job->in->q_stride +
             first * rows * job->block,
        .scale = job->in->scale + row * job->blocks + first * rows,
        .codes = w->codes[0], .absmax = w->absmax[0],
    };
    float *out = job->y + row * stride + o;
    LANES_UNROLL
    for (int m = 0; m < rows; m++)
        y[m] = first > 0 && m < valid ? lanes_load_n(out + m * stride, n) : lanes_zero();
    for (int m = rows; first > 0 && m < 2 * rows && m < valid; m++)
        __builtin_prefetch(out + m * stride, 1, 2);
    add_blocks(rows, blocks, job->block, at, y);
    bool last = first + blocks == job->blocks;
    lanes unit = lanes_set1(job->packed->unit8);
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        if (last)
            y[m] = lanes_mul(y[m], unit);
        if (last && job->bias != NULL)
            y[m] = lanes_add(y[m], lanes_load_n(job->bias + o, n));
        if (m < valid)
            lanes_store_n(out + m * stride, y[m], n);
    }
}

#define PANELS_INSTANCE(rows)                                                                     \
    static __attribute__((noinline)) void panels_of_##rows(                                       \
        const panel_job *job, int64_t tile, int64_t first, int64_t blocks, const strip *w)        \
    {                                                                                             \
        for (int64_t row = job->first_row; row < job->end_row; row += (rows))                     \
            multiply_panel(rows, job, row, tile, first, blocks, w);                               \
    }

PANELS_INSTANCE(8)
PANELS_INSTANCE(12)
PANELS_INSTANCE(16)

typedef void panels_kernel(const panel_job *job, int64_t tile, int64_t first, int64_t blocks,
                           const strip *w);

/* For panels of that many rows, which qllm_panel_rows_avx512amx has chosen. */
static panels_kernel *panels_of(int64_t rows)
{
    return rows == 16 ? panels_of_16 : rows == 12 ? panels_of_12 : panels_of_8;
}

/* All panels of the job by tiles [begin, end): some columns for all tiles, then the next. */
QLLM_INLINE void linear_panels(const bool nested, const panel_job *job,
                               int64_t begin, int64_t end)
{
    panels_kernel *panels = panels_of(job->in->panel);
    int64_t rows = job->end_row - job->first_row;
    int64_t most = PASS_BYTES / (rows * job->block) / STRIP_BLOCKS * STRIP_BLOCKS;
    most = most > STRIP_BLOCKS ? most : STRIP_BLOCKS;
    for (int64_t first = 0, last; first < job->blocks; first = last) {
        last = first + most < job->blocks ? first + most : job->blocks;
        for (int64_t tile = begin; tile < end; tile++) {
            tile_stream s;
            stream_open(&s, job->packed, tile);
            for (int64_t b = first; b < last; b += STRIP_BLOCKS) {
                strip w;
                int64_t blocks = last - b < STRIP_BLOCKS ? last - b : STRIP_BLOCKS;
                decode_strip(nested, job, &s, b, blocks, &w);
                panels(job, tile, b, blocks, &w);
            }
        }
    }
}

void qllm_linear_4bit_int8_avx512amx(const qllm_packed *packed, const float *bias,
                                     const qllm_rows *in, int64_t begin, int64_t end, float *y,
                                     int64_t y_stride)
{
    int64_t block = qllm_activation_block(packed->blocksize), step = PASS_ROWS / in->panel;
    panel_job job = {.packed = packed, .in = in, .bias = bias, .y = y, .y_stride = y_stride,
                     .block = block, .blocks = packed->cols / block};
    squares_open(in->panel, block);
    for (int64_t row = 0; row < in->m; row = job.end_row) {
        job.first_row = row;
        job.end_row = in->m - row < step * in->panel ? in->m : row + step * in->panel;
        if (qllm_packed_nested(packed))
            linear_panels(true, &job, begin, end);
        else
            linear_panels(false, &job, begin, end);
    }
    squares_close();
}
