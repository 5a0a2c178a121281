/* How a weight lies in device memory for the tensor cores, in one place: for the host, for packing
 * and for the kernels.
 *
 * A tile is 16 output rows x 64 columns, contiguous: 512 bytes of 4-bit codes, 1,024 of int8, 2,048
 * of bf16.  Tiles of the same 16 rows follow one another by ascending column.  Rows are padded to
 * 16 with zero bytes; columns to 64 with zeros for int8 and bf16, while a 4-bit weight of other
 * widths is not tiled.
 *
 * Lane 4 g + t of a warp (g < 8, t < 4) owns rows g and g + 8 and columns 16 t .. 16 t + 15: what
 * the A operand of mma.m16n8k16 and mma.m16n8k32 takes from it, once k is renumbered inside the
 * tile for weights and inputs alike.  It reads 16 bytes at a time, and the 32 lanes 512 in a row:
 *   4-bit  one time:   8 bytes of row g, 8 bytes of row g + 8, each as in the standard bytes
 *   int8   two times, bf16 four times, each the operand of one mma: the next 8 bytes of either row,
 *          in words of 4 bytes in the order row g, row g + 8, row g, row g + 8
 *
 * Scales of 4-bit weights (blocksize a multiple of 64 that divides the columns, so that a block
 * lies in one row and a tile in one block): for each 16 rows and each block 16 values in the order
 * row 0, 8, 1, 9, ... 7, 15; absmax as float32, or one byte of the nested forms.  The nested absmax
 * keeps its standard order: index (row * blocks per row + block) / 256. */
#ifndef QLLM_KERNELS_LAYOUT_H
#define QLLM_KERNELS_LAYOUT_H

#include <stdint.h>

#include "gpu.h"

enum {
    GPU_TILE_ROWS = 16,
    GPU_TILE_COLS = 64,
    GPU_TILE_LOAD = 512 /* bytes that a warp reads with one 16-byte load of each lane */
};

/* What a tile is made of. */
enum gpu_tile_kind { GPU_TILE_4BIT, GPU_TILE_INT8, GPU_TILE_BF16 };

/* 16-byte loads of a lane for one tile: 1, 2 or 4. */
GPU_BOTH inline int gpu_tile_loads(int kind)
{
    return 1 << kind;
}

GPU_BOTH inline int64_t gpu_tiles_down(int64_t rows)
{
    return (rows + GPU_TILE_ROWS - 1) / GPU_TILE_ROWS;
}

GPU_BOTH inline int64_t gpu_tiles_across(int64_t cols)
{
    return (cols + GPU_TILE_COLS - 1) / GPU_TILE_COLS;
}

GPU_BOTH inline int64_t gpu_tiled_bytes(int kind, int64_t rows, int64_t cols)
{
    return gpu_tiles_down(rows) * gpu_tiles_across(cols) * gpu_tile_loads(kind) * GPU_TILE_LOAD;
}

/* Offset of the first byte of value (row, col); 4-bit: of the byte that holds it together with its
 * neighbour, the even column in the high half. */
GPU_BOTH inline int64_t gpu_tile_offset(int kind, int64_t across, int64_t row, int64_t col)
{
    int64_t tile = row / GPU_TILE_ROWS * across + col / GPU_TILE_COLS;
    int r = (int)(row % GPU_TILE_ROWS), c = (int)(col % GPU_TILE_COLS);
    int lane = r % 8 * 4 + c / 16, half = r / 8, i = c % 16;
    int64_t first = tile * gpu_tile_loads(kind) * GPU_TILE_LOAD + lane * 16;
    if (kind == GPU_TILE_4BIT)
        return first + half * 8 + i / 2;
    int byte = i * (kind == GPU_TILE_INT8 ? 1 : 2); /* of the 16 or 32 of this row */
    return first + byte / 8 * GPU_TILE_LOAD + byte % 8 / 4 * 8 + half * 4 + byte % 4;
}

/* Index of the scale of block `block` of a row, of `blocks` in each row. */
GPU_BOTH inline int64_t gpu_tile_scale(int64_t blocks, int64_t row, int64_t block)
{
    int r = (int)(row % GPU_TILE_ROWS);
    return (row / GPU_TILE_ROWS * blocks + block) * GPU_TILE_ROWS + r % 8 * 2 + r / 8;
}

#endif
