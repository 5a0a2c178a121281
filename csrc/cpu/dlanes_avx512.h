/* Eight float64 and eight uint64 lanes in one 512-bit register: see dlanes_scalar.h for what each
 * function means. */
#ifndef QLLM_CPU_DLANES_AVX512_H
#define QLLM_CPU_DLANES_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "core/exp.h"
#include "cpu/inline.h"

enum { QLANES_SIDE_BY_SIDE = 2 };

typedef __m512d dlanes;
typedef __m512i qlanes;

QLLM_INLINE dlanes dlanes_set1(double x) { return _mm512_set1_pd(x); }
QLLM_INLINE dlanes dlanes_load(const double *p) { return _mm512_loadu_pd(p); }
QLLM_INLINE void dlanes_store(double *p, dlanes a) { _mm512_storeu_pd(p, a); }
QLLM_INLINE dlanes dlanes_load_float(const float *p)
{
    return _mm512_cvtps_pd(_mm256_loadu_ps(p));
}
QLLM_INLINE dlanes dlanes_add(dlanes a, dlanes b) { return _mm512_add_pd(a, b); }
QLLM_INLINE dlanes dlanes_sub(dlanes a, dlanes b) { return _mm512_sub_pd(a, b); }
QLLM_INLINE dlanes dlanes_mul(dlanes a, dlanes b) { return _mm512_mul_pd(a, b); }
QLLM_INLINE dlanes dlanes_div(dlanes a, dlanes b) { return _mm512_div_pd(a, b); }
QLLM_INLINE dlanes dlanes_fma(dlanes a, dlanes b, dlanes c) { return _mm512_fmadd_pd(a, b, c); }
QLLM_INLINE dlanes dlanes_max(dlanes a, dlanes b) { return _mm512_max_pd(a, b); }
QLLM_INLINE dlanes dlanes_abs(dlanes a) { return _mm512_andnot_pd(_mm512_set1_pd(-0.0), a); }
QLLM_INLINE dlanes dlanes_keep(dlanes x, dlanes limit, dlanes value)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, limit, _CMP_GE_OQ), value);
}

typedef struct dlanes_table { __m512i below, above; } dlanes_table; /* entries 0 .. 7, 8 .. 15 */

QLLM_INLINE dlanes_table dlanes_table_load(const uint64_t table[16])
{
    return (dlanes_table){_mm512_loadu_si512(table), _mm512_loadu_si512(table + 8)};
}

/* vpermt2q reads the four low bits of an index */
QLLM_INLINE dlanes dlanes_power(dlanes_table table, dlanes t)
{
    __m512i bits = _mm512_castpd_si512(t);
    __m512i entry = _mm512_permutex2var_epi64(table.below, bits, table.above);
    return _mm512_castsi512_pd(_mm512_add_epi64(entry, _mm512_slli_epi64(bits, 48)));
}

QLLM_INLINE qlanes qlanes_set1(uint64_t x) { return _mm512_set1_epi64((long long)x); }
QLLM_INLINE qlanes qlanes_count(uint64_t x)
{
    return _mm512_add_epi64(qlanes_set1(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
QLLM_INLINE qlanes qlanes_add(qlanes a, qlanes b) { return _mm512_add_epi64(a, b); }
QLLM_INLINE qlanes qlanes_xor3(qlanes a, qlanes b, qlanes c)
{
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
QLLM_INLINE qlanes qlanes_mul(qlanes a, qlanes b) { return _mm512_mul_epu32(a, b); }
QLLM_INLINE qlanes qlanes_high(qlanes a) { return _mm512_srli_epi64(a, 32); }

QLLM_INLINE void qlanes_store_words(uint32_t words[32], const qlanes c[4])
{
    const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    __m512i a = _mm512_mask_blend_epi32(0xaaaa, c[0], _mm512_slli_epi64(c[1], 32));
    __m512i b = _mm512_mask_blend_epi32(0xaaaa, c[2], _mm512_slli_epi64(c[3], 32));
    _mm512_storeu_si512(words, _mm512_permutex2var_epi64(a, first, b));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64(a, second, b));
}

#endif
