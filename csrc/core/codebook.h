/* The tables of the 4-bit formats and of double quantization: the only place where they stand.
 * Python, CUDA and the tests read them from here.
 *
 * Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E, with the float32 values that
 * bitsandbytes stores in its checkpoints. */
#ifndef QLLM_CORE_CODEBOOK_H
#define QLLM_CORE_CODEBOOK_H

#include <stdint.h>

/* code -> value of a weight in units of the block's absmax */
extern const float qllm_nf4_values[16];
extern const float qllm_fp4_values[16];

/* code -> value of (absmax - offset) in units of the absmax of its block of 256; sorted */
extern const float qllm_dynamic_map[256];

/* The code of x, a weight already divided by its block's absmax, in [-1, 1].
 * nf4: the number of thresholds (float32 midpoints of neighbouring values) below x; a tie takes the
 * lower code.  fp4: the nearest value, thresholds at the float32 midpoints, see codebook.c for ties
 * and for the code of zero. */
uint8_t qllm_nf4_encode(float x);
uint8_t qllm_fp4_encode(float x);

/* The same for many values at once: the code of x is codes[number of thresholds below x]. */
typedef struct qllm_encoder {
    float thresholds[15]; /* ascending */
    uint8_t codes[16];
} qllm_encoder;

qllm_encoder qllm_nf4_encoder(void);
qllm_encoder qllm_fp4_encoder(void);

/* The index of the entry of qllm_dynamic_map nearest to x (ties: the lower index). */
uint8_t qllm_dynamic_encode(float x);

#endif
