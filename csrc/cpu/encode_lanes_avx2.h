/* Encoding with two 256-bit registers: see encode_lanes_scalar.h for what each function means. */
#ifndef QLLM_CPU_ENCODE_LANES_AVX2_H
#define QLLM_CPU_ENCODE_LANES_AVX2_H

#include <string.h>

#include "cpu/encode.h"
#include "cpu/lanes_avx2.h"

QLLM_INLINE void ilanes_store(void *p, ilanes a)
{
    __m256i *at = p;
    _mm256_storeu_si256(at, a.low);
    _mm256_storeu_si256(at + 1, a.high);
}

QLLM_INLINE ilanes ilanes_load_bytes(const void *p, int64_t n)
{
    uint8_t bytes[64] = {0};
    if (n == 64)
        return ilanes_load(p);
    memcpy(bytes, p, (size_t)n);
    return ilanes_load(bytes);
}

QLLM_INLINE void ilanes_store_bytes(void *p, ilanes a, int64_t n)
{
    uint8_t bytes[64];
    ilanes_store(n == 64 ? p : bytes, a);
    if (n < 64)
        memcpy(p, bytes, (size_t)n);
}

QLLM_INLINE ilanes ilanes_sub(ilanes a, ilanes b)
{
    return (ilanes){_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}

QLLM_INLINE ilanes ilanes_negative(ilanes a)
{
    return (ilanes){_mm256_srai_epi32(a.low, 31), _mm256_srai_epi32(a.high, 31)};
}

QLLM_INLINE lanes ilanes_as_float(ilanes a)
{
    return (lanes){_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)};
}

QLLM_INLINE __m256 load_bf16_half(const __m128i *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16));
}

QLLM_INLINE lanes lanes_load_bf16(const void *p)
{
    const __m128i *at = p;
    return (lanes){load_bf16_half(at), load_bf16_half(at + 1)};
}

/* shufps takes pairs within 128 bits; vpermpd puts the four pairs in order */
QLLM_INLINE __m256 in_order(__m256 a)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}

QLLM_INLINE void lanes_deinterleave(lanes a, lanes b, lanes *even, lanes *odd)
{
    *even = (lanes){in_order(_mm256_shuffle_ps(a.low, a.high, 0x88)),
                    in_order(_mm256_shuffle_ps(b.low, b.high, 0x88))};
    *odd = (lanes){in_order(_mm256_shuffle_ps(a.low, a.high, 0xdd)),
                   in_order(_mm256_shuffle_ps(b.low, b.high, 0xdd))};
}

QLLM_INLINE __m256 round_f16_half(__m256 a)
{
    return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

QLLM_INLINE lanes lanes_round_f16(lanes a)
{
    return (lanes){round_f16_half(a.low), round_f16_half(a.high)};
}

QLLM_INLINE ilanes ilanes_max_halves(ilanes a, ilanes b)
{
    return (ilanes){_mm256_max_epu16(a.low, b.low), _mm256_max_epu16(a.high, b.high)};
}

QLLM_INLINE uint32_t ilanes_max_all_halves(ilanes a)
{
    __m256i b = _mm256_max_epu16(a.low, a.high);
    __m128i c = _mm_max_epu16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    __m128i ones = _mm_set1_epi32(-1); /* the minimum of complements */
    return (uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(c, ones))) % 65536u ^ 65535u;
}

QLLM_INLINE __m256i exceeds_half(__m256 a, __m256 b)
{
    return _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)), 31);
}

QLLM_INLINE ilanes lanes_exceeds(lanes a, lanes b)
{
    return (ilanes){exceeds_half(a.low, b.low), exceeds_half(a.high, b.high)};
}

QLLM_INLINE void ilanes_store_low_bytes(uint8_t *p, ilanes a)
{
    __m256i mask = _mm256_set1_epi32(255);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.low, mask),
                                        _mm256_and_si256(a.high, mask));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packus_epi16(_mm256_castsi256_si128(words),
                                      _mm256_extracti128_si256(words, 1)));
}

QLLM_INLINE ilanes ilanes_from_float(lanes a)
{
    return (ilanes){_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)};
}

QLLM_INLINE void transpose_8x8(__m256i r[8])
{
    __m256i a[8], b[8];
    QLLM_UNROLL
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    QLLM_UNROLL
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    QLLM_UNROLL
    for (int j = 0; j < 4; j++) {
        r[j] = _mm256_permute2x128_si256(b[j], b[j + 4], 0x20);
        r[j + 4] = _mm256_permute2x128_si256(b[j], b[j + 4], 0x31);
    }
}

/* Four squares of 8 x 8; those beside the diagonal change places. */
QLLM_INLINE void ilanes_transpose(ilanes rows[16])
{
    __m256i square[8], other[8];
    for (int corner = 0; corner < 16; corner += 8) {
        for (int i = 0; i < 8; i++)
            square[i] = corner == 0 ? rows[i].low : rows[i + 8].high;
        transpose_8x8(square);
        for (int i = 0; i < 8; i++)
            if (corner == 0)
                rows[i].low = square[i];
            else
                rows[i + 8].high = square[i];
    }
    for (int i = 0; i < 8; i++) {
        square[i] = rows[i].high;
        other[i] = rows[i + 8].low;
    }
    transpose_8x8(square);
    transpose_8x8(other);
    for (int i = 0; i < 8; i++) {
        rows[i].high = other[i];
        rows[i + 8].low = square[i];
    }
}

/* In each 128 bits the low halves first, then the 64-bit parts in order. */
QLLM_INLINE __m256i split_half(__m256i a)
{
    const __m256i index = _mm256_setr_epi8(
        0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7,
        10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, index), 0xd8);
}

QLLM_INLINE ilanes ilanes_split_halves(ilanes a)
{
    __m256i low = split_half(a.low), high = split_half(a.high);
    return (ilanes){_mm256_permute2x128_si256(low, high, 0x20),
                    _mm256_permute2x128_si256(low, high, 0x31)};
}

QLLM_INLINE ilanes ilanes_join_halves(ilanes a)
{
    __m256i low = _mm256_unpacklo_epi16(a.low, a.high);
    __m256i high = _mm256_unpackhi_epi16(a.low, a.high);
    return (ilanes){_mm256_permute2x128_si256(low, high, 0x20),
                    _mm256_permute2x128_si256(low, high, 0x31)};
}

/* A search in four steps: the thresholds that each step asks about, by what is known so far. */
typedef struct lanes_coder {
    __m256 first, second[2], third, fourth;
    __m256i codes; /* bytes */
} lanes_coder;

QLLM_INLINE lanes_coder lanes_coder_load(const qllm_code_table *table)
{
    const float *t = table->thresholds;
    __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)table->codes);
    return (lanes_coder){
        _mm256_set1_ps(t[7]),
        {_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])},
        _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
        _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
        _mm256_broadcastsi128_si256(codes)};
}

/* The number of thresholds below x; a comparison that holds is -1. */
QLLM_INLINE __m256i thresholds_below(const lanes_coder *coder, __m256 x)
{
    __m256 above = _mm256_cmp_ps(x, coder->first, _CMP_GT_OQ);
    __m256 asked = _mm256_blendv_ps(coder->second[0], coder->second[1], above);
    __m256i known = _mm256_castps_si256(above);
    known = _mm256_add_epi32(known, known);
    known = _mm256_add_epi32(known, _mm256_castps_si256(_mm256_cmp_ps(x, asked, _CMP_GT_OQ)));
    known = _mm256_sub_epi32(_mm256_setzero_si256(), known); /* 0 .. 3 */
    asked = _mm256_permutevar8x32_ps(coder->third, known);
    known = _mm256_sub_epi32(_mm256_add_epi32(known, known),
                             _mm256_castps_si256(_mm256_cmp_ps(x, asked, _CMP_GT_OQ)));
    asked = _mm256_permutevar8x32_ps(coder->fourth, known);
    return _mm256_sub_epi32(_mm256_add_epi32(known, known),
                            _mm256_castps_si256(_mm256_cmp_ps(x, asked, _CMP_GT_OQ)));
}

/* pshufb gives 0 for the bytes of the index that are negative */
QLLM_INLINE __m256i code_half(const lanes_coder *coder, bool is_fp4, __m256 x)
{
    __m256i below = thresholds_below(coder, x);
    if (!is_fp4)
        return below;
    below = _mm256_or_si256(below, _mm256_set1_epi32((int)0x80808000u));
    return _mm256_shuffle_epi8(coder->codes, below);
}

QLLM_INLINE ilanes lanes_code_pairs(lanes_coder coder, bool is_fp4, lanes even, lanes odd)
{
    return (ilanes){
        _mm256_or_si256(_mm256_slli_epi32(code_half(&coder, is_fp4, even.low), 4),
                        code_half(&coder, is_fp4, odd.low)),
        _mm256_or_si256(_mm256_slli_epi32(code_half(&coder, is_fp4, even.high), 4),
                        code_half(&coder, is_fp4, odd.high))};
}

typedef struct value_table { __m256 below, above; } value_table;

QLLM_INLINE value_table value_table_load(const float code[16])
{
    return (value_table){_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}

/* The codes of 4 bytes: each byte in a quadword, its high half in the lower dword. */
QLLM_INLINE __m256 values_half(value_table table, const uint8_t *bytes)
{
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(word));
    __m256i index = _mm256_or_si256(_mm256_srli_epi32(wide, 4), _mm256_slli_epi64(wide, 32));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.below, index),
                            _mm256_permutevar8x32_ps(table.above, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

QLLM_INLINE lanes lanes_values(value_table table, const uint8_t *bytes)
{
    return (lanes){values_half(table, bytes), values_half(table, bytes + 4)};
}

#endif
