/* Activations rounded to few bits, and 4-bit code tables as integers: the definitions of the
 * compute tiers of core/compute.h.  (The activations of LLM.int8() are in core/quant.h.) */
#ifndef QLLM_CORE_ACTIVATION_H
#define QLLM_CORE_ACTIVATION_H

#include <stdint.h>

#include "core/compute.h"

/* The largest magnitudes.  A block's sum of products stays below 2^31: 64 * 8064 * 4095.  8064 is a
 * multiple of 192, so that the codes of fp4, multiples of 1/192, are integers without rounding.  As
 * bf16, which has 8 bits, they are exact under 192 i with odd i up to 85; of these, 53 leaves the
 * codes of nf4 the least error (root mean square 4.1e-4; as they are 5.5e-4). */
enum {
    QLLM_ACTIVATION_BLOCK = 64,
    QLLM_INT16_LIMIT = 4095,
    QLLM_INT16_CODE_LIMIT = 8064,
    QLLM_INT8_LIMIT = 127,
    QLLM_INT8_CODE_LIMIT = 127,
    QLLM_BF16_CODE_LIMIT = 10176
};

/* Elements that share a scale of x: 64, or the weight's blocksize where that is smaller. */
static inline int64_t qllm_activation_block(int64_t blocksize)
{
    return blocksize < QLLM_ACTIVATION_BLOCK ? blocksize : QLLM_ACTIVATION_BLOCK;
}

/* One block of n values: q_k = round-half-even(x_k * (limit / absmax)) and scale = absmax / limit,
 * every operation rounded to float32.  Zeros, or values so small that limit / absmax is infinite,
 * give q = 0 and scale 0; NaN or infinity in the block give q = 0 and scale NaN. Returns the scale;
 * limit is one of the two above. */
float qllm_block_activation(const float *x, int64_t n, int limit, int16_t *q);

/* x as bf16, to nearest, ties to even; subnormal x become 0, as the vector instructions have it. */
uint16_t qllm_bf16_activation(float x);

/* The two products of vdpbf16ps: fma(w0, x0, fma(w1, x1, sum)), where subnormal operands count as 0
 * and a subnormal result becomes 0.  Subnormal is what lies below the smallest normal number when
 * rounded to 24 bits as if smaller exponents existed (Intel SDM vol. 1, 4.9.1.5). */
float qllm_bf16_dot(float sum, uint16_t w0, uint16_t w1, uint16_t x0, uint16_t x1);

/* The 16 pairs that tdpbf16ps adds to a sum: p0 = fma(w_2i, x_2i, p0) and p1 = fma(w_2i+1, x_2i+1,
 * p1) from +0 over ascending i, then sum + (p0 + p1); subnormal numbers as above, the sum's too
 * (Intel SDM vol. 2, TDPBF16PS). */
float qllm_bf16_pairs(float sum, const uint16_t w[32], const uint16_t x[32]);

/* codes_i = round-half-even(code_i * (limit / largest |code|)); returns largest |code| / limit, the
 * value of one unit. */
float qllm_integer_codes(const float code[16], int limit, int16_t codes[16]);

/* The same with codes_i = bf16(code_i * (limit / largest |code|)), limit QLLM_BF16_CODE_LIMIT. */
float qllm_bf16_codes(const float code[16], uint16_t codes[16]);

#endif
