/* Sixteen float lanes in one 512-bit register: see lanes_scalar.h for what each function means. */
#ifndef QLLM_CPU_LANES_AVX512_H
#define QLLM_CPU_LANES_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "cpu/inline.h"

#define LANES_ISA "avx512"
#define LANES_UNROLL QLLM_UNROLL
enum {
    LANES_FUSED_ROWS = 4,
    LANES_FUSED_CHAINS = 2,
    LANES_BLOCK_ROWS = 6, /* 24 sums, 4 weights and one value of x in 32 registers */
    LANES_BLOCK_TILES = 4,
    LANES_ATTENTION_SUMS = 16
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

QLLM_INLINE lanes lanes_int8_column(ilanes line, int b)
{
    __m512i high = _mm512_sll_epi32(line, _mm_cvtsi32_si128(24 - 8 * b));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
}

#endif
