/* What the kernels of linear layers take by value, and how they find their way in it. */
#ifndef QLLM_KERNELS_LINEAR_ARGS_H
#define QLLM_KERNELS_LINEAR_ARGS_H

#include "gpu.h"
#include "layout.h"
#include "skinny.h"

/* The ways in which tiles become operands. */
enum { LINEAR_4BIT, LINEAR_NESTED, LINEAR_INT8, LINEAR_BF16 };

GPU_BOTH inline constexpr int linear_loads(int form)
{
    return form == LINEAR_INT8 ? 2 : form == LINEAR_BF16 ? 4 : 1; /* gpu_tile_loads */
}

typedef struct linear_matrix {
    const uint4 *data;
    const float *absmax;
    const uint8_t *codes;
    const float *nested, *tables, *bias;
    float offset;
    int rows;
} linear_matrix;

/* The rows x as the kernels take them, in shared or device memory.  Offsets in bytes from its
 * start.  For each row: what was found about it; its values as bf16 or int8, padded with zeros to
 * tiles; for int8 a bit for each column that is an outlier, in spans of 256 columns, and a byte for
 * each span that has a bit for each word of the span in which there is one. */
typedef struct linear_panel {
    int rows;                 /* of the panel */
    int values, stride;       /* of a row */
    int masks, mask_stride;
    int spans;
    int bytes;
} linear_panel;

enum { LINEAR_SPAN = 256 };

/* Rows of x that a launch of skinny.cu takes at most; a panel in device memory has a multiple of
 * it: rows behind the end are zeros. */
enum { LINEAR_ROWS = 32 };

typedef struct linear_row {
    float scale;          /* of int8 values */
    float mean, inverse;  /* of the norm */
    float unused;
} linear_row;

typedef struct linear_args {
    linear_matrix weight[GPU_LINEAR_WEIGHTS];
    int n_weights;
    int cols, across;      /* columns; tiles across */
    int blocks, shift;     /* 4-bit: blocks in a row, log2(blocksize / 64) */
    int units, paired;     /* a unit is a row of tiles, or a pair of them (linear_unit) */
    int head_units, head_weights; /* HEADS and HEADS_ACT: units and weights of heads; else 0 */
    gpu_divisor head_pairs; /* units of a head */
    gpu_divisor head_group; /* heads of a key-value head: queries, its key, its value */
    int units_each, units_more; /* of a block of skinny.cu; one more for the first of them */
    int first, rows;       /* rows of x of this launch */
    linear_panel panel;
    gpu_linear_input input;
    gpu_linear_output output;
} linear_args;

/* A row of 64 columns is 128 bytes of bf16, or 64 of int8; the gap behind a row lets the eight rows
 * that a warp reads at once lie in different banks of shared memory. */
static inline linear_panel linear_panel_of(bool is_int8, int rows, int64_t cols)
{
    linear_panel p;
    int across = (int)gpu_tiles_across(cols);
    p.rows = rows;
    p.values = rows * (int)sizeof(linear_row);
    p.stride = is_int8 ? across * 64 + (across % 2 == 0 ? 64 : 0) : across * 128 + 16;
    p.spans = (int)((cols + LINEAR_SPAN - 1) / LINEAR_SPAN);
    p.masks = p.values + rows * p.stride;
    p.mask_stride = is_int8 ? p.spans * (LINEAR_SPAN / 8) + (p.spans + 3) / 4 * 4 : 0;
    p.bytes = (p.masks + rows * p.mask_stride + 15) / 16 * 16;
    return p;
}

static inline int linear_padded_rows(int rows)
{
    return (rows + LINEAR_ROWS - 1) / LINEAR_ROWS * LINEAR_ROWS;
}

GPU_DEVICE inline linear_row *linear_row_at(char *panel, int row)
{
    return (linear_row *)(void *)panel + row;
}

/* Where a unit's one or two tiles are. */
enum { LINEAR_QUERY, LINEAR_KEY, LINEAR_VALUE, LINEAR_OTHER };

typedef struct linear_unit {
    int weight[2], tile[2]; /* tile: of 16 rows of that weight; -1: none */
    int kind, head;         /* query, key or value, and which of them; or other outputs */
    int at[2];              /* of a head: first element of the tile in it */
} linear_unit;

/* Tiles i and i + half / 16 of a head go together, those behind the rotated part two by two. */
GPU_DEVICE inline linear_unit linear_head_unit(const linear_args &a, int index)
{
    const gpu_heads &h = a.output.heads;
    int head = gpu_quotient(index, a.head_pairs), pair = index - head * a.head_pairs.by;
    int row_head = head, group = a.head_group.by - 2; /* row_head: of the weight's own rows */
    linear_unit u;
    if (a.head_weights == 1) {
        u.head = gpu_quotient(head, a.head_group);
        int place = head - u.head * a.head_group.by;
        u.kind = place < group ? LINEAR_QUERY : place == group ? LINEAR_KEY : LINEAR_VALUE;
        u.head = place < group ? u.head * group + place : u.head;
        u.weight[0] = 0;
    } else {
        u.kind = head < h.heads ? LINEAR_QUERY
                                : head < h.heads + h.kv_heads ? LINEAR_KEY : LINEAR_VALUE;
        u.head = head - (u.kind == LINEAR_QUERY ? 0 : h.heads) -
                 (u.kind == LINEAR_VALUE ? h.kv_heads : 0);
        u.weight[0] = u.kind;
        row_head = u.head;
    }
    int tiles = h.head_dim / GPU_TILE_ROWS;
    int half = u.kind == LINEAR_VALUE ? 0 : h.half / GPU_TILE_ROWS;
    int first = pair < half ? pair : 2 * pair, second = pair < half ? pair + half : first + 1;
    u.weight[1] = u.weight[0];
    u.at[0] = first * GPU_TILE_ROWS;
    u.at[1] = second * GPU_TILE_ROWS;
    u.tile[0] = row_head * tiles + first;
    u.tile[1] = second < tiles ? row_head * tiles + second : -1;
    return u;
}

GPU_DEVICE inline linear_unit linear_unit_at(const linear_args &a, int index)
{
    if (index < a.head_units)
        return linear_head_unit(a, index);
    if (a.head_units > 0) { /* of the weight behind them two rows of tiles, or the last */
        int weight = a.head_weights, first = 2 * (index - a.head_units);
        bool two = (first + 1) * GPU_TILE_ROWS < a.weight[weight].rows;
        linear_unit other = {{weight, weight}, {first, two ? first + 1 : -1}, LINEAR_OTHER, 0,
                             {0, 0}};
        return other;
    }
    int weight = 0, tile = index;
GPU_NO_UNROLL
    for (; !a.paired && weight + 1 < a.n_weights; weight++) {
        int tiles = (a.weight[weight].rows + GPU_TILE_ROWS - 1) / GPU_TILE_ROWS;
        if (tile < tiles)
            break;
        tile -= tiles;
    }
    linear_unit u = {{weight, 1}, {tile, a.paired ? tile : -1}, LINEAR_OTHER, 0, {0, 0}};
    return u;
}

#endif
