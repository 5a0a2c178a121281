/* Double quantization of the absmax values (QLoRA, arXiv 2305.14314, section 3).  bitsandbytes
 * takes the mean in the order of its torch build and finds codes through a table of 65536 bins that
 * cannot reach seven of them; here the mean is that of a float64 sum and every code the nearest. */
#include <math.h>

#include "core/codebook.h"
#include "core/quant.h"

float qllm_nested_offset(const float *absmax, int64_t blocks)
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

float qllm_nested_largest(const float *absmax, int64_t n, float offset)
{
    float largest = 0.0f;
    for (int64_t b = 0; b < n; b++) {
        float magnitude = fabsf(absmax[b] - offset);
        if (!(magnitude <= largest) && !isnan(largest)) /* the first NaN stays */
            largest = magnitude;
    }
    return largest;
}

void qllm_quantize_nested(const float *absmax, qllm_qweight *weight)
{
    int64_t blocks = qllm_qweight_blocks(weight);
    float offset = qllm_nested_offset(absmax, blocks);
    weight->offset = offset;
    for (int64_t first = 0, group = 0; first < blocks; first += QLLM_NESTED_BLOCKSIZE, group++) {
        int64_t end = first + QLLM_NESTED_BLOCKSIZE;
        end = end < blocks ? end : blocks;
        float largest = qllm_nested_largest(absmax + first, end - first, offset);
        weight->nested_absmax[group] = largest;
        bool usable = largest > 0.0f; /* neither a group of equal values nor NaN */
        for (int64_t b = first; b < end; b++)
            weight->absmax_codes[b] =
                qllm_dynamic_encode(usable ? (absmax[b] - offset) / largest : 0.0f);
    }
}
