/* Tier bf16: bf16 weights times x rounded to bf16, two products an instruction.  Everything else is
 * that of the set below.
 *
 *   stream:  up to 4 rows of x, one tile after the other: bound by memory
 *   block:   more rows; BLOCK_GROUPS groups of 2 tiles stay in the cache while all rows use them */
#define LANES_ISA "avx512bf16"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/linear_names.h"

enum {
    STREAM_ROWS = 4,
    BLOCK_ROWS = 6,    /* register block: 12 sums, 12 outputs, 2 weights and one pair of x */
    BLOCK_TILES = 2,
    BLOCK_GROUPS = 32,
    PASS_ROWS = 512,   /* rows of x of which so many columns fit into the second-level cache; of
                          fewer rows more columns do */
    GROUP_LINES = QLLM_GROUP / 2 /* lines of two columns */
};

void qllm_bf16_activation_avx512bf16(const float *x, int64_t cols, uint16_t *q)
{
    int64_t i = 0, padded = (cols + QLLM_GROUP - 1) / QLLM_GROUP * QLLM_GROUP;
    for (; i < cols; i += 16) {
        lanes values = lanes_load_n(x + i, cols - i < 16 ? cols - i : 16);
        __m256bh rounded = _mm512_cvtneps_pbh(values);
        memcpy(q + i, &rounded, sizeof rounded);
    }
    memset(q + i, 0, (size_t)(padded > i ? padded - i : 0) * sizeof *q);
}

/* fma(w0, x0, fma(w1, x1, sum)): qllm_bf16_dot.  As an intrinsic, gcc 12 spills the sums. */
QLLM_INLINE lanes dot_pair(lanes sum, ilanes w, ilanes x)
{
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

QLLM_INLINE ilanes pair_at(const uint16_t *q)
{
    int32_t pair;
    memcpy(&pair, q, sizeof pair);
    return ilanes_set1(pair);
}

/* Lines of group g: the last group of a row may have fewer. */
static int64_t lines_of(const qllm_packed *packed, int64_t g)
{
    int64_t all = (packed->cols + QLLM_STEP - 1) / QLLM_STEP * (QLLM_STEP / 2);
    return all - g * GROUP_LINES < GROUP_LINES ? all - g * GROUP_LINES : GROUP_LINES;
}

/* y[m] += a group of `lines` lines from `at` on.  Groups overlap in time by themselves; two of them
 * side by side would read memory in two streams, at half the speed. */
QLLM_INLINE void stream_group(const int rows, int64_t lines, const uint8_t *at,
                              const uint16_t *const *q, lanes *y)
{
    lanes p[STREAM_ROWS];
    LANES_UNROLL
    for (int m = 0; m < rows; m++)
        p[m] = lanes_zero();
    for (int64_t line = 0; line < lines; line++) {
        const uint8_t *from = at + line * QLLM_LINE;
        qllm_prefetch(from);
        ilanes w = ilanes_load(from);
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            p[m] = dot_pair(p[m], w, pair_at(q[m] + 2 * line));
    }
    LANES_UNROLL
    for (int m = 0; m < rows; m++)
        y[m] = lanes_add(y[m], p[m]);
}

QLLM_INLINE void stream_tile(const int rows, const qllm_packed *packed, const float *bias,
                             const qllm_rows *in, int64_t tile, int64_t row, float *out,
                             int64_t out_stride)
{
    const uint8_t *base = qllm_packed_tile(packed, tile);
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP, g = 0;
    const uint16_t *q[STREAM_ROWS];
    lanes y[STREAM_ROWS];
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        q[m] = (const uint16_t *)((const uint8_t *)in->q + (row + m) * in->q_stride);
        y[m] = lanes_zero();
    }
    for (; g < groups; g++) {
        const uint8_t *at = base + g * GROUP_LINES * QLLM_LINE;
        if (g + 1 < groups)
            stream_group(rows, GROUP_LINES, at, q, y);
        else
            stream_group(rows, lines_of(packed, g), at, q, y);
        LANES_UNROLL
        for (int m = 0; m < rows; m++)
            q[m] += QLLM_GROUP;
    }
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(packed, tile);
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        lanes value = bias != NULL ? lanes_add(y[m], lanes_load_n(bias + o, n)) : y[m];
        lanes_store_n(out + (row + m) * out_stride + o, value, n);
    }
}

/* What all calls of the register block for some tiles and columns share. */
typedef struct block_job {
    const uint8_t *w;    /* the first tile, from the first group on */
    int64_t tile_bytes;
    const uint8_t *q;    /* of row 0, from the first group on */
    int64_t q_stride;
    int64_t groups;      /* so many, of which the last has `lines` lines */
    int64_t lines;
    float *y;            /* of row 0, from the first tile on */
    int64_t y_stride;
    int64_t width[BLOCK_TILES]; /* outputs of each tile, 16 but for the last of a matrix */
    bool fresh;          /* the first columns: y starts at 0 */
    const float *bias;   /* for these tiles, with the last columns; else NULL */
} block_job;

/* y += the columns of the job, for `rows` rows of x and `tiles` tiles; y stays in registers.  The
 * job is copied: what is reached through a pointer is loaded again after each store of a vector. */
QLLM_INLINE void block_rows(const int rows, const int tiles, const block_job *shared, int64_t row)
{
    const block_job job = *shared;
    const uint8_t *w = job.w, *q = job.q + row * job.q_stride;
    float *out = job.y + row * job.y_stride;
    lanes y[BLOCK_ROWS][BLOCK_TILES];
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            y[r][t] = lanes_zero();
    if (!job.fresh) {
        LANES_UNROLL
        for (int r = 0; r < rows; r++)
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                y[r][t] = lanes_load_n(out + r * job.y_stride + 16 * t, job.width[t]);
    }
    for (int64_t g = 0; g < job.groups; g++) {
        lanes p[BLOCK_ROWS][BLOCK_TILES];
        int64_t lines = g + 1 < job.groups ? GROUP_LINES : job.lines;
        LANES_UNROLL
        for (int r = 0; r < rows; r++)
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                p[r][t] = lanes_zero();
        for (int64_t line = 0; line < lines; line++) {
            ilanes pairs[BLOCK_TILES];
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                pairs[t] = ilanes_load(w + t * job.tile_bytes);
            LANES_UNROLL
            for (int r = 0; r < rows; r++) {
                ilanes x = pair_at((const uint16_t *)(q + r * job.q_stride));
                LANES_UNROLL
                for (int t = 0; t < tiles; t++)
                    p[r][t] = dot_pair(p[r][t], pairs[t], x);
            }
            w += QLLM_LINE;
            q += sizeof(int32_t);
        }
        LANES_UNROLL
        for (int r = 0; r < rows; r++)
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                y[r][t] = lanes_add(y[r][t], p[r][t]);
    }
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++) {
            if (job.bias != NULL)
                y[r][t] = lanes_add(y[r][t], lanes_load_n(job.bias + 16 * t, job.width[t]));
            lanes_store_n(out + r * job.y_stride + 16 * t, y[r][t], job.width[t]);
        }
}

/* Rows [row, end) of x by `tiles` tiles, the groups [first, last). */
QLLM_INLINE void block_tiles(const int tiles, const qllm_packed *packed, const float *bias,
                             const qllm_rows *in, int64_t tile, int64_t row, int64_t end,
                             int64_t first, int64_t last, float *y, int64_t y_stride)
{
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP, o = tile * QLLM_TILE_ROWS;
    block_job job = {.w = qllm_packed_tile(packed, tile) + first * GROUP_LINES * QLLM_LINE,
                     .tile_bytes = packed->tile_bytes,
                     .q = (const uint8_t *)in->q + first * QLLM_GROUP * (int64_t)sizeof(uint16_t),
                     .q_stride = in->q_stride, .groups = last - first,
                     .lines = lines_of(packed, last - 1), .y = y + o, .y_stride = y_stride,
                     .fresh = first == 0,
                     .bias = bias != NULL && last == groups ? bias + o : NULL};
    for (int t = 0; t < tiles; t++)
        job.width[t] = qllm_tile_outputs(packed, tile + t);
    for (; row + BLOCK_ROWS <= end; row += BLOCK_ROWS)
        block_rows(BLOCK_ROWS, tiles, &job, row);
    for (; row + 2 <= end; row += 2)
        block_rows(2, tiles, &job, row);
    for (; row < end; row++)
        block_rows(1, tiles, &job, row);
}

/* All tiles use some columns of x while these are in the second-level cache. */
static void block(const qllm_packed *packed, const float *bias, const qllm_rows *in, int64_t begin,
                  int64_t end, float *y, int64_t y_stride)
{
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP;
    for (int64_t row = 0, stop; row < in->m; row = stop) {
        stop = row + PASS_ROWS < in->m ? row + PASS_ROWS : in->m;
        int64_t most = BLOCK_GROUPS * PASS_ROWS / (stop - row);
        for (int64_t first = 0, last; first < groups; first = last) {
            int64_t tile = begin;
            last = first + most < groups ? first + most : groups;
            for (; tile + BLOCK_TILES <= end; tile += BLOCK_TILES)
                block_tiles(BLOCK_TILES, packed, bias, in, tile, row, stop, first, last, y,
                            y_stride);
            for (; tile < end; tile++)
                block_tiles(1, packed, bias, in, tile, row, stop, first, last, y, y_stride);
        }
    }
}

static void stream(const qllm_packed *packed, const float *bias, const qllm_rows *in, int64_t tile,
                   float *y, int64_t y_stride)
{
    int64_t row = 0;
    for (; row + 4 <= in->m; row += 4)
        stream_tile(4, packed, bias, in, tile, row, y, y_stride);
    for (; row + 2 <= in->m; row += 2)
        stream_tile(2, packed, bias, in, tile, row, y, y_stride);
    for (; row < in->m; row++)
        stream_tile(1, packed, bias, in, tile, row, y, y_stride);
}

static void linear_bf16_pairs(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                              int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t tile = begin;
    for (; in->m <= STREAM_ROWS && tile < end; tile++)
        stream(packed, bias, in, tile, y, y_stride);
    if (tile < end)
        block(packed, bias, in, tile, end, y, y_stride);
}

void qllm_linear_avx512bf16(const qllm_packed *weight, const float *bias, const qllm_rows *rows,
                            int64_t tile_begin, int64_t tile_end, float *y, int64_t y_stride)
{
    if (rows->tier == QLLM_TIER_BF16)
        linear_bf16_pairs(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else
        qllm_linear_avx512vbmi(weight, bias, rows, tile_begin, tile_end, y, y_stride);
}

const char *qllm_linear_name_avx512bf16(const qllm_packed *weight, qllm_tier tier, int64_t m)
{
    return linear_any_name(weight, tier, m);
}
