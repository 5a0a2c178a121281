/* Tier bf16: bf16 weights times x rounded to bf16, two products an instruction.  Everything else is
 * that of the set below.
 *
 *   stream:  up to 4 rows of x, one tile after the other: bound by memory
 *   block:   more rows; BLOCK_GROUPS groups of 4 tiles stay in the cache while all rows use them */
#define LANES_ISA "avx512bf16"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/linear_names.h"

enum {
    STREAM_ROWS = 4,
    BLOCK_ROWS = 6,    /* register block: 24 sums, 4 weights and one pair of x */
    BLOCK_TILES = 4,
    BLOCK_GROUPS = 16,
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

static int64_t outputs_of(const qllm_packed *packed, int64_t tile)
{
    int64_t left = packed->rows - tile * QLLM_TILE_ROWS;
    return left < QLLM_TILE_ROWS ? left : QLLM_TILE_ROWS;
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
    int64_t o = tile * QLLM_TILE_ROWS, n = outputs_of(packed, tile);
    LANES_UNROLL
    for (int m = 0; m < rows; m++) {
        lanes value = bias != NULL ? lanes_add(y[m], lanes_load_n(bias + o, n)) : y[m];
        lanes_store_n(out + (row + m) * out_stride + o, value, n);
    }
}

/* Where one call of the register block writes. */
typedef struct block_out {
    float *y;
    int64_t stride;
    int64_t width[BLOCK_TILES];
    const float *bias; /* with the last group of a row; else NULL */
} block_out;

/* y += group g for `rows` rows of x and `tiles` tiles; the first group starts at 0. */
QLLM_INLINE void block_group(const int rows, const int tiles, const qllm_packed *packed,
                             const uint8_t *base, int64_t g, const uint8_t *q, int64_t q_stride,
                             const block_out *out)
{
    lanes p[BLOCK_ROWS][BLOCK_TILES];
    int64_t lines = lines_of(packed, g);
    base += g * GROUP_LINES * QLLM_LINE;
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            p[r][t] = lanes_zero();
    for (int64_t line = 0; line < lines; line++) {
        ilanes w[BLOCK_TILES];
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            w[t] = ilanes_load(base + t * packed->tile_bytes + line * QLLM_LINE);
        LANES_UNROLL
        for (int r = 0; r < rows; r++) {
            ilanes x = pair_at((const uint16_t *)(q + r * q_stride) + g * QLLM_GROUP + 2 * line);
            LANES_UNROLL
            for (int t = 0; t < tiles; t++)
                p[r][t] = dot_pair(p[r][t], w[t], x);
        }
    }
    LANES_UNROLL
    for (int r = 0; r < rows; r++)
        LANES_UNROLL
        for (int t = 0; t < tiles; t++) {
            float *y = out->y + r * out->stride + 16 * t;
            lanes sum = g > 0 ? lanes_load_n(y, out->width[t]) : lanes_zero();
            sum = lanes_add(sum, p[r][t]);
            if (out->bias != NULL)
                sum = lanes_add(sum, lanes_load_n(out->bias + 16 * t, out->width[t]));
            lanes_store_n(y, sum, out->width[t]);
        }
}

QLLM_INLINE void block_rows(const int rows, const int tiles, const qllm_packed *packed,
                            const float *bias, const qllm_rows *in, int64_t tile, int64_t row,
                            int64_t first, int64_t last, float *y, int64_t y_stride)
{
    const uint8_t *q = (const uint8_t *)in->q + row * in->q_stride;
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP;
    block_out out = {.y = y + row * y_stride + tile * QLLM_TILE_ROWS, .stride = y_stride};
    for (int t = 0; t < tiles; t++)
        out.width[t] = outputs_of(packed, tile + t);
    for (int64_t g = first; g < last; g++) {
        out.bias = bias != NULL && g + 1 == groups ? bias + tile * QLLM_TILE_ROWS : NULL;
        block_group(rows, tiles, packed, qllm_packed_tile(packed, tile), g, q, in->q_stride, &out);
    }
}

QLLM_INLINE void block_tiles(const int tiles, const qllm_packed *packed, const float *bias,
                             const qllm_rows *in, int64_t tile, float *y, int64_t y_stride)
{
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP;
    for (int64_t first = 0; first < groups; first += BLOCK_GROUPS) {
        int64_t last = first + BLOCK_GROUPS < groups ? first + BLOCK_GROUPS : groups, row = 0;
        for (; row + BLOCK_ROWS <= in->m; row += BLOCK_ROWS)
            block_rows(BLOCK_ROWS, tiles, packed, bias, in, tile, row, first, last, y, y_stride);
        for (; row + 2 <= in->m; row += 2)
            block_rows(2, tiles, packed, bias, in, tile, row, first, last, y, y_stride);
        for (; row < in->m; row++)
            block_rows(1, tiles, packed, bias, in, tile, row, first, last, y, y_stride);
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
    for (; tile + BLOCK_TILES <= end; tile += BLOCK_TILES)
        block_tiles(BLOCK_TILES, packed, bias, in, tile, y, y_stride);
    for (; tile < end; tile++)
        block_tiles(1, packed, bias, in, tile, y, y_stride);
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
