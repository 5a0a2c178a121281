/* Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011).  A value depends on (seed, prompt, step, token id) alone, so that every arm and every
 * temperature of a study shares its noise, in any batch and in any order. */
#ifndef QLLM_CORE_RNG_H
#define QLLM_CORE_RNG_H

#include <stdint.h>

#include "core/device.h"
#include "core/log.h"

/* Rounds, multipliers and increments of the key of Salmon et al., section 4.3, and Random123. */
enum { QLLM_PHILOX_ROUNDS = 10 };
#define QLLM_PHILOX_M0 0xD2511F53u
#define QLLM_PHILOX_M1 0xCD9E8D57u
#define QLLM_PHILOX_W0 0x9E3779B9u
#define QLLM_PHILOX_W1 0xBB67AE85u

/* The raw generator: 128-bit counter and 64-bit key to four 32-bit words. */
static inline QLLM_BOTH void qllm_philox(const uint32_t counter[4], const uint32_t key[2],
                                         uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < QLLM_PHILOX_ROUNDS; round++) {
        uint64_t product_0 = (uint64_t)QLLM_PHILOX_M0 * c0;
        uint64_t product_1 = (uint64_t)QLLM_PHILOX_M1 * c2;
        c0 = (uint32_t)(product_1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(product_0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)product_1;
        c3 = (uint32_t)product_0;
        k0 += QLLM_PHILOX_W0;
        k1 += QLLM_PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* The noise words of tokens 4 * block .. 4 * block + 3:
 * philox(counter = {block, step, prompt low, prompt high}, key = {seed low, seed high}). */
static inline QLLM_BOTH void qllm_noise_block(uint64_t seed, uint64_t prompt, uint32_t step,
                                              uint32_t block, uint32_t words[4])
{
    const uint32_t counter[4] = {block, step, (uint32_t)prompt, (uint32_t)(prompt >> 32)};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    qllm_philox(counter, key, words);
}

/* The same for QLLM_NOISE_BLOCKS blocks from `block` on, in a form that vectorizes. */
enum { QLLM_NOISE_BLOCKS = 16 };
void qllm_noise_blocks(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t block,
                       uint32_t words[4 * QLLM_NOISE_BLOCKS]);

/* Standard Gumbel noise -log(-log(u)) of u = (word + 0.5) / 2^32; from -3.14 to 22.88. */
static inline QLLM_BOTH double qllm_gumbel_of(uint32_t word)
{
    double u = ((double)word + 0.5) * 0x1p-32; /* exact, never 0 or 1 */
    return -qllm_log(-qllm_log(u));
}

/* An upper bound of qllm_gumbel_of(word) that needs no logarithm; the larger the noise, the closer,
 * down to ln 2. */
static inline QLLM_BOTH double qllm_gumbel_bound(uint32_t word)
{
    /* -log(u) >= 1 - u = (rest + 0.5) / 2^32 >= 2^-(1 + leading zeros of rest); the last term
     * covers the roundings of qllm_gumbel_of. */
    uint32_t rest = ~word;
    int zeros = rest ? __builtin_clz(rest) : 32;
    return 0x1.62e42fefa39efp-1 * (zeros + 1) + 1e-9;
}

/* The noise of one token: qllm_gumbel_of of word token % 4 of block token / 4. */
static inline QLLM_BOTH double qllm_gumbel(uint64_t seed, uint64_t prompt, uint32_t step,
                                           uint32_t token)
{
    uint32_t words[4];
    qllm_noise_block(seed, prompt, step, token / 4, words);
    return qllm_gumbel_of(words[token % 4]);
}

/* An upper bound of every qllm_gumbel. */
#define QLLM_GUMBEL_MAX 22.88

#endif
