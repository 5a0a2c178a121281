/* One tile as its kernel reads it: where the groups of columns lie, and their scales.  Included by
 * the bodies of linear kernels after a lanes_<set>.h. */
#ifndef QLLM_CPU_TILE_STREAM_H
#define QLLM_CPU_TILE_STREAM_H

#include "core/linear_ref.h"
#include "core/quant.h"
#include "cpu/packed_layout.h"

enum { GROUP_STEPS = QLLM_GROUP / QLLM_STEP };

/* Bytes of 8 columns of a tile. */
QLLM_INLINE int64_t step_bytes(qllm_layout kind)
{
    switch (kind) {
    case QLLM_LAYOUT_F32: return 8 * QLLM_LINE;
    case QLLM_LAYOUT_F16:
    case QLLM_LAYOUT_BF16: return 4 * QLLM_LINE;
    default: return QLLM_LINE;
    }
}

/* Where the groups of one tile lie, and their scales. */
typedef struct tile_stream {
    const qllm_packed *packed;
    const uint8_t *base;
    int64_t groups;       /* whole groups of 32 columns */
    int64_t block_groups; /* groups in a block; a power of two */
    int block_shift;      /* its logarithm */
    /* nested forms */
    const float *nested;  /* second-level absmax from the tile's first block on */
    int32_t first[16];    /* 256ths of the number of row r's first block, counted from nested[0] */
    int64_t change;       /* the block of the tile from which on `second` is out of date */
    _Alignas(64) float second[16]; /* second-level absmax of the rows */
    _Alignas(64) float unit[QLLM_UNIT_BLOCKS][16]; /* absmax of the unit that is being read */
} tile_stream;

static void stream_open(tile_stream *s, const qllm_packed *packed, int64_t tile)
{
    s->packed = packed;
    s->base = qllm_packed_tile(packed, tile);
    s->groups = packed->cols / QLLM_GROUP;
    s->block_groups = packed->blocksize / QLLM_GROUP;
    s->block_shift = 0;
    while ((int64_t)1 << s->block_shift < s->block_groups)
        s->block_shift++;
    if (!qllm_packed_nested(packed))
        return;
    int64_t block = tile * QLLM_TILE_ROWS * packed->row_blocks;
    s->change = 0;
    s->nested = packed->nested_absmax + block / QLLM_NESTED_BLOCKSIZE;
    for (int64_t r = 0; r < QLLM_TILE_ROWS; r++)
        s->first[r] = (int32_t)(block % QLLM_NESTED_BLOCKSIZE + r * packed->row_blocks);
}

/* Reads the absmax (4, 16) of the blocks of unit u: code value * second level, then + offset.  A
 * row passes into its next 256 blocks seldom; until one does, the second level stays as it is. */
QLLM_INLINE void stream_unit_absmax(tile_stream *s, int64_t u, float (*absmax)[16])
{
    const qllm_packed *p = s->packed;
    int64_t block = u * QLLM_UNIT_BLOCKS;
    lanes value[QLLM_UNIT_BLOCKS], second;
    ilanes index = ilanes_add(ilanes_load(s->first), ilanes_set1((int32_t)block));
    const uint8_t *line = s->base + qllm_unit_codes_offset(p, u);
    qllm_prefetch_codes(line);
    lanes_unit_values(p->nested_code, p->nested_planes, ilanes_load(line), value);
    if (block >= s->change) {
        ilanes inside = ilanes_and(index, ilanes_set1(QLLM_NESTED_BLOCKSIZE - 1));
        s->change = block + QLLM_NESTED_BLOCKSIZE - ilanes_max_all(inside);
        lanes_store(s->second, lanes_gather(s->nested, ilanes_shift_right(index, 8)));
    }
    second = lanes_load(s->second);
    LANES_UNROLL
    for (int b = 0; b < QLLM_UNIT_BLOCKS; b++) {
        if (block + b >= s->change && block + b < p->row_blocks)
            second = lanes_gather(s->nested,
                                  ilanes_shift_right(ilanes_add(index, ilanes_set1(b)), 8));
        lanes_store(absmax[b], lanes_add(lanes_mul(value[b], second), lanes_set1(p->offset)));
    }
}

static void stream_read_unit(tile_stream *s, int64_t u)
{
    stream_unit_absmax(s, u, s->unit);
}

QLLM_INLINE const uint8_t *group_at(qllm_layout kind, bool nested, const tile_stream *s, int64_t g)
{
    if (kind != QLLM_LAYOUT_BLOCKS)
        return s->base + g * GROUP_STEPS * step_bytes(kind);
    int64_t b = g >> s->block_shift, scale_lines = nested ? b / QLLM_UNIT_BLOCKS : b;
    return s->base + (g * GROUP_STEPS + scale_lines) * QLLM_LINE;
}

/* The scales of group g.  Nested forms: groups are read in ascending order, in runs that stay
 * inside a unit, and the first group of a unit reads the unit. */
QLLM_INLINE lanes scale_at(qllm_layout kind, bool nested, const tile_stream *s, int64_t g)
{
    if (kind != QLLM_LAYOUT_BLOCKS)
        return lanes_set1(1.0f);
    int64_t b = g >> s->block_shift;
    if (nested)
        return lanes_load(s->unit[b % QLLM_UNIT_BLOCKS]);
    const uint8_t *line = s->base + ((b + 1) * s->block_groups * GROUP_STEPS + b) * QLLM_LINE;
    qllm_prefetch_codes(line);
    return lanes_load((const float *)(const void *)line);
}

QLLM_INLINE void read_unit_if_first(bool nested, tile_stream *s, int64_t g)
{
    if (nested && (g & (QLLM_UNIT_BLOCKS * s->block_groups - 1)) == 0)
        stream_read_unit(s, g / (QLLM_UNIT_BLOCKS * s->block_groups));
}

#endif
