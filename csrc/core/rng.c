#include "core/rng.h"

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
