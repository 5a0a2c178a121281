/* Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011).  A value depends on (seed, prompt, step, token id) alone, so that every arm and every
 * temperature of a study shares its noise, in any batch and in any order. */
#ifndef QLLM_CORE_RNG_H
#define QLLM_CORE_RNG_H

#include <stdint.h>

/* Rounds, multipliers and increments of the key of Salmon et al., section 4.3, and Random123. */
enum { QLLM_PHILOX_ROUNDS = 10 };
#define QLLM_PHILOX_M0 0xD2511F53u
#define QLLM_PHILOX_M1 0xCD9E8D57u
#define QLLM_PHILOX_W0 0x9E3779B9u
#define QLLM_PHILOX_W1 0xBB67AE85u

/* The raw generator: 128-bit counter and 64-bit key to four 32-bit words. */
void qllm_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* The noise words of tokens 4 * block .. 4 * block + 3:
 * philox(counter = {block, step, prompt low, prompt high}, key = {seed low, seed high}). */
void qllm_noise_block(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t block,
                      uint32_t words[4]);

/* The same for QLLM_NOISE_BLOCKS blocks from `block` on, in a form that vectorizes. */
enum { QLLM_NOISE_BLOCKS = 16 };
void qllm_noise_blocks(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t block,
                       uint32_t words[4 * QLLM_NOISE_BLOCKS]);

/* Standard Gumbel noise -log(-log(u)) of u = (word + 0.5) / 2^32; from -3.14 to 22.88. */
double qllm_gumbel_of(uint32_t word);

/* An upper bound of qllm_gumbel_of(word) that needs no logarithm; the larger the noise, the closer,
 * down to ln 2. */
double qllm_gumbel_bound(uint32_t word);

/* The noise of one token: qllm_gumbel_of of word token % 4 of block token / 4. */
double qllm_gumbel(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t token);

/* An upper bound of every qllm_gumbel. */
#define QLLM_GUMBEL_MAX 22.88

#endif
