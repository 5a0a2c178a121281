/* Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011).  A value depends on (seed, prompt, step, token id) alone, so that every arm and every
 * temperature of a study shares its noise, in any batch and in any order. */
#ifndef QLLM_CORE_RNG_H
#define QLLM_CORE_RNG_H

#include <stdint.h>

/* The raw generator: 128-bit counter and 64-bit key to four 32-bit words. */
void qllm_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Uniform in (0, 1): (word + 0.5) / 2^32, where word is number token % 4 of
 * philox(counter = {token / 4, step, prompt low, prompt high}, key = {seed low, seed high}). */
double qllm_uniform(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t token);

/* Standard Gumbel noise -log(-log(u)) of that uniform; between -3.1 and 22.9. */
double qllm_gumbel(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t token);

/* An upper bound of qllm_gumbel. */
#define QLLM_GUMBEL_MAX 22.88

#endif
