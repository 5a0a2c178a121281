/* Sixteen float lanes in one 512-bit register: see lanes_scalar.h for what each function means.
 * Files that are compiled with VBMI look up tables of bytes with it. */
#ifndef QLLM_CPU_LANES_AVX512_H
#define QLLM_CPU_LANES_AVX512_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "cpu/inline.h"

#if !defined(LANES_ISA) /* the sets beyond name themselves */
#define LANES_ISA "avx512"
#endif
#define LANES_UNROLL QLLM_UNROLL
#define LANES_UNROLL_GROUP QLLM_UNROLL_GROUP
enum {
    LANES_FUSED_ROWS = 4,
    LANES_FUSED_CHAINS = 2,
    LANES_BLOCK_ROWS = 6, /* 12 sums, 12 outputs, 2 weights and one value of x in 32 registers */
    LANES_BLOCK_TILES = 2,
    LANES_INT8_TILES = 4, /* 24 sums, 4 weights and one value of x */
    LANES_ATTENTION_SUMS = 16,
    LANES_INTEGER_ROWS = 8,
    LANES_INTEGER_CHAINS = 4
};

typedef __m512 lanes;
typedef __m512i ilanes;

QLLM_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)((1u << n) - 1u); }

QLLM_INLINE lanes lanes_set1(float x) { return _mm512_set1_ps(x); }
QLLM_INLINE lanes lanes_zero(void) { return _mm512_setzero_ps(); }
QLLM_INLINE lanes lanes_load(const float *p) { return _mm512_loadu_ps(p); }
QLLM_INLINE lanes lanes_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
QLLM_INLINE void lanes_store(float *p, lanes a) { _mm512_storeu_ps(p, a); }
QLLM_INLINE void lanes_store_n(float *p, lanes a, int64_t n)
{
    _mm512_mask_storeu_ps(p, first_lanes(n), a);
}

QLLM_INLINE lanes lanes_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
QLLM_INLINE lanes lanes_sub(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
QLLM_INLINE lanes lanes_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
QLLM_INLINE lanes lanes_div(lanes a, lanes b) { return _mm512_div_ps(a, b); }
QLLM_INLINE lanes lanes_fma(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
/* As an intrinsic, gcc 12 spills what is multiplied. */
QLLM_INLINE lanes lanes_add_product(lanes sum, lanes a, lanes b)
{
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
QLLM_INLINE lanes lanes_max(lanes a, lanes b) { return _mm512_max_ps(a, b); }
QLLM_INLINE lanes lanes_min(lanes a, lanes b) { return _mm512_min_ps(a, b); }
QLLM_INLINE lanes lanes_negate(lanes a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
QLLM_INLINE lanes lanes_abs(lanes a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }

QLLM_INLINE lanes lanes_where_negative(lanes x, lanes a, lanes b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, lanes_zero(), _CMP_LT_OQ), b, a);
}

QLLM_INLINE uint32_t lanes_not_below(lanes a, float limit)
{
    return _mm512_cmp_ps_mask(a, lanes_set1(limit), _CMP_NLT_UQ);
}

QLLM_INLINE float lanes_sum(lanes a)
{
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

QLLM_INLINE float lanes_max_all(lanes a)
{
    __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

QLLM_INLINE lanes lanes_scale(lanes p, lanes t)
{
    __m512i n = _mm512_sub_epi32(_mm512_castps_si512(t),
                                 _mm512_castps_si512(_mm512_set1_ps(QLLM_EXP_ROUND)));
    __m512i half = _mm512_srai_epi32(n, 1), one = _mm512_set1_epi32(127);
    __m512i a = _mm512_slli_epi32(_mm512_add_epi32(half, one), 23);
    __m512i b = _mm512_slli_epi32(_mm512_add_epi32(_mm512_sub_epi32(n, half), one), 23);
    return _mm512_mul_ps(_mm512_mul_ps(p, _mm512_castsi512_ps(a)), _mm512_castsi512_ps(b));
}

QLLM_INLINE void lanes_store_int8(int8_t *p, lanes a)
{
    __m512i nearest = _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(nearest));
}

/* of 8 columns: 1 5 0 4 3 7 2 6 */
QLLM_INLINE void lanes_store_int16(int16_t *p, lanes a)
{
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13));
    __m512i nearest = _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(void *)p,
                        _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(nearest), order));
}

/* of 8 columns: 1 3 5 7 0 2 4 6 */
QLLM_INLINE void lanes_store_quads(int8_t *p, lanes a)
{
    const __m128i order = _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14);
    __m512i nearest = _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_shuffle_epi8(_mm512_cvtepi32_epi8(nearest), order));
}

QLLM_INLINE ilanes ilanes_load(const void *p) { return _mm512_loadu_si512(p); }
QLLM_INLINE ilanes ilanes_set1(int32_t x) { return _mm512_set1_epi32(x); }
QLLM_INLINE ilanes ilanes_add(ilanes a, ilanes b) { return _mm512_add_epi32(a, b); }
QLLM_INLINE ilanes ilanes_and(ilanes a, ilanes b) { return _mm512_and_si512(a, b); }
QLLM_INLINE ilanes ilanes_shift_right(ilanes a, int bits)
{
    return _mm512_srli_epi32(a, (unsigned)bits);
}
QLLM_INLINE ilanes ilanes_max(ilanes a, ilanes b) { return _mm512_max_epi32(a, b); }
QLLM_INLINE int32_t ilanes_max_all(ilanes a) { return _mm512_reduce_max_epi32(a); }
QLLM_INLINE ilanes lanes_bits(lanes a) { return _mm512_castps_si512(a); }
QLLM_INLINE lanes lanes_from_int(ilanes a) { return _mm512_cvtepi32_ps(a); }
QLLM_INLINE lanes lanes_gather(const float *base, ilanes index)
{
    return _mm512_i32gather_ps(index, base, 4);
}

QLLM_INLINE ilanes ilanes_unit_codes(ilanes line, int b)
{
    const __m512i shifts = _mm512_set4_epi32(24, 16, 8, 0);
    __m512i dwords;
    switch (b) { /* dword b of each quarter */
    case 0: dwords = _mm512_shuffle_epi32(line, (_MM_PERM_ENUM)0x00); break;
    case 1: dwords = _mm512_shuffle_epi32(line, (_MM_PERM_ENUM)0x55); break;
    case 2: dwords = _mm512_shuffle_epi32(line, (_MM_PERM_ENUM)0xaa); break;
    default: dwords = _mm512_shuffle_epi32(line, (_MM_PERM_ENUM)0xff); break;
    }
    return _mm512_and_si512(_mm512_srlv_epi32(dwords, shifts), _mm512_set1_epi32(255));
}

typedef __m512 lanes_table;

QLLM_INLINE lanes_table lanes_table_load(const float *values) { return _mm512_loadu_ps(values); }

/* vpermps reads the four low bits of an index, so that the other nibbles need no masking; loads
 * 1 to 3 bytes further on replace the other shifts, which share their ports with vpermps.  A
 * load across two lines costs two, so that the aligned one serves all shifts: the empty asm keeps
 * gcc from loading it again for each. */
QLLM_INLINE lanes lanes_lookup(lanes_table table, const uint8_t *line, int j)
{
    __m512i codes = _mm512_loadu_si512(j == 1 || j % 2 == 0 ? line : line + j / 2);
    if (j == 1 || j % 2 == 0)
        __asm__("" : "+v"(codes));
    if (j % 2 == 0)
        codes = _mm512_srli_epi32(codes, 4u * (unsigned)j + 4u);
    return _mm512_permutexvar_ps(codes, table);
}

QLLM_INLINE lanes lanes_bf16_low(ilanes line)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(line, 16));
}

QLLM_INLINE lanes lanes_bf16_high(ilanes line)
{
    return _mm512_castsi512_ps(_mm512_and_si512(line, _mm512_set1_epi32((int)0xffff0000u)));
}

QLLM_INLINE lanes lanes_load_f16(const void *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* vpdpbusd takes unsigned times signed bytes: x + 128 is the unsigned side, so that the sum starts
 * at -128 times the sum of the weights.  Arithmetic is modulo 2^32, and the result fits. */
QLLM_INLINE ilanes ilanes_dot_start(const int32_t *row_sums)
{
    return _mm512_sub_epi32(_mm512_setzero_si512(),
                            _mm512_slli_epi32(_mm512_loadu_si512(row_sums), 7));
}

typedef __m512i ilanes_word;

QLLM_INLINE ilanes_word ilanes_dot_word(int32_t x)
{
    return _mm512_set1_epi32((int32_t)((uint32_t)x ^ 0x80808080u));
}

/* Through an asm operand that is read and written: as an intrinsic, gcc 12 copies and spills the
 * sums. */
QLLM_INLINE ilanes ilanes_dot(ilanes sum, ilanes line, ilanes_word x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(line));
    return sum;
}

typedef __m512i lanes_codes;
typedef struct code_vectors { ilanes v[4]; } code_vectors;

/* Wide: the 16 codes twice, since vpermw reads five bits of an index.  Else bytes + 128, the
 * unsigned side of vpdpbusd, in every quarter. */
QLLM_INLINE lanes_codes lanes_codes_load(const bool wide, const int16_t *codes)
{
    __m256i words = _mm256_loadu_si256((const __m256i *)(const void *)codes);
    if (wide)
        return _mm512_broadcast_i64x4(words);
    words = _mm256_add_epi16(words, _mm256_set1_epi16(128));
    return _mm512_broadcast_i32x4(_mm256_cvtepi16_epi8(words));
}

/* vpermw and vpermb ignore the bits above those they need, so that nothing is masked.  The empty
 * asm keeps gcc from loading the line again for each shift. */
QLLM_INLINE code_vectors lanes_decode(const bool wide, lanes_codes codes, const uint8_t *at)
{
    code_vectors out;
    __m512i line = _mm512_loadu_si512(at);
    __asm__("" : "+v"(line));
    __m512i upper = _mm512_srli_epi16(line, 4);
    if (wide) {
        out.v[0] = _mm512_permutexvar_epi16(line, codes);
        out.v[1] = _mm512_permutexvar_epi16(upper, codes);
        out.v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 8), codes);
        out.v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 12), codes);
        return out;
    }
#if defined(__AVX512VBMI__)
    out.v[0] = _mm512_permutexvar_epi8(line, codes);
    out.v[1] = _mm512_permutexvar_epi8(upper, codes);
#else
    __m512i mask = _mm512_set1_epi8(15);
    out.v[0] = _mm512_shuffle_epi8(codes, _mm512_and_si512(line, mask));
    out.v[1] = _mm512_shuffle_epi8(codes, _mm512_and_si512(upper, mask));
#endif
    return out;
}

QLLM_INLINE ilanes ilanes_codes_start(const bool wide, int32_t sum_of_x)
{
    return wide ? _mm512_setzero_si512() : _mm512_set1_epi32(-128 * sum_of_x);
}

/* x is broadcast by the instruction itself. */
QLLM_INLINE ilanes ilanes_dot_codes(const bool wide, ilanes sum, ilanes w, const void *x)
{
    const int32_t *q = x;
    if (wide)
        __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*q));
    else
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*q));
    return sum;
}

#if defined(__AVX512VBMI__)
/* 64 bytes of one plane of the table of 256. */
QLLM_INLINE __m512i lookup_plane(const uint8_t *plane, __m512i index)
{
    __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), index,
                                           _mm512_loadu_si512(plane + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(plane + 128), index,
                                            _mm512_loadu_si512(plane + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

/* The order of the codes in their line makes two unpacks of the planes give rows in order. */
QLLM_INLINE void lanes_unit_values(const float *values, const uint8_t (*planes)[256], ilanes line,
                                   lanes *out)
{
    (void)values;
    __m512i p0 = lookup_plane(planes[0], line), p1 = lookup_plane(planes[1], line);
    __m512i p2 = lookup_plane(planes[2], line), p3 = lookup_plane(planes[3], line);
    __m512i a = _mm512_unpacklo_epi8(p0, p1), b = _mm512_unpackhi_epi8(p0, p1);
    __m512i c = _mm512_unpacklo_epi8(p2, p3), d = _mm512_unpackhi_epi8(p2, p3);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, c));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, c));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(b, d));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(b, d));
}
#else
QLLM_INLINE void lanes_unit_values(const float *values, const uint8_t (*planes)[256], ilanes line,
                                   lanes *out)
{
    (void)planes;
    LANES_UNROLL
    for (int b = 0; b < 4; b++)
        out[b] = lanes_gather(values, ilanes_unit_codes(line, b));
}
#endif

QLLM_INLINE lanes lanes_int8_column(ilanes line, int b)
{
    __m512i high = _mm512_sll_epi32(line, _mm_cvtsi32_si128(24 - 8 * b));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
}

#endif
