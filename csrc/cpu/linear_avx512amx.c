/* What the set avx512amx has of its own, in files of their own: tier bf16x2, int8 weights and many
 * rows of tier int8.  Everything else is the set's below. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include "core/activation.h"
#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/linear_names.h"
#include "cpu/packed_layout.h"
#include "cpu/squares.h"

enum { LEAST_ROWS_INT8 = 12 /* of tier int8: fewer are faster by the set below */ };

/* Panels of squares with as many rows each.  4-bit weights in tier bf16x2 take several squares, of
 * which those of the same columns stand together. */
int64_t qllm_panel_rows_avx512amx(qllm_tier tier, int64_t distance, int64_t m)
{
    int64_t squares = (m + SQUARE_LINES - 1) / SQUARE_LINES;
    if (tier == QLLM_TIER_EXACT || tier == QLLM_TIER_BF16X2) {
        int64_t most = distance == qllm_pair_distance(true) ? PANEL_SQUARES : 1;
        int64_t panels = (squares + most - 1) / most, each = (squares + panels - 1) / panels;
        return (m + panels * each - 1) / (panels * each) * each;
    }
    if (tier != QLLM_TIER_INT8 || m < LEAST_ROWS_INT8)
        return 0;
    return ((m + squares - 1) / squares + 3) / 4 * 4;
}

/* The instruction by name: its intrinsic needs a flag of its own. */
void qllm_pairs_activation_avx512amx(const float *x, int64_t cols, int64_t distance, int64_t rows,
                                     uint16_t *q)
{
    uint16_t columns[QLLM_GROUP];
    for (int64_t i = 0; i < QLLM_GROUP; i++)
        columns[i] = (uint16_t)(qllm_pair_column(i / 2, distance) + i % 2 * distance);
    __m512i order = _mm512_loadu_si512(columns);
    for (int64_t k = 0; k < cols; k += QLLM_GROUP, q += rows * QLLM_GROUP) {
        int64_t left = cols - k, high = left - 16;
        lanes lower = lanes_load_n(x + k, left < 16 ? left : 16);
        lanes upper = high > 0 ? lanes_load_n(x + k + 16, high < 16 ? high : 16) : lanes_zero();
        __m512i both;
        __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(lower), "v"(upper));
        _mm512_storeu_si512(q, _mm512_permutexvar_epi16(order, both));
    }
}

void qllm_linear_avx512amx(const qllm_packed *weight, const float *bias, const qllm_rows *rows,
                           int64_t tile_begin, int64_t tile_end, float *y, int64_t y_stride)
{
    if (rows->tier == QLLM_TIER_BF16X2 && weight->layout == QLLM_LAYOUT_BF16)
        qllm_linear_bf16_avx512amx(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else if (rows->tier == QLLM_TIER_BF16X2 && rows->m <= SQUARE_LINES)
        qllm_linear_4bit_square_avx512amx(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else if (rows->tier == QLLM_TIER_BF16X2)
        qllm_linear_4bit_avx512amx(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else if (weight->layout == QLLM_LAYOUT_INT8)
        qllm_linear_int8_avx512amx(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else if (rows->panel > 0)
        qllm_linear_4bit_int8_avx512amx(weight, bias, rows, tile_begin, tile_end, y, y_stride);
    else
        qllm_linear_avx512vbmi(weight, bias, rows, tile_begin, tile_end, y, y_stride);
}

const char *qllm_linear_name_avx512amx(const qllm_packed *weight, qllm_tier tier, int64_t m)
{
    static const char *const pairs[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_BF16] = "bf16 " LANES_ISA ", bf16x2 activations",
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", bf16x2 activations",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", bf16x2 activations",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", bf16x2 activations",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", bf16x2 activations",
    };
    static const char *const panels[QLLM_FORMAT_COUNT] = {
        [QLLM_FORMAT_NF4] = "nf4 " LANES_ISA ", int8 activations, panels of rows",
        [QLLM_FORMAT_FP4] = "fp4 " LANES_ISA ", int8 activations, panels of rows",
        [QLLM_FORMAT_NF4_DQ] = "nf4-dq " LANES_ISA ", int8 activations, panels of rows",
        [QLLM_FORMAT_FP4_DQ] = "fp4-dq " LANES_ISA ", int8 activations, panels of rows",
    };
    if (tier == QLLM_TIER_BF16X2)
        return pairs[weight->format];
    if (tier == QLLM_TIER_INT8 && qllm_panel_rows_avx512amx(tier, 0, m) > 0)
        return panels[weight->format];
    if (weight->layout == QLLM_LAYOUT_INT8)
        return "int8 " LANES_ISA ", panels of rows";
    return linear_any_name(weight, tier, m);
}
