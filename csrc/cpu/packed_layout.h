/* Inside the CPU device: how qllm_packed lies in memory.  Only packed.c and the linear kernels
 * include this.
 *
 * A tile is 16 output rows (the last one padded with zeros); tiles follow one another in `data`.
 * Inside a tile, by layout (k is the column, a line is 64 bytes, dword r belongs to row r):
 *
 *   F32     line k: 16 floats                                       k padded to 8
 *   F16     half line k: 16 float16                                 k padded to 8
 *   BF16    line k/2: dword r = column k (low half), column k + 1   k padded to 8
 *   INT8    line k/4: dword r = columns k .. k + 3                  k padded to 64
 *   BLOCKS  4-bit, cols a multiple of blocksize.  line k/8: dword r = the 4 standard bytes of the
 *           codes k .. k + 7.  blocksize / 8 lines are a block of each row, and behind them stands
 *           one line with the 16 float32 absmax.  Nested forms have no such line; instead behind
 *           every 4 blocks (or what is left) stands one line with their absmax codes, block b of
 *           row r at byte 16 * (r / 4) + 4 * b + r % 4.
 *   BYTES   4-bit, any other cols: the standard bytes as they are, in `standard`; blocks run across
 *           row ends, so that kernels decode 16 rows x 32 columns at a time. */
#ifndef QLLM_CPU_PACKED_LAYOUT_H
#define QLLM_CPU_PACKED_LAYOUT_H

#include "cpu/packed.h"

typedef enum qllm_layout {
    QLLM_LAYOUT_F32,
    QLLM_LAYOUT_F16,
    QLLM_LAYOUT_BF16,
    QLLM_LAYOUT_INT8,
    QLLM_LAYOUT_BLOCKS,
    QLLM_LAYOUT_BYTES
} qllm_layout;

enum {
    QLLM_LINE = 64,       /* bytes */
    QLLM_UNIT_BLOCKS = 4, /* blocks whose nested absmax codes share a line */
    QLLM_STEP = 8,        /* columns in one line of 4-bit codes */
    QLLM_INT8_PAD = 64
};

/* Kernels ask for lines ahead: arithmetic shortens the processor's own look-ahead, which also ends
 * with the page.  How was found by measuring.  A kernel that does little with a line asks for it in
 * the first-level cache.  4-bit codes take longer than that cache, which can wait for few lines at
 * a time, should be kept waiting: they are asked for in the second level, from which the processor
 * fetches them in time.  There no line may be left out, or the kernel waits for each of those; and
 * each is asked for where it stands in the code: gcc brings several together, if it may, and then
 * they wait for one another. */
static inline void qllm_prefetch(const uint8_t *line)
{
    __builtin_prefetch(line + 4096, 0, 3);
}

static inline void qllm_prefetch_codes(const uint8_t *line)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetcht1 %0" :: "m"(line[6144]));
#else
    __builtin_prefetch(line + 6144, 0, 2);
#endif
}

struct qllm_packed {
    qllm_format format;
    qllm_layout layout;
    int64_t rows, cols, blocksize;
    int64_t tiles, tile_bytes;
    uint8_t *data; /* tiles * tile_bytes, and one line that kernels may read beyond */
    int64_t data_bytes;
    /* BLOCKS */
    int64_t row_blocks;   /* cols / blocksize */
    float *nested_absmax; /* padded so that every row of the last tile has one */
    int64_t nested_bytes;
    float offset, code[16], nested_code[256];
    int16_t codes16[16], codes8[16]; /* `code` as integers, and what one unit of them is worth */
    float unit16, unit8;
    uint16_t codes_bf16[16]; /* and as bf16 */
    float unit_bf16;
    uint8_t nested_planes[4][256];   /* byte p of nested_code[i] */
    /* INT8, padded to whole tiles */
    float *row_absmax;
    int32_t *row_sums; /* sum over k of data */
    /* BYTES */
    qllm_qweight standard;
};

static inline bool qllm_packed_nested(const qllm_packed *packed)
{
    return packed->format == QLLM_FORMAT_NF4_DQ || packed->format == QLLM_FORMAT_FP4_DQ;
}

static inline const uint8_t *qllm_packed_tile(const qllm_packed *packed, int64_t tile)
{
    return packed->data + tile * packed->tile_bytes;
}

/* Outputs of a tile, 16 but for the last of a matrix. */
static inline int64_t qllm_tile_outputs(const qllm_packed *packed, int64_t tile)
{
    int64_t left = packed->rows - tile * QLLM_TILE_ROWS;
    return left < QLLM_TILE_ROWS ? left : QLLM_TILE_ROWS;
}

/* BLOCKS: bytes of a block's code lines, and where the codes of block b start in their tile. */
static inline int64_t qllm_block_bytes(const qllm_packed *packed)
{
    return packed->blocksize / QLLM_STEP * QLLM_LINE;
}

static inline int64_t qllm_block_offset(const qllm_packed *packed, int64_t b)
{
    int64_t scale_lines = qllm_packed_nested(packed) ? b / QLLM_UNIT_BLOCKS : b;
    return b * qllm_block_bytes(packed) + scale_lines * QLLM_LINE;
}

/* Nested BLOCKS: where the line of absmax codes of unit u stands in its tile. */
static inline int64_t qllm_unit_codes_offset(const qllm_packed *packed, int64_t u)
{
    int64_t first = u * QLLM_UNIT_BLOCKS, left = packed->row_blocks - first;
    int64_t blocks = left < QLLM_UNIT_BLOCKS ? left : QLLM_UNIT_BLOCKS;
    return qllm_block_offset(packed, first) + blocks * qllm_block_bytes(packed);
}

static inline int64_t qllm_unit_code_byte(int64_t r, int64_t b)
{
    return 16 * (r / 4) + 4 * b + r % 4;
}

#endif
