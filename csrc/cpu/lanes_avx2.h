/* Sixteen float lanes in two 256-bit registers: see lanes_scalar.h for what each function means. */
#ifndef QLLM_CPU_LANES_AVX2_H
#define QLLM_CPU_LANES_AVX2_H

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"
#include "core/elementary.h"
#include "cpu/inline.h"

#define LANES_ISA "avx2"
#define LANES_UNROLL QLLM_UNROLL
#define LANES_UNROLL_GROUP /* long enough without */
enum {
    LANES_FUSED_ROWS = 2,
    LANES_FUSED_CHAINS = 1,
    LANES_BLOCK_ROWS = 6, /* 12 sums, 2 weights and one value of x in 16 registers */
    LANES_BLOCK_TILES = 1,
    LANES_INT8_TILES = 1,
    LANES_ATTENTION_SUMS = 4,
    LANES_INTEGER_ROWS = 2,
    LANES_INTEGER_CHAINS = 1
};

typedef struct lanes { __m256 low, high; } lanes;
typedef struct ilanes { __m256i low, high; } ilanes;

QLLM_INLINE lanes lanes_set1(float x)
{
    __m256 v = _mm256_set1_ps(x);
    return (lanes){v, v};
}

QLLM_INLINE lanes lanes_zero(void)
{
    return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()};
}

QLLM_INLINE lanes lanes_load(const float *p)
{
    return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

/* all ones in the lanes below n, which may be negative or above 8 */
QLLM_INLINE __m256i first_lanes(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

QLLM_INLINE lanes lanes_load_n(const float *p, int64_t n)
{
    if (n == 16)
        return lanes_load(p);
    return (lanes){_mm256_maskload_ps(p, first_lanes(n)),
                   n > 8 ? _mm256_maskload_ps(p + 8, first_lanes(n - 8)) : _mm256_setzero_ps()};
}

QLLM_INLINE void lanes_store(float *p, lanes a)
{
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}

QLLM_INLINE void lanes_store_n(float *p, lanes a, int64_t n)
{
    if (n == 16) {
        lanes_store(p, a);
        return;
    }
    _mm256_maskstore_ps(p, first_lanes(n), a.low);
    if (n > 8)
        _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.high);
}

QLLM_INLINE lanes lanes_add(lanes a, lanes b)
{
    return (lanes){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_sub(lanes a, lanes b)
{
    return (lanes){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_mul(lanes a, lanes b)
{
    return (lanes){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_div(lanes a, lanes b)
{
    return (lanes){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return (lanes){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

QLLM_INLINE lanes lanes_add_product(lanes sum, lanes a, lanes b)
{
    return lanes_fma(a, b, sum);
}

QLLM_INLINE lanes lanes_max(lanes a, lanes b)
{
    return (lanes){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_min(lanes a, lanes b)
{
    return (lanes){_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

QLLM_INLINE lanes lanes_negate(lanes a)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (lanes){_mm256_xor_ps(a.low, sign), _mm256_xor_ps(a.high, sign)};
}

QLLM_INLINE lanes lanes_abs(lanes a)
{
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (lanes){_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}

QLLM_INLINE lanes lanes_where_negative(lanes x, lanes a, lanes b)
{
    __m256 zero = _mm256_setzero_ps();
    return (lanes){_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, zero, _CMP_LT_OQ)),
                   _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, zero, _CMP_LT_OQ))};
}

QLLM_INLINE uint32_t lanes_not_below(lanes a, float limit)
{
    __m256 bound = _mm256_set1_ps(limit);
    int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, bound, _CMP_NLT_UQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, bound, _CMP_NLT_UQ));
    return (uint32_t)(low | high << 8);
}

QLLM_INLINE float lanes_sum(lanes a)
{
    __m256 b = _mm256_add_ps(a.low, a.high);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

QLLM_INLINE float lanes_max_all(lanes a)
{
    __m256 b = _mm256_max_ps(a.low, a.high);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

QLLM_INLINE __m256 scale_half(__m256 p, __m256 t)
{
    __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t),
                                 _mm256_castps_si256(_mm256_set1_ps(QLLM_EXP_ROUND)));
    __m256i half = _mm256_srai_epi32(n, 1), one = _mm256_set1_epi32(127);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, one), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), one), 23);
    return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}

QLLM_INLINE lanes lanes_scale(lanes p, lanes t)
{
    return (lanes){scale_half(p.low, t.low), scale_half(p.high, t.high)};
}

QLLM_INLINE __m128i nearest_int16(__m256 a)
{
    __m256 whole = _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i nearest = _mm256_cvttps_epi32(whole);
    return _mm_packs_epi32(_mm256_castsi256_si128(nearest), _mm256_extracti128_si256(nearest, 1));
}

QLLM_INLINE void lanes_store_int8(int8_t *p, lanes a)
{
    _mm_storeu_si128((__m128i *)(void *)p,
                     _mm_packs_epi16(nearest_int16(a.low), nearest_int16(a.high)));
}

/* of 8 columns: 1 3 5 7 0 2 4 6 */
QLLM_INLINE void lanes_store_int16(int16_t *p, lanes a)
{
    const __m128i order = _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13);
    __m128i *at = (__m128i *)(void *)p;
    _mm_storeu_si128(at, _mm_shuffle_epi8(nearest_int16(a.low), order));
    _mm_storeu_si128(at + 1, _mm_shuffle_epi8(nearest_int16(a.high), order));
}

QLLM_INLINE void lanes_store_quads(int8_t *p, lanes a)
{
    const __m128i order = _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14);
    __m128i codes = _mm_packs_epi16(nearest_int16(a.low), nearest_int16(a.high));
    _mm_storeu_si128((__m128i *)(void *)p, _mm_shuffle_epi8(codes, order));
}

QLLM_INLINE ilanes ilanes_load(const void *p)
{
    const __m256i *at = p;
    return (ilanes){_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

QLLM_INLINE ilanes ilanes_set1(int32_t x)
{
    return (ilanes){_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}

QLLM_INLINE ilanes ilanes_add(ilanes a, ilanes b)
{
    return (ilanes){_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

QLLM_INLINE ilanes ilanes_and(ilanes a, ilanes b)
{
    return (ilanes){_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}

QLLM_INLINE ilanes ilanes_shift_right(ilanes a, int bits)
{
    return (ilanes){_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)};
}

QLLM_INLINE ilanes ilanes_max(ilanes a, ilanes b)
{
    return (ilanes){_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
}

QLLM_INLINE int32_t ilanes_max_all(ilanes a)
{
    __m256i b = _mm256_max_epi32(a.low, a.high);
    __m128i c = _mm_max_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}

QLLM_INLINE ilanes lanes_bits(lanes a)
{
    return (ilanes){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}

QLLM_INLINE lanes lanes_from_int(ilanes a)
{
    return (lanes){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}

QLLM_INLINE lanes lanes_gather(const float *base, ilanes index)
{
    return (lanes){_mm256_i32gather_ps(base, index.low, 4),
                   _mm256_i32gather_ps(base, index.high, 4)};
}

QLLM_INLINE __m256i unit_codes_half(__m256i half, int b)
{
    const __m256i shifts = _mm256_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24);
    __m256i dwords;
    switch (b) { /* dword b of each quarter */
    case 0: dwords = _mm256_shuffle_epi32(half, 0x00); break;
    case 1: dwords = _mm256_shuffle_epi32(half, 0x55); break;
    case 2: dwords = _mm256_shuffle_epi32(half, 0xaa); break;
    default: dwords = _mm256_shuffle_epi32(half, 0xff); break;
    }
    return _mm256_and_si256(_mm256_srlv_epi32(dwords, shifts), _mm256_set1_epi32(255));
}

QLLM_INLINE ilanes ilanes_unit_codes(ilanes line, int b)
{
    return (ilanes){unit_codes_half(line.low, b), unit_codes_half(line.high, b)};
}

typedef struct lanes_table { __m256 below, above; } lanes_table; /* codes 0 .. 7 and 8 .. 15 */

QLLM_INLINE lanes_table lanes_table_load(const float *values)
{
    return (lanes_table){_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}

/* vpermps reads three bits of an index; bit 3 of the code, moved to the sign, chooses the half. */
QLLM_INLINE __m256 lookup_half(lanes_table table, __m256i half, int shift)
{
    __m256i index = shift == 0 ? half : _mm256_srli_epi32(half, shift);
    __m256i sign = shift == 28 ? half : _mm256_slli_epi32(half, 28 - shift);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.below, index),
                            _mm256_permutevar8x32_ps(table.above, index),
                            _mm256_castsi256_ps(sign));
}

QLLM_INLINE lanes lanes_lookup(lanes_table table, const uint8_t *at, int j)
{
    ilanes line = ilanes_load(at);
    int shift = 8 * (j / 2) + (j % 2 == 0 ? 4 : 0);
    return (lanes){lookup_half(table, line.low, shift), lookup_half(table, line.high, shift)};
}

QLLM_INLINE lanes lanes_bf16_low(ilanes line)
{
    return (lanes){_mm256_castsi256_ps(_mm256_slli_epi32(line.low, 16)),
                   _mm256_castsi256_ps(_mm256_slli_epi32(line.high, 16))};
}

QLLM_INLINE lanes lanes_bf16_high(ilanes line)
{
    __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
    return (lanes){_mm256_castsi256_ps(_mm256_and_si256(line.low, mask)),
                   _mm256_castsi256_ps(_mm256_and_si256(line.high, mask))};
}

QLLM_INLINE lanes lanes_load_f16(const void *p)
{
    const __m128i *at = p;
    return (lanes){_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}

QLLM_INLINE ilanes ilanes_dot_start(const int32_t *row_sums)
{
    (void)row_sums;
    return ilanes_set1(0);
}

typedef __m256i ilanes_word;

QLLM_INLINE ilanes_word ilanes_dot_word(int32_t x) { return _mm256_set1_epi32(x); }

/* vpmaddubsw adds two products in int16 with saturation.  |w| is the unsigned side and x with the
 * sign of w the signed one: 2 * 127 * 128 = 32512 at most, so that nothing saturates, and
 * |x| <= 127 can be negated.  w = -128 would be right too, its magnitude being 128 as an unsigned
 * byte. */
QLLM_INLINE __m256i dot_half(__m256i sum, __m256i w, __m256i x)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

QLLM_INLINE ilanes ilanes_dot(ilanes sum, ilanes line, ilanes_word x)
{
    return (ilanes){dot_half(sum.low, line.low, x), dot_half(sum.high, line.high, x)};
}

typedef struct lanes_codes { __m256i low, high; } lanes_codes; /* bytes of the 16 codes */
typedef struct code_vectors { ilanes v[4]; } code_vectors;

QLLM_INLINE lanes_codes lanes_codes_load(const bool wide, const int16_t *codes)
{
    uint8_t low[16], high[16];
    (void)wide;
    for (int i = 0; i < 16; i++) {
        low[i] = (uint8_t)codes[i];
        high[i] = (uint8_t)((uint16_t)codes[i] >> 8);
    }
    return (lanes_codes){
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)low)),
        _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)high))};
}

/* Bytes of nibbles (4 a row) to two vectors of int16 pairs: vpshufb gives the low and the high
 * bytes, the unpacks join them for 2 rows each, the shuffles part the pairs. */
QLLM_INLINE void decode_pairs(lanes_codes codes, __m256i nibbles, __m256i *first, __m256i *second)
{
    __m256i low = _mm256_shuffle_epi8(codes.low, nibbles);
    __m256i high = _mm256_shuffle_epi8(codes.high, nibbles);
    __m256 upper = _mm256_castsi256_ps(_mm256_unpacklo_epi8(low, high));
    __m256 lower = _mm256_castsi256_ps(_mm256_unpackhi_epi8(low, high));
    *first = _mm256_castps_si256(_mm256_shuffle_ps(upper, lower, 0x88));
    *second = _mm256_castps_si256(_mm256_shuffle_ps(upper, lower, 0xdd));
}

QLLM_INLINE void decode_half(const bool wide, lanes_codes codes, __m256i line, __m256i *out)
{
    __m256i mask = _mm256_set1_epi8(15), odd = _mm256_and_si256(line, mask);
    __m256i even = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
    if (wide) {
        decode_pairs(codes, odd, &out[0], &out[1]);
        decode_pairs(codes, even, &out[2], &out[3]);
    } else {
        out[0] = _mm256_shuffle_epi8(codes.low, odd);
        out[1] = _mm256_shuffle_epi8(codes.low, even);
    }
}

QLLM_INLINE code_vectors lanes_decode(const bool wide, lanes_codes codes, const uint8_t *at)
{
    code_vectors out;
    __m256i low[4], high[4];
    const int vectors = wide ? 4 : 2;
    ilanes line = ilanes_load(at);
    decode_half(wide, codes, line.low, low);
    decode_half(wide, codes, line.high, high);
    LANES_UNROLL
    for (int j = 0; j < vectors; j++)
        out.v[j] = (ilanes){low[j], high[j]};
    return out;
}

QLLM_INLINE ilanes ilanes_codes_start(const bool wide, int32_t sum_of_x)
{
    (void)wide;
    (void)sum_of_x;
    return ilanes_set1(0);
}

QLLM_INLINE ilanes ilanes_dot_codes(const bool wide, ilanes sum, ilanes w, const void *x)
{
    int32_t dword;
    memcpy(&dword, x, sizeof dword);
    __m256i q = _mm256_set1_epi32(dword);
    if (!wide)
        return ilanes_dot(sum, w, q);
    return (ilanes){_mm256_add_epi32(sum.low, _mm256_madd_epi16(w.low, q)),
                    _mm256_add_epi32(sum.high, _mm256_madd_epi16(w.high, q))};
}

QLLM_INLINE void lanes_unit_values(const float *values, const uint8_t (*planes)[256], ilanes line,
                                   lanes *out)
{
    (void)planes;
    LANES_UNROLL
    for (int b = 0; b < 4; b++)
        out[b] = lanes_gather(values, ilanes_unit_codes(line, b));
}

QLLM_INLINE lanes lanes_int8_column(ilanes line, int b)
{
    __m128i left = _mm_cvtsi32_si128(24 - 8 * b);
    return (lanes){
        _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(line.low, left), 24)),
        _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(line.high, left), 24))};
}

#endif
