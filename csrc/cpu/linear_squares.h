/* Weights that lie in memory as squares (packed_layout.h), bf16 and int8, by panels of x in the
 * matrix units (AMX).  A step is a square of weights and one of x: 32 columns of bf16, 64 of int8.
 *
 *   up to two panels: one tile after the other, each read once: bound by memory
 *   more: a pass takes some panels and a strip of columns, of which x stays in the second-level
 *         cache while all tiles use it, two panels by two tiles at a time
 *
 * Between strips, sums wait in y (int32 sums in its memory).  Their order is that of the columns
 * whatever the strips are.  Included by linear_bf16_avx512amx.c and linear_int8_avx512amx.c after
 * SQUARES_DOT(sum, x, weights), which names their instruction. */
#ifndef QLLM_CPU_LINEAR_SQUARES_H
#define QLLM_CPU_LINEAR_SQUARES_H

#include <string.h>

#include "cpu/cpu_ops.h"
#include "cpu/packed_layout.h"
#include "cpu/squares.h"

enum {
    PANELS = 2, TILES = 2,  /* at a time */
    PASS_ROWS = 192,
    PASS_BYTES = 768 << 10, /* of x */
    STRIP_STEPS = 64,       /* with more, squares of weights would take the place of x */
    STREAM_AHEAD = 3072     /* bytes; nearer than of other kernels, which take less at a time */
};

typedef struct squares_job {
    const qllm_packed *packed;
    const float *bias;
    const qllm_rows *in;
    float *y;
    int64_t y_stride;
    int64_t steps;       /* of a row */
    int64_t first, last; /* steps of the strip */
    int64_t row, end;    /* rows of the pass: whole panels but for the last */
} squares_job;

/* Some squares of one tile or panel, and how far it is to the next tile or panel. */
typedef struct squares_at {
    const uint8_t *at;
    int64_t next;
} squares_at;

/* Lines to ask for: how many with each square of each tile, and how far behind it they lie. */
typedef struct squares_ahead {
    int64_t distance, lines;
} squares_ahead;

/* y of row `row` and the outputs of a tile from their sums (16), for which int8 has int32. */
static void finish_row(const squares_job *job, int64_t tile, int64_t row, const float *sums);

/* Squares 0 to 3 += `steps` squares of `panels` panels by those of `tiles` tiles.  Products with
 * the same weights follow one another, since weights take 16 cycles to change. */
QLLM_INLINE void add_squares(const int panels, const int tiles, squares_at x, squares_at w,
                             int64_t steps, int64_t x_step, squares_ahead ahead)
{
    for (int64_t i = 0; i < steps; i++, x.at += x_step, w.at += SQUARE) {
        SQUARE_LOAD(4, w.at, QLLM_LINE);
        SQUARE_LOAD(6, x.at, QLLM_LINE);
        SQUARES_DOT(0, 6, 4);
        if (panels > 1) {
            SQUARE_LOAD(7, x.at + x.next, QLLM_LINE);
            SQUARES_DOT(2, 7, 4);
        }
        if (tiles > 1) {
            SQUARE_LOAD(5, w.at + w.next, QLLM_LINE);
            SQUARES_DOT(1, 6, 5);
        }
        if (panels > 1 && tiles > 1)
            SQUARES_DOT(3, 7, 5);
        for (int64_t line = 0; line < ahead.lines; line++)
            for (int t = 0; t < tiles; t++)
                __builtin_prefetch(w.at + t * w.next + ahead.distance + line * QLLM_LINE, 0, 2);
    }
}

/* Where the sums of one panel and one tile come from and go to: y itself, or a copy at the end of a
 * row and where y has fewer rows or outputs than a square. */
typedef struct sums_place {
    _Alignas(64) float copy[SQUARE_LINES][16];
    float *y, *from, *to;
    int64_t from_stride, to_stride; /* bytes */
    int64_t rows, outputs;          /* of y */
} sums_place;

static void find_sums(const squares_job *job, int64_t row, int64_t tile, sums_place *place)
{
    int64_t left = job->in->m - row, y_stride = job->y_stride;
    float *y = job->y + row * y_stride + tile * QLLM_TILE_ROWS;
    bool end = job->last == job->steps;
    place->y = y;
    place->rows = left < job->in->panel ? left : job->in->panel;
    place->outputs = qllm_tile_outputs(job->packed, tile);
    bool whole = place->rows == job->in->panel && place->outputs == QLLM_TILE_ROWS;
    place->from = whole ? y : place->copy[0];
    place->from_stride = whole ? y_stride * (int64_t)sizeof *y : QLLM_LINE;
    place->to = whole && !end ? y : place->copy[0];
    place->to_stride = whole && !end ? y_stride * (int64_t)sizeof *y : QLLM_LINE;
    for (int64_t r = 0; !whole && job->first > 0 && r < place->rows; r++)
        lanes_store(place->copy[r], lanes_load_n(y + r * y_stride, place->outputs));
}

static void leave_sums(const squares_job *job, int64_t row, int64_t tile, const sums_place *place)
{
    for (int64_t r = 0; place->to != place->y && r < place->rows; r++)
        if (job->last == job->steps)
            finish_row(job, tile, row + r, place->copy[r]);
        else
            lanes_store_n(place->y + r * job->y_stride, lanes_load(place->copy[r]),
                          place->outputs);
}

#define SUMS_ZERO(square, p, t) SQUARE_ZERO(square)
#define SUMS_LOAD(square, p, t) SQUARE_LOAD(square, sums[p][t].from, sums[p][t].from_stride)
#define SUMS_STORE(square, p, t) SQUARE_STORE_LINES(square, sums[p][t].to, sums[p][t].to_stride)
#define SUMS_EACH(panels, tiles, DO)                                                              \
    do {                                                                                          \
        DO(0, 0, 0);                                                                              \
        if ((tiles) > 1)                                                                          \
            DO(1, 0, 1);                                                                          \
        if ((panels) > 1)                                                                         \
            DO(2, 1, 0);                                                                          \
        if ((panels) > 1 && (tiles) > 1)                                                          \
            DO(3, 1, 1);                                                                          \
    } while (0)

/* The strip of the job: panels from row `row` on by tiles from `tile` on.  `tails`: the last
 * squares of these tiles where they are short and the strip ends with them, else NULL. */
QLLM_INLINE void multiply_squares(const int panels, const int tiles, const squares_job *job,
                                  int64_t row, int64_t tile, const uint8_t (*tails)[SQUARE],
                                  squares_ahead ahead)
{
    sums_place sums[PANELS][TILES];
    int64_t stride = job->in->q_stride, x_step = job->in->panel * QLLM_LINE;
    int64_t steps = job->last - job->first - (tails != NULL);
    squares_at x = {(const uint8_t *)job->in->q + row * stride + job->first * x_step,
                    job->in->panel * stride};
    squares_at w = {qllm_packed_tile(job->packed, tile) + job->first * SQUARE,
                    job->packed->tile_bytes};
    for (int p = 0; p < panels; p++)
        for (int t = 0; t < tiles; t++)
            find_sums(job, row + p * job->in->panel, tile + t, &sums[p][t]);
    if (job->first == 0)
        SUMS_EACH(panels, tiles, SUMS_ZERO);
    else
        SUMS_EACH(panels, tiles, SUMS_LOAD);
    add_squares(panels, tiles, x, w, steps, x_step, ahead);
    if (tails != NULL) {
        squares_at last = {x.at + steps * x_step, x.next}, padded = {tails[0], SQUARE};
        add_squares(panels, tiles, last, padded, 1, x_step, (squares_ahead){0, 0});
    }
    SUMS_EACH(panels, tiles, SUMS_STORE);
    for (int p = 0; p < panels; p++)
        for (int t = 0; t < tiles; t++)
            leave_sums(job, row + p * job->in->panel, tile + t, &sums[p][t]);
}

/* The last squares of some tiles with zeros behind their lines. */
static void copy_tails(const qllm_packed *packed, int64_t tile, int tiles, int64_t steps,
                       uint8_t (*tails)[SQUARE])
{
    int64_t begin = (steps - 1) * SQUARE, bytes = packed->tile_bytes - begin;
    memset(tails, 0, (size_t)tiles * SQUARE);
    for (int t = 0; t < tiles; t++)
        memcpy(tails[t], qllm_packed_tile(packed, tile + t) + begin, (size_t)bytes);
}

/* All panels of the pass by `tiles` tiles. */
QLLM_INLINE void multiply_tiles(const int tiles, const squares_job *job, int64_t tile)
{
    _Alignas(64) uint8_t copies[TILES][SQUARE];
    const uint8_t(*tails)[SQUARE] = NULL;
    int64_t panel = job->in->panel, row = job->row, rows = job->end - row;
    squares_ahead ahead = {STREAM_AHEAD, SQUARE_LINES};
    if (job->last == job->steps && job->packed->tile_bytes % SQUARE != 0) {
        copy_tails(job->packed, tile, tiles, job->steps, copies);
        tails = (const uint8_t(*)[SQUARE])copies;
    }
    if (rows > PANELS * panel) { /* the next tiles: a part of each square by each of the panels */
        int64_t turns = (rows + PANELS * panel - 1) / (PANELS * panel);
        ahead.lines = (SQUARE_LINES + turns - 1) / turns;
        ahead.distance = tiles * job->packed->tile_bytes;
    }
    for (; row + panel < job->end; row += PANELS * panel) {
        multiply_squares(PANELS, tiles, job, row, tile, tails, ahead);
        ahead.distance += ahead.lines * QLLM_LINE;
    }
    if (row < job->end)
        multiply_squares(1, tiles, job, row, tile, tails, ahead);
}

/* All panels of the pass by tiles [begin, end), two of them at a time where they are used often. */
static void multiply_pass(const squares_job *job, int64_t begin, int64_t end)
{
    int64_t tile = begin;
    for (; job->end - job->row > PANELS * job->in->panel && tile + TILES <= end; tile += TILES)
        multiply_tiles(TILES, job, tile);
    for (; tile < end; tile++)
        multiply_tiles(1, job, tile);
}

/* n in equal parts of at most `most`. */
static int64_t equal_part(int64_t n, int64_t most)
{
    int64_t parts = (n + most - 1) / most;
    return n > most ? (n + parts - 1) / parts : n;
}

/* Rows of `steps` steps by tiles [begin, end). */
static void linear_squares(squares_job *job, int64_t begin, int64_t end)
{
    int64_t m = job->in->m, both = PANELS * job->in->panel, strip;
    int64_t rows = equal_part((m + both - 1) / both, PASS_ROWS / both) * both;
    int64_t most = PASS_BYTES / (rows * QLLM_LINE);
    if (m > both && most > STRIP_STEPS)
        most = STRIP_STEPS;
    strip = equal_part(job->steps, most);
    squares_open(job->in->panel, QLLM_LINE);
    for (job->row = 0; job->row < m; job->row = job->end) {
        job->end = m - job->row < rows ? m : job->row + rows;
        job->last = 0;
        do { /* once where there is no column */
            job->first = job->last;
            job->last = job->steps - job->first < strip ? job->steps : job->first + strip;
            multiply_pass(job, begin, end);
        } while (job->last < job->steps);
    }
    squares_close();
}

#endif
