/* The registers of AMX, "squares" here since a tile is something else (packed_layout.h): up to 16
 * lines of up to 64 bytes each.  A square of x has a line per row, one of weights a line per four
 * columns of int8 or two of bf16, with the four bytes of 16 outputs, one of sums a line of 16
 * int32 or float32 per row of x.
 *
 * By name, since compilers know neither that squares are read from memory nor which are in use. */
#ifndef QLLM_CPU_SQUARES_H
#define QLLM_CPU_SQUARES_H

#include <stdint.h>

#include "cpu/inline.h"

enum {
    SQUARE = 1024, /* bytes */
    SQUARE_LINES = 16,
    SQUARES = 8,
    PANEL_SQUARES = 8 /* at most in a panel of x for 4-bit weights in tier bf16x2, so that their
                         outputs for two tiles stay in the first-level cache */
};

#define SQUARE_ZERO(square) __asm__ volatile("tilezero %%tmm" #square ::: "memory")
#define SQUARE_LOAD(square, from, stride)                                                         \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #square                                         \
                     :: "r"(from), "r"((int64_t)(stride)) : "memory")
#define SQUARE_STORE(square, to) SQUARE_STORE_LINES(square, to, 64)
#define SQUARE_STORE_LINES(square, to, stride)                                                    \
    __asm__ volatile("tilestored %%tmm" #square ", (%0,%1,1)"                                     \
                     :: "r"(to), "r"((int64_t)(stride)) : "memory")
/* sum += x times weights; `signs` says of x and of the weights whether they are signed: ss, su, us,
 * uu */
#define SQUARE_DOT(signs, sum, x, weights)                                                        \
    __asm__ volatile("tdpb" #signs "d %%tmm" #weights ", %%tmm" #x ", %%tmm" #sum ::: "memory")

/* The same with pairs of bf16 and sums of float32: qllm_bf16_pairs */
#define SQUARE_DOT_BF16(sum, x, weights)                                                          \
    __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #x ", %%tmm" #sum ::: "memory")

/* The operand of ldtilecfg (Intel SDM vol. 1, 18.3.1). */
typedef struct square_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} square_shapes;

/* Squares 0 to sums - 1 hold sums, those up to 5 weights, 6 and 7 x: `rows` rows of x, `bytes` of
 * each.  Until squares_close, the system saves 8 KiB more when it switches threads. */
QLLM_INLINE void squares_open_with(int sums, int64_t rows, int64_t bytes)
{
    square_shapes shapes = {.palette = 1};
    for (int i = 0; i < SQUARES; i++) {
        shapes.line_bytes[i] = i > 5 ? (uint16_t)bytes : 64;
        shapes.lines[i] = (uint8_t)(i < sums || i > 5 ? rows : bytes / 4);
    }
    __asm__ volatile("ldtilecfg %0" :: "m"(shapes) : "memory");
}

/* Four of sums, two of weights. */
QLLM_INLINE void squares_open(int64_t rows, int64_t bytes)
{
    squares_open_with(4, rows, bytes);
}

QLLM_INLINE void squares_close(void)
{
    __asm__ volatile("tilerelease" ::: "memory");
}

#endif
