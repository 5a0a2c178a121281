/* 4-bit codes into squares of bf16, for the kernels of tier bf16x2.  Included after
 * lanes_avx512.h. */
#ifndef QLLM_CPU_SQUARES_CODES_H
#define QLLM_CPU_SQUARES_CODES_H

#include "cpu/packed_layout.h"
#include "cpu/squares.h"

enum { SQUARE_CODE_LINES = QLLM_GROUP / QLLM_STEP }; /* lines of codes in a square */

/* The 16 codes twice, since vpermw reads five bits of an index. */
QLLM_INLINE __m512i codes_table(const qllm_packed *packed)
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
    __asm__("" : "+v"(line)); /* or gcc loads it again for each shift */
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4), table));
    _mm512_store_si512(to + 64, _mm512_permutexvar_epi16(line, table));
    _mm512_store_si512(to + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), table));
    _mm512_store_si512(to + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), table));
}

/* Outputs of a tile of one row of x, from the sums of all its blocks. */
QLLM_INLINE void store_sums(const qllm_packed *packed, const float *bias, int64_t tile, lanes sums,
                            float *y)
{
    int64_t o = tile * QLLM_TILE_ROWS, n = qllm_tile_outputs(packed, tile);
    lanes value = lanes_mul(sums, lanes_set1(packed->unit_bf16));
    if (bias != NULL)
        value = lanes_add(value, lanes_load_n(bias + o, n));
    lanes_store_n(y + o, value, n);
}

#endif
