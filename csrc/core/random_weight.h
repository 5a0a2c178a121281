/* Random weights by a formula, to measure speed with: the same on every device, which can write
 * them where they are needed.  Codes are uniform, and values have a variance near 1 / cols. */
#ifndef QLLM_CORE_RANDOM_WEIGHT_H
#define QLLM_CORE_RANDOM_WEIGHT_H

#include "core/device.h"
#include "core/qweight.h"

/* The arrays of a weight that get random values, each from words of its own. */
enum { QLLM_RANDOM_DATA, QLLM_RANDOM_ABSMAX, QLLM_RANDOM_CODES, QLLM_RANDOM_NESTED };

typedef struct qllm_random_recipe {
    uint64_t seed;
    float value;                  /* float formats: values are below it */
    float absmax, nested, offset; /* of the scales, which lie around absmax or offset */
} qllm_random_recipe;

qllm_random_recipe qllm_random_recipe_of(qllm_format format, int64_t cols, uint64_t seed);

/* Word i of an array: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), its upper half. */
static inline QLLM_BOTH uint32_t qllm_random_word(uint64_t seed, int array, int64_t i)
{
    uint64_t place = (uint64_t)array << 60 | (uint64_t)i;
    uint64_t z = seed + (place + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return (uint32_t)((z ^ z >> 31) >> 32);
}

/* Byte i of 4-bit data; element i of int8 data; element i of a float format. */
static inline QLLM_BOTH uint8_t qllm_random_byte(const qllm_random_recipe *recipe, int64_t i)
{
    return (uint8_t)qllm_random_word(recipe->seed, QLLM_RANDOM_DATA, i);
}

static inline QLLM_BOTH uint8_t qllm_random_int8(const qllm_random_recipe *recipe, int64_t i)
{
    return (uint8_t)(qllm_random_word(recipe->seed, QLLM_RANDOM_DATA, i) % 255 - 127);
}

static inline QLLM_BOTH float qllm_random_value(const qllm_random_recipe *recipe, int64_t i)
{
    uint32_t word = qllm_random_word(recipe->seed, QLLM_RANDOM_DATA, i);
    return ((float)(word >> 8) * 0x1p-23f - 1.0f) * recipe->value;
}

/* Scale i of an array: within a quarter of `middle`. */
static inline QLLM_BOTH float qllm_random_scale(const qllm_random_recipe *recipe, int array,
                                                float middle, int64_t i)
{
    uint32_t word = qllm_random_word(recipe->seed, array, i);
    return middle * (0.75f + (float)(word >> 8) * 0x1p-25f);
}

/* Such a weight as standard bytes; the caller clears. */
qllm_status qllm_random_weight(qllm_qweight *out, qllm_format format, int64_t rows, int64_t cols,
                               int64_t blocksize, uint64_t seed, const char *name,
                               qllm_error *error);

#endif
