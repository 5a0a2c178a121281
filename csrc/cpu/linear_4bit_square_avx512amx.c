/* Tier bf16x2: one square of x, up to 16 rows, by 4-bit weights as fast as memory gives them.
 *
 * The blocks of columns (qllm_activation_block) of all tiles of a thread are one stream.  In each
 * turn the codes of the next block are decoded, the products of this one started, the sums of the
 * block before stored and those of two before added to the outputs: nothing waits for what its own
 * turn has begun, where stores leave for the cache only when all products before them are done. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include "core/activation.h"
#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/squares_codes.h"
#include "cpu/tile_stream.h"

enum { KEPT = 4 /* turns: a block is decoded in one and added in the third after it */ };

typedef struct square_job {
    const qllm_packed *packed;
    const float *bias;
    const uint8_t *x; /* (groups of columns, rows, 32) bf16 */
    float *y;
    int64_t y_stride;
    int64_t begin, end; /* tiles */
    int64_t blocks;     /* of a tile */
    int64_t parts;      /* blocks that share a scale */
} square_job;

/* What is on its way. */
typedef struct turns {
    _Alignas(64) uint8_t w[2][2][SQUARE]; /* (blocks, groups): this turn's and the next */
    _Alignas(64) float sums[2][SQUARE_LINES][16]; /* of the block before and of two before */
    /* nested forms: the scales of the last units, and which of them each block has */
    _Alignas(64) float units[KEPT][QLLM_UNIT_BLOCKS][QLLM_TILE_ROWS];
    const float *absmax[KEPT];
} turns;

/* Reads a plain form, whose tiles follow one another without a gap. */
typedef struct plain_reader {
    const uint8_t *at;
    const float *absmax;
    int64_t parts; /* that are left of its block */
} plain_reader;

QLLM_INLINE const uint8_t *read_plain(const int groups, const square_job *job, plain_reader *r)
{
    const uint8_t *codes = r->at;
    if (r->parts == 0) {
        r->absmax = (const float *)(const void *)(codes + qllm_block_bytes(job->packed));
        r->parts = job->parts;
    }
    r->parts--;
    r->at += (groups * SQUARE_CODE_LINES + (r->parts == 0)) * QLLM_LINE;
    return codes;
}

/* Reads a nested form, likewise. */
typedef struct nested_reader {
    tile_stream s;
    const uint8_t *at;
    int64_t tile, unit; /* the next unit of the tile */
    uint64_t units;     /* read so far */
    const float (*absmax)[QLLM_TILE_ROWS];
    int64_t blocks, parts; /* that are left of the unit and of its block */
} nested_reader;

QLLM_INLINE void read_unit(const square_job *job, nested_reader *r, turns *t)
{
    float (*absmax)[QLLM_TILE_ROWS] = t->units[r->units++ % KEPT];
    int64_t left = job->packed->row_blocks - r->unit * QLLM_UNIT_BLOCKS;
    if (left <= 0) {
        stream_open(&r->s, job->packed, ++r->tile);
        r->unit = 0;
        left = job->packed->row_blocks;
    }
    stream_unit_absmax(&r->s, r->unit++, absmax);
    r->absmax = absmax;
    r->blocks = left < QLLM_UNIT_BLOCKS ? left : QLLM_UNIT_BLOCKS;
    r->parts = job->parts;
}

QLLM_INLINE const uint8_t *read_nested(const int groups, const square_job *job, uint64_t n,
                                       nested_reader *r, turns *t)
{
    const uint8_t *codes = r->at;
    if (r->blocks == 0)
        read_unit(job, r, t);
    t->absmax[n % KEPT] = *r->absmax;
    if (--r->parts == 0) {
        r->parts = job->parts;
        r->absmax++;
        r->blocks--;
    }
    r->at += (groups * SQUARE_CODE_LINES + (r->blocks == 0)) * QLLM_LINE;
    return codes;
}

/* The codes of block n into squares of weights. */
QLLM_INLINE void decode_next(const int groups, const bool nested, const square_job *job, uint64_t n,
                             __m512i table, plain_reader *plain, nested_reader *units, turns *t)
{
    const uint8_t *codes = nested ? read_nested(groups, job, n, units, t)
                                  : read_plain(groups, job, plain);
    if (!nested && plain->parts == 0)
        qllm_prefetch_codes(plain->at - QLLM_LINE);
    LANES_UNROLL
    for (int line = 0; line < groups * SQUARE_CODE_LINES; line++)
        decode_line(table, codes + line * QLLM_LINE, t->w[n % 2][0] + 4 * line * QLLM_LINE);
}

/* Outputs, which grow block by block, tile by tile. */
typedef struct outputs {
    int64_t tile, blocks; /* blocks that are left */
    lanes y[SQUARE_LINES];
} outputs;

/* Their lines of y are asked for while a tile begins: a store that waits for one holds up the
 * weights behind it. */
QLLM_INLINE void outputs_open(const square_job *job, int64_t rows, int64_t tile, outputs *out)
{
    out->tile = tile;
    out->blocks = job->blocks;
    for (int64_t r = 0; r < rows; r++) {
        __builtin_prefetch(job->y + r * job->y_stride + tile * QLLM_TILE_ROWS, 1, 3);
        out->y[r] = lanes_zero();
    }
}

QLLM_INLINE void add_block(const square_job *job, int64_t rows, lanes absmax,
                           const float (*sums)[16], outputs *out)
{
    for (int64_t r = 0; r < rows; r++)
        out->y[r] = lanes_fma(absmax, lanes_load(sums[r]), out->y[r]);
    if (__builtin_expect(--out->blocks > 0, 1)) /* or what ends a tile stands in the loop */
        return;
    for (int64_t r = 0; r < rows; r++)
        store_sums(job->packed, job->bias, out->tile, out->y[r], job->y + r * job->y_stride);
    outputs_open(job, rows, out->tile + 1, out);
}

/* The scale of block n, the next to be added. */
QLLM_INLINE lanes next_absmax(const int groups, const bool nested, const square_job *job,
                              uint64_t n, plain_reader *scales, const turns *t)
{
    if (nested)
        return lanes_load(t->absmax[n % KEPT]);
    read_plain(groups, job, scales);
    return lanes_load(scales->absmax);
}

QLLM_INLINE void load_squares(const int groups, int64_t rows, const uint8_t *x,
                              const uint8_t (*w)[SQUARE])
{
    SQUARE_LOAD(2, w[0], QLLM_LINE);
    if (groups > 1)
        SQUARE_LOAD(3, w[1], QLLM_LINE);
    SQUARE_LOAD(6, x, QLLM_LINE);
    if (groups > 1)
        SQUARE_LOAD(7, x + rows * QLLM_LINE, QLLM_LINE);
}

QLLM_INLINE void start_products(const int groups)
{
    SQUARE_ZERO(0);
    SQUARE_DOT_BF16(0, 6, 2);
    if (groups > 1)
        SQUARE_DOT_BF16(0, 7, 3);
}

QLLM_INLINE void multiply_square(const int groups, const bool nested, const int64_t rows,
                                 const square_job *job)
{
    const int64_t x_bytes = groups * rows * QLLM_LINE;
    const uint8_t *x = job->x, *x_end = x + job->blocks * x_bytes;
    const uint64_t count = (uint64_t)((job->end - job->begin) * job->blocks);
    __m512i table = codes_table(job->packed);
    plain_reader codes = {.at = qllm_packed_tile(job->packed, job->begin)}, scales = codes;
    nested_reader units = {.at = codes.at, .tile = job->begin};
    outputs out;
    turns t;
    if (nested)
        stream_open(&units.s, job->packed, job->begin);
    outputs_open(job, rows, job->begin, &out);
    decode_next(groups, nested, job, 0, table, &codes, &units, &t);
    SQUARE_ZERO(0);
    for (uint64_t n = 0; n < count; n++) {
        if (n + 1 < count)
            decode_next(groups, nested, job, n + 1, table, &codes, &units, &t);
        load_squares(groups, rows, x, t.w[n % 2]);
        SQUARE_STORE(0, t.sums[(n - 1) % 2]);
        if (n > 1)
            add_block(job, rows, next_absmax(groups, nested, job, n - 2, &scales, &t),
                      t.sums[n % 2], &out);
        start_products(groups);
        x = x + x_bytes == x_end ? job->x : x + x_bytes;
    }
    SQUARE_STORE(0, t.sums[(count - 1) % 2]);
    for (uint64_t n = count > 1 ? count - 2 : 0; n < count; n++)
        add_block(job, rows, next_absmax(groups, nested, job, n, &scales, &t), t.sums[n % 2], &out);
}

/* One row, whose outputs stay in a register, and any number up to 16. */
typedef void square_kernel(int64_t rows, const square_job *job);

#define KERNEL(name, groups, nested)                                                              \
    static __attribute__((noinline)) void name##_row(int64_t rows, const square_job *job)         \
    {                                                                                             \
        (void)rows;                                                                               \
        multiply_square(groups, nested, 1, job);                                                  \
    }                                                                                             \
    static __attribute__((noinline)) void name##_rows(int64_t rows, const square_job *job)        \
    {                                                                                             \
        multiply_square(groups, nested, rows, job);                                               \
    }

KERNEL(codes_of_32, 1, false)
KERNEL(codes_of_64, 2, false)
KERNEL(nested_codes_of_32, 1, true)
KERNEL(nested_codes_of_64, 2, true)

static square_kernel *const kernels[2][2][2] = { /* [nested][groups - 1][more than one row] */
    {{codes_of_32_row, codes_of_32_rows}, {codes_of_64_row, codes_of_64_rows}},
    {{nested_codes_of_32_row, nested_codes_of_32_rows},
     {nested_codes_of_64_row, nested_codes_of_64_rows}},
};

void qllm_linear_4bit_square_avx512amx(const qllm_packed *packed, const float *bias,
                                       const qllm_rows *in, int64_t begin, int64_t end, float *y,
                                       int64_t y_stride)
{
    int64_t block = qllm_activation_block(packed->blocksize);
    square_job job = {.packed = packed, .bias = bias, .x = in->q, .y = y, .y_stride = y_stride,
                      .begin = begin, .end = end, .blocks = packed->cols / block,
                      .parts = packed->blocksize / block};
    if (begin == end)
        return;
    squares_open_with(1, in->m, QLLM_LINE);
    kernels[qllm_packed_nested(packed)][block / QLLM_GROUP - 1][in->m > 1](in->m, &job);
    squares_close();
}
