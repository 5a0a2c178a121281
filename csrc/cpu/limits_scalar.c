/* Portable C: the compiler turns these loops into the vectors that every machine of the
 * architecture has. */
#include <stddef.h>
#include <string.h>

#include "cpu/inline.h"
#include "cpu/limits_tables.h"

enum { WORDS = 32, SUMS = 32 };

static uint64_t read_all(const uint8_t *data, int64_t bytes)
{
    uint64_t sum[WORDS] = {0}, all = 0;
    for (int64_t i = 0; i < bytes; i += (int64_t)sizeof sum) {
        uint64_t words[WORDS];
        memcpy(words, data + i, sizeof words);
        for (int j = 0; j < WORDS; j++)
            sum[j] ^= words[j];
    }
    for (int j = 0; j < WORDS; j++)
        all ^= sum[j];
    return all;
}

static int64_t multiply(qllm_unit unit, int64_t turns)
{
    (void)unit; /* f32 is the only one */
    volatile float one = 1.0f; /* known only when it runs */
    float sum[SUMS] = {0}, a = one, b = one;
    for (int64_t turn = 0; turn < turns; turn++) {
        for (int i = 0; i < SUMS; i++)
            sum[i] += a * b;
#if defined(__GNUC__)
        __asm__ volatile("" : "+m"(a)); /* the product is not the same in every turn */
#endif
    }
    double all = 0;
    for (int i = 0; i < SUMS; i++)
        all += (double)sum[i];
    return (int64_t)all;
}

const qllm_limits qllm_limits_scalar = {
    .name = "scalar",
    .read = read_all,
    .multiply = multiply,
    .instruction = {[QLLM_UNIT_F32] = "multiply and add"},
};
