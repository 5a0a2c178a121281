/* Tier bf16x2: 4-bit weights by x rounded to bf16 in the matrix units (AMX).  The codes of a block
 * are looked up into squares, whose sums are scaled by the vector units. */
#define LANES_ISA "avx512amx"
#include "cpu/lanes_avx512.h"

#include "core/activation.h"
#include "core/linear_ref.h"
#include "cpu/kernels.h"
#include "cpu/squares.h"
#include "cpu/tile_stream.h"

enum { LINES = QLLM_GROUP / QLLM_STEP /* of codes in a square */ };

/* The 16 codes twice, since vpermw reads five bits of an index. */
static __m512i table_of(const qllm_packed *packed)
{
    return _mm512_broadcast_i64x4(
        _mm256_loadu_si256((const __m256i *)(const void *)packed->codes_bf16));
}

/* A line of codes into four lines of pairs.  Of the bytes of a dword, those of columns k to k + 7,
 * the low nibble is the odd column: shifted by 4, 0, 12 and 8 bits, the two words begin with k and
 * k + 4, k + 1 and k + 5, and so on. */
QLLM_INLINE void decode_line(__m512i table, const uint8_t *at, uint8_t *to)
{
    __m512i line = _mm512_loadu_si512(at);
    qllm_prefetch_codes(at);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), table));
    _mm512_store_si512(to + 64, _mm512_permutexvar_epi16(line, table));
    _mm512_store_si512(to + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), table));
    _mm512_store_si512(to + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), table));
}

/* y (SQUARE_LINES, 16) = a panel by a tile. */
QLLM_INLINE void multiply_panel(const bool nested, const qllm_packed *packed, int64_t tile,
                                const uint8_t *x, int64_t rows, float (*y)[16])
{
    int64_t groups = qllm_activation_block(packed->blocksize) / QLLM_GROUP;
    __m512i table = table_of(packed);
    tile_stream s;
    stream_open(&s, packed, tile);
    for (int64_t m = 0; m < rows; m++)
        lanes_store(y[m], lanes_zero());
    for (int64_t g = 0; g < s.groups; g += groups) {
        _Alignas(64) uint8_t w[SQUARE];
        _Alignas(64) float sums[SQUARE_LINES][16];
        read_unit_if_first(nested, &s, g);
        SQUARE_ZERO(0);
        for (int64_t i = 0; i < groups; i++, x += rows * QLLM_LINE) {
            const uint8_t *at = group_at(QLLM_LAYOUT_BLOCKS, nested, &s, g + i);
            for (int64_t line = 0; line < LINES; line++)
                decode_line(table, at + line * QLLM_LINE, w + 4 * line * QLLM_LINE);
            SQUARE_LOAD(4, w, QLLM_LINE);
            SQUARE_LOAD(6, x, QLLM_LINE);
            SQUARE_DOT_BF16(0, 6, 4);
        }
        SQUARE_STORE(0, sums);
        lanes absmax = scale_at(QLLM_LAYOUT_BLOCKS, nested, &s, g);
        for (int64_t m = 0; m < rows; m++)
            lanes_store(y[m], lanes_fma(absmax, lanes_load(sums[m]), lanes_load(y[m])));
    }
}

void qllm_linear_4bit_avx512amx(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                                int64_t begin, int64_t end, float *y, int64_t y_stride)
{
    squares_open(in->panel, QLLM_LINE);
    for (int64_t tile = begin; tile < end; tile++)
        for (int64_t row = 0; row < in->m; row += in->panel) {
            int64_t o = tile * QLLM_TILE_ROWS, left = packed->rows - o, n = left < 16 ? left : 16;
            const uint8_t *x = (const uint8_t *)in->q + row * in->q_stride;
            float sums[SQUARE_LINES][16];
            if (qllm_packed_nested(packed))
                multiply_panel(true, packed, tile, x, in->panel, sums);
            else
                multiply_panel(false, packed, tile, x, in->panel, sums);
            for (int64_t r = 0; r < in->panel && row + r < in->m; r++) {
                lanes value = lanes_mul(lanes_load(sums[r]), lanes_set1(packed->unit_bf16));
                if (bias != NULL)
                    value = lanes_add(value, lanes_load_n(bias + o, n));
                lanes_store_n(y + (row + r) * y_stride + o, value, n);
            }
        }
    squares_close();
}
