/* Eight float64 and eight uint64 lanes in two 256-bit registers: see dlanes_scalar.h for what each
 * function means. */
#ifndef QLLM_CPU_DLANES_AVX2_H
#define QLLM_CPU_DLANES_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#include "core/exp.h"
#include "cpu/inline.h"

enum { QLANES_SIDE_BY_SIDE = 1 };

typedef struct dlanes { __m256d low, high; } dlanes;
typedef struct qlanes { __m256i low, high; } qlanes;

QLLM_INLINE dlanes dlanes_set1(double x)
{
    return (dlanes){_mm256_set1_pd(x), _mm256_set1_pd(x)};
}

QLLM_INLINE dlanes dlanes_load(const double *p)
{
    return (dlanes){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}

QLLM_INLINE void dlanes_store(double *p, dlanes a)
{
    _mm256_storeu_pd(p, a.low);
    _mm256_storeu_pd(p + 4, a.high);
}

QLLM_INLINE dlanes dlanes_load_float(const float *p)
{
    return (dlanes){_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}

QLLM_INLINE dlanes dlanes_add(dlanes a, dlanes b)
{
    return (dlanes){_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
}

QLLM_INLINE dlanes dlanes_sub(dlanes a, dlanes b)
{
    return (dlanes){_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)};
}

QLLM_INLINE dlanes dlanes_mul(dlanes a, dlanes b)
{
    return (dlanes){_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)};
}

QLLM_INLINE dlanes dlanes_div(dlanes a, dlanes b)
{
    return (dlanes){_mm256_div_pd(a.low, b.low), _mm256_div_pd(a.high, b.high)};
}

QLLM_INLINE dlanes dlanes_fma(dlanes a, dlanes b, dlanes c)
{
    return (dlanes){_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}

QLLM_INLINE dlanes dlanes_max(dlanes a, dlanes b)
{
    return (dlanes){_mm256_max_pd(a.low, b.low), _mm256_max_pd(a.high, b.high)};
}

QLLM_INLINE dlanes dlanes_abs(dlanes a)
{
    __m256d sign = _mm256_set1_pd(-0.0);
    return (dlanes){_mm256_andnot_pd(sign, a.low), _mm256_andnot_pd(sign, a.high)};
}

QLLM_INLINE dlanes dlanes_keep(dlanes x, dlanes limit, dlanes value)
{
    return (dlanes){_mm256_and_pd(_mm256_cmp_pd(x.low, limit.low, _CMP_GE_OQ), value.low),
                    _mm256_and_pd(_mm256_cmp_pd(x.high, limit.high, _CMP_GE_OQ), value.high)};
}

typedef const uint64_t *dlanes_table;

QLLM_INLINE dlanes_table dlanes_table_load(const uint64_t table[16]) { return table; }

QLLM_INLINE __m256d power_half(dlanes_table table, __m256d t)
{
    __m256i bits = _mm256_castpd_si256(t);
    __m256i index = _mm256_and_si256(bits, _mm256_set1_epi64x(15));
    __m256i entry = _mm256_i64gather_epi64((const long long *)(const void *)table, index, 8);
    return _mm256_castsi256_pd(_mm256_add_epi64(entry, _mm256_slli_epi64(bits, 48)));
}

QLLM_INLINE dlanes dlanes_power(dlanes_table table, dlanes t)
{
    return (dlanes){power_half(table, t.low), power_half(table, t.high)};
}

QLLM_INLINE qlanes qlanes_set1(uint64_t x)
{
    return (qlanes){_mm256_set1_epi64x((long long)x), _mm256_set1_epi64x((long long)x)};
}

QLLM_INLINE qlanes qlanes_add(qlanes a, qlanes b)
{
    return (qlanes){_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}

QLLM_INLINE qlanes qlanes_count(uint64_t x)
{
    return qlanes_add(qlanes_set1(x), (qlanes){_mm256_set_epi64x(3, 2, 1, 0),
                                               _mm256_set_epi64x(7, 6, 5, 4)});
}

QLLM_INLINE qlanes qlanes_xor3(qlanes a, qlanes b, qlanes c)
{
    return (qlanes){_mm256_xor_si256(_mm256_xor_si256(a.low, b.low), c.low),
                    _mm256_xor_si256(_mm256_xor_si256(a.high, b.high), c.high)};
}

QLLM_INLINE qlanes qlanes_mul(qlanes a, qlanes b)
{
    return (qlanes){_mm256_mul_epu32(a.low, b.low), _mm256_mul_epu32(a.high, b.high)};
}

QLLM_INLINE qlanes qlanes_high(qlanes a)
{
    return (qlanes){_mm256_srli_epi64(a.low, 32), _mm256_srli_epi64(a.high, 32)};
}

/* the words of four blocks */
QLLM_INLINE void store_words_half(uint32_t words[16], __m256i c0, __m256i c1, __m256i c2,
                                  __m256i c3)
{
    __m256i a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    __m256i b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256((__m256i *)(void *)words, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(void *)(words + 8),
                        _mm256_permute2x128_si256(even, odd, 0x31));
}

QLLM_INLINE void qlanes_store_words(uint32_t words[32], const qlanes c[4])
{
    store_words_half(words, c[0].low, c[1].low, c[2].low, c[3].low);
    store_words_half(words + 16, c[0].high, c[1].high, c[2].high, c[3].high);
}

#endif
