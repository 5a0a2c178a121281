#include <immintrin.h>
#include <stddef.h>

#include "cpu/inline.h"
#include "cpu/limits_tables.h"

enum { READ_SUMS = 8, SUMS = 10 }; /* chains enough to hide the latency of every unit */

static uint64_t read_all(const uint8_t *data, int64_t bytes)
{
    __m256i sum[READ_SUMS];
    QLLM_UNROLL
    for (int i = 0; i < READ_SUMS; i++)
        sum[i] = _mm256_setzero_si256();
    for (const uint8_t *end = data + bytes; data < end; data += sizeof sum) {
        const __m256i *at = (const __m256i *)(const void *)data;
        QLLM_UNROLL
        for (int i = 0; i < READ_SUMS; i++)
            sum[i] = _mm256_xor_si256(sum[i], _mm256_loadu_si256(at + i));
    }
    QLLM_UNROLL
    for (int i = 1; i < READ_SUMS; i++)
        sum[0] = _mm256_xor_si256(sum[0], sum[i]);
    uint64_t words[4];
    _mm256_storeu_si256((__m256i *)(void *)words, sum[0]);
    return words[0] ^ words[1] ^ words[2] ^ words[3];
}

static __m256i ones(qllm_unit unit)
{
    switch (unit) {
    case QLLM_UNIT_F32: return _mm256_castps_si256(_mm256_set1_ps(1.0f));
    case QLLM_UNIT_INT16: return _mm256_set1_epi16(1);
    default: return _mm256_set1_epi8(1);
    }
}

/* The instructions by name, since compilers copy sums around their intrinsics; volatile, so that
 * equal products of equal ones are computed all the same. */
QLLM_INLINE __m256i add_product(qllm_unit unit, __m256i sum, __m256i a, __m256i b)
{
    __m256i product, pairs = _mm256_set1_epi16(1);
    switch (unit) {
    case QLLM_UNIT_F32:
        __asm__ volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        break;
    case QLLM_UNIT_INT16:
        __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                         : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
        break;
    default: /* 16-bit sums of two products, then 32-bit sums of four */
        __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                         : "+x"(sum), "=&x"(product) : "x"(a), "x"(b), "x"(pairs));
        break;
    }
    return sum;
}

static int64_t sum_of_lanes(qllm_unit unit, __m256i sum)
{
    int32_t whole[8];
    float real[8];
    int64_t all = 0;
    _mm256_storeu_si256((__m256i *)(void *)whole, sum);
    _mm256_storeu_ps(real, _mm256_castsi256_ps(sum));
    for (int i = 0; i < 8; i++)
        all += unit == QLLM_UNIT_F32 ? (int64_t)real[i] : whole[i];
    return all;
}

QLLM_INLINE int64_t multiply_ones(qllm_unit unit, int64_t turns)
{
    __m256i sum[SUMS], a = ones(unit), b = a;
    int64_t all = 0;
    QLLM_UNROLL
    for (int i = 0; i < SUMS; i++)
        sum[i] = _mm256_setzero_si256();
    for (int64_t turn = 0; turn < turns; turn++) {
        QLLM_UNROLL
        for (int i = 0; i < SUMS; i++)
            sum[i] = add_product(unit, sum[i], a, b);
    }
    for (int i = 0; i < SUMS; i++)
        all += sum_of_lanes(unit, sum[i]);
    return all;
}

static int64_t multiply(qllm_unit unit, int64_t turns)
{
    switch (unit) {
    case QLLM_UNIT_F32: return multiply_ones(QLLM_UNIT_F32, turns);
    case QLLM_UNIT_INT16: return multiply_ones(QLLM_UNIT_INT16, turns);
    default: return multiply_ones(QLLM_UNIT_INT8, turns);
    }
}

const qllm_limits qllm_limits_avx2 = {
    .name = "avx2",
    .read = read_all,
    .multiply = multiply,
    .instruction = {[QLLM_UNIT_F32] = "vfmadd231ps ymm", [QLLM_UNIT_INT16] = "vpmaddwd ymm",
                    [QLLM_UNIT_INT8] = "vpmaddubsw ymm"},
};
