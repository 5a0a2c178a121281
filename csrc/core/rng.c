#include "core/rng.h"

#include <math.h>

void qllm_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
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

void qllm_noise_block(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t block,
                      uint32_t words[4])
{
    const uint32_t counter[4] = {block, step, (uint32_t)prompt, (uint32_t)(prompt >> 32)};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    qllm_philox(counter, key, words);
}

void qllm_noise_blocks(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t block,
                       uint32_t words[4 * QLLM_NOISE_BLOCKS])
{
    enum { N = QLLM_NOISE_BLOCKS };
    /* 32-bit numbers in 64-bit lanes: the products need them so. */
    uint64_t c0[N], c1[N], c2[N], c3[N];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < N; i++) {
        c0[i] = (uint32_t)(block + (uint32_t)i);
        c1[i] = step;
        c2[i] = (uint32_t)prompt;
        c3[i] = prompt >> 32;
    }
    for (int round = 0; round < QLLM_PHILOX_ROUNDS; round++) {
        for (int i = 0; i < N; i++) {
            uint64_t product_0 = QLLM_PHILOX_M0 * (uint64_t)(uint32_t)c0[i];
            uint64_t product_1 = QLLM_PHILOX_M1 * (uint64_t)(uint32_t)c2[i];
            c0[i] = (product_1 >> 32) ^ c1[i] ^ k0;
            c2[i] = (product_0 >> 32) ^ c3[i] ^ k1;
            c1[i] = (uint32_t)product_1;
            c3[i] = (uint32_t)product_0;
        }
        k0 += QLLM_PHILOX_W0;
        k1 += QLLM_PHILOX_W1;
    }
    for (int i = 0; i < N; i++) {
        words[4 * i] = (uint32_t)c0[i];
        words[4 * i + 1] = (uint32_t)c1[i];
        words[4 * i + 2] = (uint32_t)c2[i];
        words[4 * i + 3] = (uint32_t)c3[i];
    }
}

double qllm_gumbel_of(uint32_t word)
{
    double u = ((double)word + 0.5) * 0x1p-32; /* exact, never 0 or 1 */
    return -log(-log(u));
}

double qllm_gumbel_bound(uint32_t word)
{
    /* -log(u) >= 1 - u = (rest + 0.5) / 2^32 >= 2^-(1 + leading zeros of rest); the last term
     * covers the roundings of qllm_gumbel_of. */
    uint32_t rest = ~word;
    int zeros = rest ? __builtin_clz(rest) : 32;
    return 0x1.62e42fefa39efp-1 * (zeros + 1) + 1e-9;
}

double qllm_gumbel(uint64_t seed, uint64_t prompt, uint32_t step, uint32_t token)
{
    uint32_t words[4];
    qllm_noise_block(seed, prompt, step, token / 4, words);
    return qllm_gumbel_of(words[token % 4]);
}
