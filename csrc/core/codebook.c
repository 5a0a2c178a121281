#include "core/codebook.h"

const float qllm_nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

/* Sign, two bits of exponent and one of mantissa, divided by the largest value, 12.  Code 8, "minus
 * zero", is plain 0, as in the table that bitsandbytes stores. */
const float qllm_fp4_values[16] = {
    0.0f, 1.0f / 192.0f, 2.0f / 3.0f, 1.0f, 1.0f / 3.0f, 0.5f, 1.0f / 6.0f, 0.25f,
    0.0f, -1.0f / 192.0f, -2.0f / 3.0f, -1.0f, -1.0f / 3.0f, -0.5f, -1.0f / 6.0f, -0.25f,
};

static const uint8_t nf4_order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* The codes of fp4 by ascending value.  Both zeros take part, with a threshold of 0 between them:
 * x in (-1/384, 0] has code 0 and x in (0, 1/384] has code 8, which is what bitsandbytes 0.50
 * writes on a CPU.  Both read back as 0.  Ties take the lower value, so of two negative values the
 * one of larger magnitude. */
static const uint8_t fp4_order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

/* Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), dynamic tree
 * quantization: +-10^(i-6) * (0.1 + 0.9 (j + 0.5) / 2^i) for i = 0..6, j = 0 .. 2^i - 1, with 0 and
 * +1; the roundings to float32 are those of the map in bitsandbytes' checkpoints. */
const float qllm_dynamic_map[256] = {
    -0.99296874f, -0.9789063f, -0.96484375f, -0.9507812f, -0.93671876f, -0.92265624f, -0.9085938f,
    -0.89453125f, -0.8804687f, -0.86640626f, -0.85234374f, -0.8382813f, -0.82421875f, -0.8101562f,
    -0.79609376f, -0.78203124f, -0.7679688f, -0.75390625f, -0.7398437f, -0.72578126f, -0.7117188f,
    -0.6976563f, -0.68359375f, -0.6695312f, -0.65546876f, -0.6414063f, -0.6273438f, -0.61328125f,
    -0.5992187f, -0.58515626f, -0.5710938f, -0.5570313f, -0.54296875f, -0.5289062f, -0.5148437f,
    -0.50078124f, -0.4867187f, -0.47265625f, -0.45859373f, -0.44453126f, -0.43046874f,
    -0.41640624f, -0.40234375f, -0.38828123f, -0.37421876f, -0.36015624f, -0.34609374f,
    -0.33203125f, -0.31796873f, -0.30390626f, -0.28984374f, -0.27578127f, -0.26171875f,
    -0.24765624f, -0.23359375f, -0.21953125f, -0.20546874f, -0.19140625f, -0.17734376f,
    -0.16328125f, -0.14921875f, -0.13515624f, -0.12109375f, -0.107031256f, -0.09859375f,
    -0.09578126f, -0.092968754f, -0.09015625f, -0.08734375f, -0.08453125f, -0.08171876f,
    -0.07890625f, -0.07609375f, -0.07328125f, -0.070468746f, -0.067656256f, -0.06484375f,
    -0.06203125f, -0.059218753f, -0.05640625f, -0.05359375f, -0.05078125f, -0.04796875f,
    -0.04515625f, -0.042343747f, -0.03953125f, -0.036718752f, -0.03390625f, -0.03109375f,
    -0.028281251f, -0.02546875f, -0.02265625f, -0.019843752f, -0.01703125f, -0.01421875f,
    -0.01140625f, -0.00971875f, -0.009156249f, -0.00859375f, -0.00803125f, -0.00746875f,
    -0.00690625f, -0.00634375f, -0.00578125f, -0.0052187503f, -0.0046562497f, -0.00409375f,
    -0.0035312497f, -0.00296875f, -0.00240625f, -0.00184375f, -0.0012812499f, -0.0009437501f,
    -0.00083125f, -0.00071875006f, -0.0006062501f, -0.00049375003f, -0.00038125002f,
    -0.00026875004f, -0.00015625001f, -8.875e-05f, -6.625e-05f, -4.375e-05f, -2.1249998e-05f,
    -7.75e-06f, -3.2500002e-06f, -5.5000004e-07f, 0.0f, 5.5000004e-07f, 3.2500002e-06f, 7.75e-06f,
    2.1249998e-05f, 4.375e-05f, 6.625e-05f, 8.875e-05f, 0.00015625001f, 0.00026875004f,
    0.00038125002f, 0.00049375003f, 0.0006062501f, 0.00071875006f, 0.00083125f, 0.0009437501f,
    0.0012812499f, 0.00184375f, 0.00240625f, 0.00296875f, 0.0035312497f, 0.00409375f,
    0.0046562497f, 0.0052187503f, 0.00578125f, 0.00634375f, 0.00690625f, 0.00746875f, 0.00803125f,
    0.00859375f, 0.009156249f, 0.00971875f, 0.01140625f, 0.01421875f, 0.01703125f, 0.019843752f,
    0.02265625f, 0.02546875f, 0.028281251f, 0.03109375f, 0.03390625f, 0.036718752f, 0.03953125f,
    0.042343747f, 0.04515625f, 0.04796875f, 0.05078125f, 0.05359375f, 0.05640625f, 0.059218753f,
    0.06203125f, 0.06484375f, 0.067656256f, 0.070468746f, 0.07328125f, 0.07609375f, 0.07890625f,
    0.08171876f, 0.08453125f, 0.08734375f, 0.09015625f, 0.092968754f, 0.09578126f, 0.09859375f,
    0.107031256f, 0.12109375f, 0.13515624f, 0.14921875f, 0.16328125f, 0.17734376f, 0.19140625f,
    0.20546874f, 0.21953125f, 0.23359375f, 0.24765624f, 0.26171875f, 0.27578127f, 0.28984374f,
    0.30390626f, 0.31796873f, 0.33203125f, 0.34609374f, 0.36015624f, 0.37421876f, 0.38828123f,
    0.40234375f, 0.41640624f, 0.43046874f, 0.44453126f, 0.45859373f, 0.47265625f, 0.4867187f,
    0.50078124f, 0.5148437f, 0.5289062f, 0.54296875f, 0.5570313f, 0.5710938f, 0.58515626f,
    0.5992187f, 0.61328125f, 0.6273438f, 0.6414063f, 0.65546876f, 0.6695312f, 0.68359375f,
    0.6976563f, 0.7117188f, 0.72578126f, 0.7398437f, 0.75390625f, 0.7679688f, 0.78203124f,
    0.79609376f, 0.8101562f, 0.82421875f, 0.8382813f, 0.85234374f, 0.86640626f, 0.8804687f,
    0.89453125f, 0.9085938f, 0.92265624f, 0.93671876f, 0.9507812f, 0.96484375f, 0.9789063f,
    0.99296874f, 1.0f,
};

static qllm_encoder make_encoder(const float values[16], const uint8_t order[16])
{
    qllm_encoder encoder;
    for (int i = 0; i < 15; i++)
        encoder.thresholds[i] = 0.5f * (values[order[i]] + values[order[i + 1]]);
    for (int i = 0; i < 16; i++)
        encoder.codes[i] = order[i];
    return encoder;
}

qllm_encoder qllm_nf4_encoder(void)
{
    return make_encoder(qllm_nf4_values, nf4_order);
}

qllm_encoder qllm_fp4_encoder(void)
{
    return make_encoder(qllm_fp4_values, fp4_order);
}

static uint8_t encode(const float values[16], const uint8_t order[16], float x)
{
    int below = 0;
    for (int i = 0; i < 15; i++)
        below += x > 0.5f * (values[order[i]] + values[order[i + 1]]);
    return order[below];
}

uint8_t qllm_nf4_encode(float x)
{
    return encode(qllm_nf4_values, nf4_order, x);
}

uint8_t qllm_fp4_encode(float x)
{
    return encode(qllm_fp4_values, fp4_order, x);
}

uint8_t qllm_dynamic_encode(float x)
{
    int low = 0, high = 255; /* the answer is in [low, high] */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (x > qllm_dynamic_map[middle])
            low = middle;
        else
            high = middle;
    }
    /* float64: the differences are exact */
    double above_low = (double)x - (double)qllm_dynamic_map[low];
    double below_high = (double)qllm_dynamic_map[high] - (double)x;
    return (uint8_t)(above_low <= below_high ? low : high);
}
