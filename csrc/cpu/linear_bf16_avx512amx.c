/* Tier bf16x2: bf16 weights by x rounded to bf16 in the matrix units (AMX).  Weights are squares as
 * they lie (packed_layout.h), and so is x in its panels. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include <string.h>

#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/packed_layout.h"
#include "cpu/squares.h"

/* The lines of the last group, which may be fewer than a square's, and zeros. */
static void copy_last(const qllm_packed *packed, int64_t tile, int64_t group, uint8_t *to)
{
    int64_t begin = group * SQUARE, left = packed->tile_bytes - begin;
    memset(to, 0, SQUARE);
    memcpy(to, qllm_packed_tile(packed, tile) + begin, (size_t)(left < SQUARE ? left : SQUARE));
}

void qllm_linear_bf16_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    int64_t groups = (packed->cols + QLLM_GROUP - 1) / QLLM_GROUP, step = in->panel * QLLM_LINE;
    squares_open(in->panel, QLLM_LINE);
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t o = tile * QLLM_TILE_ROWS, left = packed->rows - o, n = left < 16 ? left : 16;
        _Alignas(64) uint8_t last[SQUARE];
        copy_last(packed, tile, groups - 1, last);
        for (int64_t row = 0; row < in->m; row += in->panel) {
            const uint8_t *x = (const uint8_t *)in->q + row * in->q_stride;
            const uint8_t *w = qllm_packed_tile(packed, tile);
            _Alignas(64) float sums[SQUARE_LINES][16];
            SQUARE_ZERO(0);
            for (int64_t g = 0; g < groups; g++, x += step, w += SQUARE) {
                SQUARE_LOAD(4, g + 1 < groups ? w : last, QLLM_LINE);
                SQUARE_LOAD(6, x, QLLM_LINE);
                SQUARE_DOT_BF16(0, 6, 4);
            }
            SQUARE_STORE(0, sums);
            for (int64_t r = 0; r < in->panel && row + r < in->m; r++) {
                lanes value = lanes_load(sums[r]);
                if (bias != NULL)
                    value = lanes_add(value, lanes_load_n(bias + o, n));
                lanes_store_n(y + (row + r) * y_stride + o, value, n);
            }
        }
    }
    squares_close();
}
