/* Double quantization of the absmax values (QLoRA, arXiv 2305.14314, section 3).  bitsandbytes
 * takes the mean in the order of its torch build and finds codes through a table of 65536 bins that
 * cannot reach seven of them; here the mean is that of a float64 sum and every code the nearest. */
#include <math.h>

#include "core/codebook.h"
#include "core/quant.h"

/* The mean over the values that are not NaN: float64 sums in ascending order, one rounding to
 * float32 at the end. */
static float mean_absmax(const float *absmax, int64_t blocks)
{
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; b++)
        if (!isnan(absmax[b])) {
            sum += absmax[b];
            count++;
        }
    return count > 0 ? (float)(sum / (double)count) : 0.0f;
}

void qllm_quantize_nested(const float *absmax, qllm_qweight *weight)
{
    int64_t blocks = qllm_qweight_blocks(weight);
    float offset = mean_absmax(absmax, blocks);
    weight->offset = offset;
    for (int64_t first = 0, group = 0; first < blocks; first += QLLM_NESTED_BLOCKSIZE, group++) {
        int64_t end = first + QLLM_NESTED_BLOCKSIZE;
        end = end < blocks ? end : blocks;
        float largest = 0.0f;
        for (int64_t b = first; b < end; b++) {
            float magnitude = fabsf(absmax[b] - offset);
            if (!(magnitude <= largest) && !isnan(largest)) /* the first NaN stays */
                largest = magnitude;
        }
        weight->nested_absmax[group] = largest;
        bool usable = largest > 0.0f; /* neither a group of equal values nor NaN */
        for (int64_t b = first; b < end; b++)
            weight->absmax_codes[b] =
                qllm_dynamic_encode(usable ? (absmax[b] - offset) / largest : 0.0f);
    }
}
