/* Encoding with one 512-bit register: see encode_lanes_scalar.h for what each function means. */
#ifndef QLLM_CPU_ENCODE_LANES_AVX512_H
#define QLLM_CPU_ENCODE_LANES_AVX512_H

#include "cpu/encode.h"
#include "cpu/lanes_avx512.h"

QLLM_INLINE void ilanes_store(void *p, ilanes a) { _mm512_storeu_si512(p, a); }

QLLM_INLINE __mmask64 first_bytes(int64_t n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}

QLLM_INLINE ilanes ilanes_load_bytes(const void *p, int64_t n)
{
    return _mm512_maskz_loadu_epi8(first_bytes(n), p);
}

QLLM_INLINE void ilanes_store_bytes(void *p, ilanes a, int64_t n)
{
    _mm512_mask_storeu_epi8(p, first_bytes(n), a);
}

QLLM_INLINE ilanes ilanes_sub(ilanes a, ilanes b) { return _mm512_sub_epi32(a, b); }
QLLM_INLINE ilanes ilanes_negative(ilanes a) { return _mm512_srai_epi32(a, 31); }
QLLM_INLINE lanes ilanes_as_float(ilanes a) { return _mm512_castsi512_ps(a); }

QLLM_INLINE lanes lanes_load_bf16(const void *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

QLLM_INLINE void lanes_deinterleave(lanes a, lanes b, lanes *even, lanes *odd)
{
    const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                            30);
    *even = _mm512_permutex2var_ps(a, index, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(index, _mm512_set1_epi32(1)), b);
}

QLLM_INLINE lanes lanes_round_f16(lanes a)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

QLLM_INLINE ilanes ilanes_max_halves(ilanes a, ilanes b) { return _mm512_max_epu16(a, b); }

QLLM_INLINE uint32_t ilanes_max_all_halves(ilanes a)
{
    __m256i b = _mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i c = _mm_max_epu16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    __m128i ones = _mm_set1_epi32(-1); /* the minimum of complements */
    return (uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(c, ones))) % 65536u ^ 65535u;
}

QLLM_INLINE ilanes lanes_exceeds(lanes a, lanes b)
{
    return _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), 1);
}

QLLM_INLINE void ilanes_store_low_bytes(uint8_t *p, ilanes a)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(a));
}

QLLM_INLINE ilanes ilanes_from_float(lanes a) { return _mm512_cvttps_epi32(a); }

/* Pairs of rows, of pairs, of fours (within 128 bits), then 128-bit parts of 4 x 4 rows. */
QLLM_INLINE void ilanes_transpose(ilanes rows[16])
{
    __m512i a[16], b[16];
    QLLM_UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    QLLM_UNROLL
    for (int i = 0; i < 16; i += 4) { /* b[i + j]: column 4 q + j of rows i .. i + 3 in part q */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    QLLM_UNROLL
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x44);
        __m512i high = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xee);
        __m512i low2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x44);
        __m512i high2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xee);
        rows[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[j + 8] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[j + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

/* even 16-bit elements first, and their inverse */
QLLM_INLINE ilanes ilanes_split_halves(ilanes a)
{
    const __m512i index = _mm512_set_epi16(
        31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22, 20, 18, 16,
        14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(index, a);
}

QLLM_INLINE ilanes ilanes_join_halves(ilanes a)
{
    const __m512i index = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(index, a);
}

typedef struct lanes_coder {
    __m512 threshold[2];
    __m512i base[2], codes;
    __m512 extra[2];
} lanes_coder;

QLLM_INLINE lanes_coder lanes_coder_load(const qllm_code_table *table)
{
    lanes_coder coder;
    for (int i = 0; i < 2; i++) {
        coder.threshold[i] = _mm512_loadu_ps(table->bin_threshold + 16 * i);
        coder.base[i] = _mm512_loadu_si512(table->base + 16 * i);
        coder.extra[i] = _mm512_set1_ps(table->extra[i]);
    }
    const __m128i *codes = (const void *)table->codes;
    coder.codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes));
    return coder;
}

/* The number of thresholds below x.  The low bits of x * scale + 1.5 * 2^23 + 16 are the bin, and
 * the permutes read five of them. */
QLLM_INLINE __m512i thresholds_below(const lanes_coder *coder, bool is_fp4, __m512 x)
{
    const __m512i one = _mm512_set1_epi32(1);
    __m512i bin = _mm512_castps_si512(_mm512_fmadd_ps(x, _mm512_set1_ps(QLLM_BIN_SCALE),
                                                      _mm512_set1_ps(12582912.0f + 16.0f)));
    __m512 threshold = _mm512_permutex2var_ps(coder->threshold[0], bin, coder->threshold[1]);
    __m512i below = _mm512_permutex2var_epi32(coder->base[0], bin, coder->base[1]);
    below = _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ), below, one);
    for (int i = 0; is_fp4 && i < 2; i++)
        below = _mm512_mask_add_epi32(
            below, _mm512_cmp_ps_mask(x, coder->extra[i], _CMP_GT_OQ), below, one);
    return below;
}

QLLM_INLINE ilanes lanes_code_pairs(lanes_coder coder, bool is_fp4, lanes even, lanes odd)
{
    __m512i high = thresholds_below(&coder, is_fp4, even);
    __m512i low = thresholds_below(&coder, is_fp4, odd);
    if (is_fp4) {
        high = _mm512_permutexvar_epi32(high, coder.codes);
        low = _mm512_permutexvar_epi32(low, coder.codes);
    }
    return _mm512_or_si512(_mm512_slli_epi32(high, 4), low);
}

typedef __m512 value_table;

QLLM_INLINE value_table value_table_load(const float code[16]) { return _mm512_loadu_ps(code); }

/* Each byte in a quadword, its high half in the lower dword; vpermps reads four bits. */
QLLM_INLINE lanes lanes_values(value_table table, const uint8_t *bytes)
{
    __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)bytes));
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi64(wide, 32));
    return _mm512_permutexvar_ps(index, table);
}

#endif
