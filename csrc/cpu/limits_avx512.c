#include <immintrin.h>
#include <stddef.h>

#include "cpu/inline.h"
#include "cpu/limits_tables.h"

enum { READ_SUMS = 8, SUMS = 16 }; /* chains enough to hide the latency of every unit */

uint64_t qllm_read_avx512(const uint8_t *data, int64_t bytes)
{
    __m512i sum[READ_SUMS];
    QLLM_UNROLL
    for (int i = 0; i < READ_SUMS; i++)
        sum[i] = _mm512_setzero_si512();
    for (const uint8_t *end = data + bytes; data < end; data += sizeof sum) {
        QLLM_UNROLL
        for (int i = 0; i < READ_SUMS; i++)
            sum[i] = _mm512_xor_si512(sum[i], _mm512_loadu_si512(data + 64 * i));
    }
    QLLM_UNROLL
    for (int i = 1; i < READ_SUMS; i++)
        sum[0] = _mm512_xor_si512(sum[0], sum[i]);
    uint64_t words[8], all = 0;
    _mm512_storeu_si512(words, sum[0]);
    for (int i = 0; i < 8; i++)
        all ^= words[i];
    return all;
}

static __m512i ones(qllm_unit unit)
{
    switch (unit) {
    case QLLM_UNIT_F32: return _mm512_castps_si512(_mm512_set1_ps(1.0f));
    case QLLM_UNIT_INT16: return _mm512_set1_epi16(1);
    case QLLM_UNIT_BF16: return _mm512_set1_epi16(0x3f80);
    default: return _mm512_set1_epi8(1);
    }
}

/* The instructions by name, since compilers copy sums around their intrinsics and bfloat16 would
 * need a flag of its own; volatile, so that equal products of equal ones are computed all the
 * same. */
QLLM_INLINE __m512i add_product(qllm_unit unit, __m512i sum, __m512i a, __m512i b)
{
    switch (unit) {
    case QLLM_UNIT_F32:
        __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        break;
    case QLLM_UNIT_INT16:
        __asm__ volatile("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        break;
    case QLLM_UNIT_BF16:
        __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        break;
    default:
        __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        break;
    }
    return sum;
}

static int64_t sum_of_lanes(qllm_unit unit, __m512i sum)
{
    int32_t whole[16];
    float real[16];
    int64_t all = 0;
    _mm512_storeu_si512(whole, sum);
    _mm512_storeu_ps(real, _mm512_castsi512_ps(sum));
    for (int i = 0; i < 16; i++)
        all += unit == QLLM_UNIT_F32 || unit == QLLM_UNIT_BF16 ? (int64_t)real[i] : whole[i];
    return all;
}

QLLM_INLINE int64_t multiply_ones(qllm_unit unit, int64_t turns)
{
    __m512i sum[SUMS], a = ones(unit), b = a;
    int64_t all = 0;
    QLLM_UNROLL
    for (int i = 0; i < SUMS; i++)
        sum[i] = _mm512_setzero_si512();
    for (int64_t turn = 0; turn < turns; turn++) {
        QLLM_UNROLL
        for (int i = 0; i < SUMS; i++)
            sum[i] = add_product(unit, sum[i], a, b);
    }
    for (int i = 0; i < SUMS; i++)
        all += sum_of_lanes(unit, sum[i]);
    return all;
}

int64_t qllm_multiply_avx512(qllm_unit unit, int64_t turns)
{
    switch (unit) {
    case QLLM_UNIT_F32: return multiply_ones(QLLM_UNIT_F32, turns);
    case QLLM_UNIT_INT16: return multiply_ones(QLLM_UNIT_INT16, turns);
    case QLLM_UNIT_BF16: return multiply_ones(QLLM_UNIT_BF16, turns);
    default: return multiply_ones(QLLM_UNIT_INT8, turns);
    }
}

const qllm_limits qllm_limits_avx512 = {
    .name = "avx512",
    .read = qllm_read_avx512,
    .multiply = qllm_multiply_avx512,
    .instruction = {[QLLM_UNIT_F32] = "vfmadd231ps zmm", [QLLM_UNIT_INT16] = "vpdpwssd zmm",
                    [QLLM_UNIT_INT8] = "vpdpbusd zmm", [QLLM_UNIT_BF16] = "vdpbf16ps zmm"},
};
