#include "core/exp.h"

enum { BLOCK = 256 }; /* a multiple of the four lanes of the sum */

double qllm_exp_weights(const float *logits, int64_t count, double max, double inverse_temperature,
                        double *weights)
{
    double block[BLOCK], lanes[4] = {0, 0, 0, 0};
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t n = count - start < BLOCK ? count - start : BLOCK, i = 0;
        double *out = weights ? weights + start : block;
        for (i = 0; i < n; i++)
            out[i] = qllm_exp(((double)logits[start + i] - max) * inverse_temperature);
        for (i = 0; i + 4 <= n; i += 4)
            for (int lane = 0; lane < 4; lane++)
                lanes[lane] += out[i + lane];
        for (; i < n; i++)
            lanes[i % 4] += out[i];
    }
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}
