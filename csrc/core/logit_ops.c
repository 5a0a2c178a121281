#include "core/logit_ops.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "core/exp.h"
#include "core/rng.h"

double qllm_lane_sum(const double sums[QLLM_LANES])
{
    double s[QLLM_LANES];
    memcpy(s, sums, sizeof s);
    for (int step = QLLM_LANES / 2; step > 0; step /= 2)
        for (int j = 0; j < step; j++)
            s[j] += s[j + step];
    return s[0];
}

static bool scan(const float *logits, int64_t n, float *tops, float *max)
{
    bool good = true;
    *max = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        float *top = tops + i / QLLM_TILE;
        if (i % QLLM_TILE == 0)
            *top = -INFINITY;
        *top = logits[i] > *top ? logits[i] : *top;
        *max = logits[i] > *max ? logits[i] : *max;
        good &= logits[i] < INFINITY;
    }
    return good;
}

static void weights(const float *logits, int64_t n, double max, double factor, double *out,
                    double sums[QLLM_LANES])
{
    memset(sums, 0, QLLM_LANES * sizeof *sums);
    for (int64_t i = 0; i < n; i++) {
        double weight = qllm_exp2(((double)logits[i] - max) * factor);
        sums[i % QLLM_LANES] += weight;
        if (out != NULL)
            out[i] = weight;
    }
}

static int64_t count(const float *values, int64_t n, float bound)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++)
        found += values[i] >= bound;
    return found;
}

static void mass(const float *values, const double *weights, int64_t n, float bound,
                 double sums[QLLM_LANES])
{
    memset(sums, 0, QLLM_LANES * sizeof *sums);
    for (int64_t i = 0; i < n; i++)
        if (values[i] >= bound)
            sums[i % QLLM_LANES] += weights[i];
}

static int64_t pick(const float *logits, int64_t n, const float *tops, float bound, int32_t *ids,
                      float *values)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++)
        if (tops[i / QLLM_TILE] >= bound && logits[i] >= bound) {
            ids[found] = (int32_t)i;
            values[found++] = logits[i];
        }
    return found;
}

static uint64_t contenders(const qllm_race *race, const float *logits, int64_t n, uint32_t tile,
                           uint32_t words[QLLM_TILE])
{
    uint64_t found = 0;
    qllm_noise_blocks(race->seed, race->prompt, race->step, tile * QLLM_NOISE_BLOCKS, words);
    for (int64_t i = 0; i < n; i++) {
        double score = ((double)logits[i] - race->max) * race->inverse;
        /* & and not &&: the first is as good as random for a branch */
        int may = (logits[i] >= race->cut) & !(score + qllm_gumbel_bound(words[i]) < race->best);
        found |= (uint64_t)may << i;
    }
    return found;
}

static void pair_sums(const qllm_pair *pair, qllm_pair_sums *out)
{
    double above_p[QLLM_LANES], above_q[QLLM_LANES];
    memset(out, 0, sizeof *out);
    memcpy(above_p, pair->p_above, sizeof above_p);
    memcpy(above_q, pair->q_above, sizeof above_q);
    for (int64_t i = 0; i < pair->groups * QLLM_LANES; i++) {
        int j = (int)(i % QLLM_LANES);
        double a = (double)fmaxf(pair->ref[i], -FLT_MAX) - pair->ref_max;
        double b = (double)fmaxf(pair->test[i], -FLT_MAX) - pair->test_max;
        double p = pair->p[i] * pair->p_scale, q = pair->q[i] * pair->q_scale;
        double f = above_q[j] * p - above_p[j] * q;
        out->kl[j] = fma(p, a - b, out->kl[j]);
        out->kl_reverse[j] = fma(q, b - a, out->kl_reverse[j]);
        out->mean_a[j] = fma(p, a, out->mean_a[j]);
        out->mean_b[j] = fma(q, b, out->mean_b[j]);
        out->tv[j] += fabs(p - q);
        out->disagreement[j] += f >= DBL_MIN ? p * (f / (q + f)) : 0;
        above_p[j] += p;
        above_q[j] += q;
    }
}

const qllm_logit_ops qllm_logit_ops_core = {
    .name = "core",
    .scan = scan,
    .weights = weights,
    .count = count,
    .mass = mass,
    .pick = pick,
    .contenders = contenders,
    .pair_sums = pair_sums,
};
