/* Tier bf16x2: 4-bit weights by x rounded to bf16 in the matrix units (AMX), more than 16 rows.
 *
 * x lies in panels of up to PANEL_SQUARES squares.  The codes of a block of 64 columns are looked
 * up into two squares (of 32: into one), which all squares of a panel follow while they are in
 * their registers.  The sums of a block leave by way of memory, and are scaled and added to the
 * outputs, which wait in the first-level cache. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "core/activation.h"
#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/squares_codes.h"
#include "cpu/tile_stream.h"

enum {
    TILES = 2,             /* that share a square of x while it is in its register */
    PASS_BYTES = 1 << 20,  /* of x stay in the second-level cache while all tiles use them */
    AHEAD = 2,             /* blocks */
    SCALES = 8             /* blocks */
};

typedef float square_sums[SQUARE_LINES][16];

/* What all tiles share: a panel of x and some of its columns. */
typedef struct codes_job {
    const qllm_packed *packed;
    const qllm_rows *in;
    const float *bias;
    float *y;
    int64_t y_stride;
    int64_t row;                 /* of x, the panel's first */
    int64_t squares, rows;       /* the panel's, and how many rows each has */
    int64_t first_block, blocks; /* so many from there on, of qllm_activation_block */
    int64_t all_blocks;          /* of a row */
} codes_job;

/* The weights of the next blocks, and the scales of those too whose sums are on their way.  Blocks
 * are decoded AHEAD of their use, since stores leave for the cache only when all products before
 * them are done. */
typedef struct decoded {
    _Alignas(64) uint8_t w[AHEAD][TILES][2][SQUARE];
    _Alignas(64) float absmax[SCALES][TILES][QLLM_TILE_ROWS];
} decoded;

/* Sums on their way: those of one turn are stored in the next and added in the one after, since a
 * store waits for its products and a load for a store that it meets. */
typedef struct passage {
    _Alignas(64) square_sums sums[TILES];
    square_sums *y;      /* (tiles) outputs that they belong to */
    const float *absmax; /* (tiles, 16) */
} passage;

/* Where the codes of a block lie; its scales go to their place. */
QLLM_INLINE void open_block(const int tiles, const int groups, const bool nested, tile_stream *s,
                            int64_t block, const uint8_t **at, decoded *out)
{
    int64_t g = block * groups;
    LANES_UNROLL
    for (int t = 0; t < tiles; t++) {
        read_unit_if_first(nested, &s[t], g);
        at[t] = group_at(QLLM_LAYOUT_BLOCKS, nested, &s[t], g);
        lanes_store(out->absmax[block % SCALES][t], scale_at(QLLM_LAYOUT_BLOCKS, nested, &s[t], g));
    }
}

/* Lines [begin, end) of a block of every tile. */
QLLM_INLINE void decode_lines(const int tiles, __m512i table, const uint8_t *const *at,
                              int64_t begin, int64_t end, uint8_t (*w)[2][SQUARE])
{
    for (int64_t line = begin; line < end; line++) {
        LANES_UNROLL
        for (int t = 0; t < tiles; t++)
            decode_line(table, at[t] + line * QLLM_LINE, w[t][0] + 4 * line * QLLM_LINE);
    }
}

/* All of them. */
QLLM_INLINE void decode_block(const int tiles, const int groups, __m512i table,
                              const uint8_t *const *at, uint8_t (*w)[2][SQUARE])
{
    LANES_UNROLL
    for (int line = 0; line < groups * SQUARE_CODE_LINES; line++)
        decode_lines(tiles, table, at, line, line + 1, w);
}

/* The weights of a block into their registers. */
QLLM_INLINE void take_weights(const int tiles, const int groups, uint8_t (*w)[2][SQUARE])
{
    SQUARE_LOAD(2, w[0][0], QLLM_LINE);
    if (groups > 1)
        SQUARE_LOAD(3, w[0][1], QLLM_LINE);
    if (tiles > 1)
        SQUARE_LOAD(4, w[1][0], QLLM_LINE);
    if (tiles > 1 && groups > 1)
        SQUARE_LOAD(5, w[1][1], QLLM_LINE);
}

/* y[m] = fma(absmax, sums[m], y[m]) for rows [begin, end). */
QLLM_INLINE void add_sums(const int t, int64_t begin, int64_t end, const passage *at)
{
    lanes absmax = lanes_load(at->absmax + t * QLLM_TILE_ROWS);
    for (int64_t row = begin; row < end; row++)
        lanes_store(at->y[t][row],
                    lanes_fma(absmax, lanes_load(at->sums[t][row]), lanes_load(at->y[t][row])));
}

/* One turn: starts the products of a block and a square of x, stores the sums of the turn before
 * and adds those of two before, a part at a time, so that all of it is under way at once. */
QLLM_INLINE void take_turn(const int tiles, const int groups, const uint8_t *x, int64_t group_bytes,
                           int64_t rows, passage *kept, const passage *ready)
{
    int64_t half = rows < SQUARE_LINES / 2 ? rows : SQUARE_LINES / 2;
    SQUARE_STORE(0, kept->sums[0]);
    SQUARE_LOAD(6, x, QLLM_LINE);
    add_sums(0, 0, half, ready);
    SQUARE_ZERO(0);
    SQUARE_DOT_BF16(0, 6, 2);
    if (groups > 1)
        SQUARE_LOAD(7, x + group_bytes, QLLM_LINE);
    add_sums(0, half, rows, ready);
    if (tiles > 1)
        SQUARE_STORE(1, kept->sums[1]);
    if (groups > 1)
        SQUARE_DOT_BF16(0, 7, 3);
    if (tiles > 1) {
        add_sums(1, 0, half, ready);
        SQUARE_ZERO(1);
        SQUARE_DOT_BF16(1, 6, 4);
        add_sums(1, half, rows, ready);
    }
    if (tiles > 1 && groups > 1)
        SQUARE_DOT_BF16(1, 7, 5);
}

/* Sums that are stored next and those that are added next. */
typedef struct passages {
    passage of[2], *kept, *ready;
    square_sums nowhere[TILES];
} passages;

/* The first two turns find no sums: what they add goes nowhere. */
QLLM_INLINE void open_passages(passages *p, const float *absmax)
{
    p->kept = &p->of[0];
    p->ready = &p->of[1];
    p->kept->y = p->ready->y = p->nowhere;
    p->kept->absmax = p->ready->absmax = absmax;
}

/* The sums that a turn has started will be those to store. */
QLLM_INLINE void pass_on(passages *p, square_sums *y, const float *absmax)
{
    passage *added = p->ready;
    p->ready = p->kept;
    p->kept = added;
    p->kept->y = y;
    p->kept->absmax = absmax;
}

/* What is still on its way. */
QLLM_INLINE void close_passages(const int tiles, int64_t rows, const passages *p)
{
    SQUARE_STORE(0, p->kept->sums[0]);
    add_sums(0, 0, rows, p->ready);
    add_sums(0, 0, rows, p->kept);
    if (tiles > 1) {
        SQUARE_STORE(1, p->kept->sums[1]);
        add_sums(1, 0, rows, p->ready);
        add_sums(1, 0, rows, p->kept);
    }
}

/* Of one thread, for all its tiles. */
typedef struct workspace {
    decoded next;
    passages sums;
    _Alignas(64) square_sums y[PANEL_SQUARES][TILES];
} workspace;

/* y (squares, tiles) += the blocks of the job.  Some lines of the block AHEAD are decoded in each
 * turn. */
QLLM_INLINE void add_blocks(const int tiles, const int groups, const bool nested,
                            const codes_job *job, tile_stream *s, workspace *work)
{
    int64_t group_bytes = job->in->panel * QLLM_LINE, end = job->first_block + job->blocks;
    const uint8_t *x = (const uint8_t *)job->in->q + job->row * job->in->q_stride
                       + job->first_block * groups * group_bytes;
    const uint8_t *at[TILES] = {NULL};
    int64_t rows = job->rows, squares = job->squares, lines = groups * SQUARE_CODE_LINES, block;
    int64_t step = (lines + squares - 1) / squares;
    __m512i table = codes_table(job->packed);
    decoded *next = &work->next;
    passages *sums = &work->sums;
    open_passages(sums, next->absmax[0][0]);
    for (block = job->first_block; block < end && block < job->first_block + AHEAD; block++) {
        open_block(tiles, groups, nested, s, block, at, next);
        decode_block(tiles, groups, table, at, next->w[block % AHEAD]);
    }
    for (block = job->first_block; block < end; block++, x += groups * group_bytes) {
        uint8_t (*w)[2][SQUARE] = next->w[block % AHEAD];
        const float *absmax = next->absmax[block % SCALES][0];
        int64_t line = block + AHEAD < end ? 0 : lines; /* that is decoded next */
        take_weights(tiles, groups, w);
        if (line == 0)
            open_block(tiles, groups, nested, s, block + AHEAD, at, next);
        for (int64_t square = 0; square < squares; square++) {
            int64_t stop = line + step < lines ? line + step : lines;
            take_turn(tiles, groups, x + square * rows * QLLM_LINE, group_bytes, rows, sums->kept,
                      sums->ready);
            decode_lines(tiles, table, at, line, stop, w);
            pass_on(sums, work->y[square], absmax);
            line = stop;
        }
    }
    close_passages(tiles, rows, sums);
}

/* The outputs of a tile as the columns before have left them, and as these leave them. */
static void load_outputs(const codes_job *job, int64_t tile, int64_t square, square_sums y)
{
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(job->packed, tile);
    int64_t first = job->row + square * job->rows, rows = job->in->m - first;
    for (int64_t r = 0; r < job->rows; r++)
        lanes_store(y[r], job->first_block == 0 || r >= rows ? lanes_zero()
                          : lanes_load_n(job->y + (first + r) * job->y_stride + o, n));
}

static void store_outputs(const codes_job *job, int64_t tile, int64_t square, square_sums y)
{
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(job->packed, tile);
    int64_t first = job->row + square * job->rows, rows = job->in->m - first;
    bool last = job->first_block + job->blocks == job->all_blocks;
    for (int64_t r = 0; r < job->rows && r < rows; r++) {
        float *to = job->y + (first + r) * job->y_stride;
        if (last)
            store_sums(job->packed, job->bias, tile, lanes_load(y[r]), to);
        else
            lanes_store_n(to + o, lanes_load(y[r]), n);
    }
}

QLLM_INLINE void multiply_tiles(const int tiles, const int groups, const bool nested,
                                const codes_job *job, int64_t tile, workspace *work)
{
    tile_stream s[TILES];
    for (int t = 0; t < tiles; t++)
        stream_open(&s[t], job->packed, tile + t);
    for (int64_t square = 0; square < job->squares; square++)
        for (int t = 0; t < tiles; t++)
            load_outputs(job, tile + t, square, work->y[square][t]);
    add_blocks(tiles, groups, nested, job, s, work);
    for (int64_t square = 0; square < job->squares; square++)
        for (int t = 0; t < tiles; t++)
            store_outputs(job, tile + t, square, work->y[square][t]);
}

QLLM_INLINE void multiply_all(const int groups, const bool nested, const codes_job *job,
                              int64_t begin, int64_t end)
{
    int64_t tile = begin;
    workspace work;
    memset(&work, 0, sizeof work);
    for (; tile + TILES <= end; tile += TILES)
        multiply_tiles(TILES, groups, nested, job, tile, &work);
    for (; tile < end; tile++)
        multiply_tiles(1, groups, nested, job, tile, &work);
}

typedef void codes_kernel(const codes_job *job, int64_t begin, int64_t end);

#define KERNEL(name, groups, nested)                                                              \
    static __attribute__((noinline)) void name(const codes_job *job, int64_t begin, int64_t end)  \
    {                                                                                             \
        multiply_all(groups, nested, job, begin, end);                                            \
    }

KERNEL(codes_of_32, 1, false)
KERNEL(codes_of_64, 2, false)
KERNEL(nested_codes_of_32, 1, true)
KERNEL(nested_codes_of_64, 2, true)

/* Some columns for all tiles, then the next, where x has too many of them: whole units. */
static int64_t blocks_of_a_pass(const codes_job *job, int64_t block)
{
    int64_t fit = PASS_BYTES / (job->in->panel * block * (int64_t)sizeof(uint16_t));
    int64_t parts = (job->all_blocks + fit - 1) / fit;
    int64_t most = (job->all_blocks + parts - 1) / parts;
    int64_t unit = QLLM_UNIT_BLOCKS * (job->packed->blocksize / block);
    return (most + unit - 1) / unit * unit;
}

void qllm_linear_4bit_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t block = qllm_activation_block(packed->blocksize);
    int64_t squares = (in->panel + SQUARE_LINES - 1) / SQUARE_LINES;
    bool nested = qllm_packed_nested(packed);
    codes_kernel *kernel = block == QLLM_GROUP ? (nested ? nested_codes_of_32 : codes_of_32)
                                               : (nested ? nested_codes_of_64 : codes_of_64);
    codes_job job = {.packed = packed, .in = in, .bias = bias, .y = y, .y_stride = y_stride,
                     .squares = squares, .rows = in->panel / squares,
                     .all_blocks = packed->cols / block};
    int64_t most = blocks_of_a_pass(&job, block);
    squares_open_with(2, job.rows, QLLM_LINE);
    for (job.row = 0; job.row < in->m; job.row += in->panel)
        for (job.first_block = 0; job.first_block < job.all_blocks; job.first_block += job.blocks) {
            int64_t left = job.all_blocks - job.first_block;
            job.blocks = left < most ? left : most;
            kernel(&job, begin, end);
        }
    squares_close();
}
