#include "core/logit_ops.h"

#include <inttypes.h>

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

qllm_status qllm_refuse_logit(const char *name, float value, int64_t token, int64_t vocab,
                              qllm_error *error)
{
    return qllm_fail(error, QLLM_VALUE, "%s: token %" PRId64 " of %" PRId64 " is %s; logits are "
                     "finite numbers, or -inf for tokens that cannot be drawn", name, token, vocab,
                     isnan(value) ? "NaN" : "+inf");
}

qllm_status qllm_refuse_no_logit(const char *name, int64_t vocab, qllm_error *error)
{
    return qllm_fail(error, QLLM_VALUE, "%s: all %" PRId64 " tokens are -inf, so that none can be "
                     "drawn", name, vocab);
}

qllm_status qllm_check_logits(const qllm_logit_ops *ops, const char *name, const float *logits,
                              int64_t vocab, float *tops, float *max, qllm_error *error)
{
    int64_t i = 0;
    if (ops->scan(logits, vocab, tops, max))
        return *max == -INFINITY ? qllm_refuse_no_logit(name, vocab, error) : QLLM_OK;
    while (i < vocab - 1 && logits[i] < INFINITY)
        i++;
    return qllm_refuse_logit(name, logits[i], i, vocab, error);
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
        double weight = qllm_weight_by(qllm_exp2_table, logits[i], max, factor);
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
    for (int64_t j = 0; j < QLLM_LANES; j++) {
        qllm_pair_lane lane = {.p_above = pair->p_above[j], .q_above = pair->q_above[j]};
        for (int64_t i = j; i < pair->groups * QLLM_LANES; i += QLLM_LANES)
            qllm_pair_add(pair, pair->ref[i], pair->test[i], pair->p[i], pair->q[i], &lane);
        out->kl[j] = lane.kl;
        out->kl_reverse[j] = lane.kl_reverse;
        out->mean_a[j] = lane.mean_a;
        out->mean_b[j] = lane.mean_b;
        out->tv[j] = lane.tv;
        out->disagreement[j] = lane.disagreement;
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
