#include "core/logit_stats.h"

#include <inttypes.h>

#include "core/exp.h"
#include "core/log.h"

/* The two rows, sorted, and where their parts lie in the scratch. */
typedef struct pair {
    float *ref, *test;  /* (groups, 16): see qllm_pair */
    double *p, *q;      /* (groups, 16); before that, the two buffers of the sort */
    float *tops;
    int64_t groups;
} pair;

enum { DIGIT_BITS = 11, BUCKETS = 1 << DIGIT_BITS, DIGITS = 3, FEW = 64 };

/* Places for a vocabulary in whole groups. */
static int64_t room_for(int64_t vocab)
{
    return (vocab + QLLM_LANES - 1) / QLLM_LANES * QLLM_LANES;
}

int64_t qllm_logit_stats_scratch(int64_t vocab)
{
    if (vocab < 1 || vocab > INT32_MAX)
        return -1;
    return room_for(vocab) * (int64_t)(2 * sizeof(double) + 2 * sizeof(float)) +
           qllm_tiles(vocab) * (int64_t)sizeof(float);
}

static pair carve(void *scratch, int64_t vocab)
{
    int64_t room = room_for(vocab);
    pair s = {.p = scratch};
    s.q = s.p + room;
    s.ref = (float *)(s.q + room);
    s.test = s.ref + room;
    s.tops = s.test + room;
    return s;
}

static qllm_status check_row(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                             const char *name, float *tops, int64_t *argmax, double *max,
                             qllm_error *error)
{
    float top;
    qllm_status status = qllm_check_logits(ops, name, logits, vocab, tops, &top, error);
    if (status != QLLM_OK)
        return status;
    int64_t tile = 0, i;
    while (tile < qllm_tiles(vocab) - 1 && tops[tile] < top)
        tile++;
    for (i = tile * QLLM_TILE; i < vocab - 1 && logits[i] < top; i++)
        continue;
    *argmax = i;
    *max = top;
    return QLLM_OK;
}

qllm_status qllm_logit_stats_check(int64_t vocab, const double *temperatures,
                                   int64_t n_temperatures, int64_t target, qllm_error *error)
{
    if (vocab < 1 || vocab > INT32_MAX)
        return qllm_fail(error, QLLM_VALUE, "logits: expected 1 to 2147483647 tokens, found %"
                         PRId64, vocab);
    if (target < -1 || target >= vocab)
        return qllm_fail(error, QLLM_VALUE, "targets: token %" PRId64 " is outside the vocabulary "
                         "of %" PRId64 " tokens (-1 is none)", target, vocab);
    for (int64_t t = 0; t < n_temperatures; t++)
        if (!(temperatures[t] >= 0) || isinf(temperatures[t]))
            return qllm_fail(error, QLLM_VALUE, "temperatures: expected finite numbers of at least "
                             "0 (0 is the argmax), found %g at position %" PRId64, temperatures[t],
                             t);
    return QLLM_OK;
}

static uint64_t key_of(const float *ref, const float *test, int64_t id)
{
    return qllm_descending_key((double)test[id] - (double)ref[id]);
}

/* Sorts items by their upper halves, equals as they came: a radix sort of three digits, each left
 * out where all items share it.  Returns where the result is, `items` or `other`. */
static uint64_t *sort_items(uint64_t *items, uint64_t *other, int64_t n)
{
    int32_t starts[DIGITS][BUCKETS] = {{0}};
    for (int64_t i = 0; i < n; i++)
        for (int d = 0; d < DIGITS; d++)
            starts[d][(items[i] >> (32 + d * DIGIT_BITS)) % BUCKETS]++;
    for (int d = 0; d < DIGITS; d++) {
        int shift = 32 + d * DIGIT_BITS;
        int32_t start = 0;
        if (starts[d][(items[0] >> shift) % BUCKETS] == n)
            continue;
        for (int b = 0; b < BUCKETS; b++) {
            int32_t size = starts[d][b];
            starts[d][b] = start;
            start += size;
        }
        for (int64_t i = 0; i < n; i++)
            other[starts[d][(items[i] >> shift) % BUCKETS]++] = items[i];
        uint64_t *swap = items;
        items = other;
        other = swap;
    }
    return items;
}

/* Sorts a run of items that share the upper half of their keys by the whole keys. */
static void sort_run(const float *ref, const float *test, uint64_t *run, uint64_t *other, int64_t n)
{
    uint64_t before = 0;
    bool sorted = true;
    for (int64_t i = 0; i < n; i++) {
        uint64_t key = key_of(ref, test, (int64_t)(run[i] & UINT32_MAX));
        sorted &= key >= before;
        before = key;
    }
    if (sorted)
        return;
    if (n > FEW) {
        for (int64_t i = 0; i < n; i++) {
            uint64_t id = run[i] & UINT32_MAX;
            run[i] = key_of(ref, test, (int64_t)id) << 32 | id;
        }
        uint64_t *result = sort_items(run, other, n);
        if (result != run)
            memcpy(run, result, (size_t)n * sizeof *run);
        return;
    }
    for (int64_t i = 1; i < n; i++) {
        uint64_t item = run[i], key = key_of(ref, test, (int64_t)(item & UINT32_MAX));
        int64_t at = i;
        for (; at > 0 && key_of(ref, test, (int64_t)(run[at - 1] & UINT32_MAX)) > key; at--)
            run[at] = run[at - 1];
        run[at] = item;
    }
}

/* Writes down the tokens that either row can draw: half a key above, the id below. */
static int64_t write_items(const float *ref, const float *test, int64_t vocab, qllm_pair_tops *tops,
                           uint64_t *items)
{
    int64_t count = 0;
    tops->ref_alone = tops->test_alone = -INFINITY;
    for (int64_t i = 0; i < vocab; i++) {
        items[count] = (key_of(ref, test, i) & ~(uint64_t)UINT32_MAX) | (uint64_t)i;
        count += ref[i] > -INFINITY || test[i] > -INFINITY;
        if (test[i] == -INFINITY && ref[i] - tops->ref_max > tops->ref_alone)
            tops->ref_alone = ref[i] - tops->ref_max;
        if (ref[i] == -INFINITY && test[i] - tops->test_max > tops->test_alone)
            tops->test_alone = test[i] - tops->test_max;
    }
    return count;
}

/* Sorts the tokens by test - ref, from the largest down, once for all temperatures, equals by
 * their ids, and lays both rows out lane by lane. */
static void sort_pair(const float *ref, const float *test, int64_t vocab, qllm_pair_tops *tops,
                      pair *s)
{
    uint64_t *items = (uint64_t *)(void *)s->p, *other = (uint64_t *)(void *)s->q;
    int64_t count = write_items(ref, test, vocab, tops, items), run = 0;
    if (sort_items(items, other, count) == other) {
        other = items;
        items = (uint64_t *)(void *)s->q;
    }
    for (int64_t i = 1; i <= count; i++) {
        if (i < count && items[i] >> 32 == items[run] >> 32)
            continue;
        if (i - run > 1)
            sort_run(ref, test, items + run, other + run, i - run);
        run = i;
    }
    s->groups = (count + QLLM_LANES - 1) / QLLM_LANES;
    for (int64_t k = 0; k < s->groups; k++)
        for (int64_t lane = 0; lane < QLLM_LANES; lane++) {
            int64_t from = lane * s->groups + k, to = k * QLLM_LANES + lane;
            int64_t id = from < count ? (int64_t)(items[from] & UINT32_MAX) : 0;
            s->ref[to] = from < count ? ref[id] : -INFINITY;
            s->test[to] = from < count ? test[id] : -INFINITY;
        }
}

/* Weights of a sorted row at one temperature; returns their sum.  above (16): the shares of the
 * weight that the lanes before each hold. */
static double weigh(const qllm_logit_ops *ops, const float *logits, int64_t groups, double max,
                    double factor, double *weights, double above[QLLM_LANES])
{
    double sums[QLLM_LANES], before = 0;
    ops->weights(logits, groups * QLLM_LANES, max, factor, weights, sums);
    double total = qllm_lane_sum(sums);
    for (int j = 0; j < QLLM_LANES; j++) {
        above[j] = before * (1 / total);
        before += sums[j];
    }
    return total;
}

static qllm_pair_totals sum_pair(const qllm_logit_ops *ops, const qllm_pair_tops *tops,
                                 const pair *s, double temperature)
{
    double factor = qllm_weight_factor(qllm_inverse_temperature(temperature));
    qllm_pair pair = {.groups = s->groups, .ref = s->ref, .test = s->test, .p = s->p, .q = s->q,
                      .ref_max = tops->ref_max, .test_max = tops->test_max};
    qllm_pair_sums sums;
    qllm_pair_totals totals;
    totals.p = weigh(ops, s->ref, s->groups, tops->ref_max, factor, s->p, pair.p_above);
    totals.q = weigh(ops, s->test, s->groups, tops->test_max, factor, s->q, pair.q_above);
    pair.p_scale = 1 / totals.p;
    pair.q_scale = 1 / totals.q;
    ops->pair_sums(&pair, &sums);
    totals.kl = qllm_lane_sum(sums.kl);
    totals.kl_reverse = qllm_lane_sum(sums.kl_reverse);
    totals.mean_a = qllm_lane_sum(sums.mean_a);
    totals.mean_b = qllm_lane_sum(sums.mean_b);
    totals.tv = qllm_lane_sum(sums.tv);
    totals.disagreement = qllm_lane_sum(sums.disagreement);
    return totals;
}

/* Temperature 0: both distributions are one-hot. */
static void greedy(const qllm_pair_tops *tops, const qllm_logit_stats *out, int64_t t)
{
    int differ = tops->ref_argmax != tops->test_argmax;
    out->kl[t] = out->kl_reverse[t] = differ ? INFINITY : 0;
    out->tv[t] = out->disagreement[t] = differ;
    out->entropy_ref[t] = out->entropy_test[t] = 0;
    out->max_ref[t] = 1;
    out->cross[t] = tops->test_pick;
    out->log_z_ref[t] = tops->ref_max == 0 ? 0 : copysign(INFINITY, tops->ref_max);
    out->delta_p[t] = (tops->test_argmax == tops->target) - (tops->ref_argmax == tops->target);
}

/* With a = ref - max and b likewise, log p = a / T - log of p's total, so that for equal rows every
 * difference is 0. */
void qllm_logit_stats_finish(const qllm_pair_tops *tops, const qllm_pair_totals *totals,
                             double temperature, const qllm_logit_stats *out, int64_t t)
{
    if (temperature == 0) {
        greedy(tops, out, t);
        return;
    }
    double inverse = qllm_inverse_temperature(temperature), factor = qllm_weight_factor(inverse);
    double log_p = qllm_log(totals->p), log_q = qllm_log(totals->q), shift = log_q - log_p;
    /* rounding can leave a negative trace of what is never negative */
    out->kl[t] = fmax(totals->kl * inverse + shift, 0);
    out->kl_reverse[t] = fmax(totals->kl_reverse * inverse - shift, 0);
    if (qllm_exp2(tops->ref_alone * factor) > 0)
        out->kl[t] = INFINITY;
    if (qllm_exp2(tops->test_alone * factor) > 0)
        out->kl_reverse[t] = INFINITY;
    out->tv[t] = fmin(0.5 * totals->tv, 1);
    out->disagreement[t] = fmin(totals->disagreement, 1);
    out->entropy_ref[t] = log_p - totals->mean_a * inverse;
    out->entropy_test[t] = log_q - totals->mean_b * inverse;
    out->max_ref[t] = 1 / totals->p;
    /* sum q a = sum q b - sum q (b - a) */
    out->cross[t] = tops->ref_max + (totals->mean_b - totals->kl_reverse);
    if (isinf(out->kl_reverse[t]))
        out->cross[t] = -INFINITY;
    out->log_z_ref[t] = tops->ref_max * inverse + log_p;
    out->delta_p[t] = tops->target < 0 ? 0 : qllm_exp2(tops->target_test * factor) / totals->q -
                                             qllm_exp2(tops->target_ref * factor) / totals->p;
}

qllm_status qllm_logit_stats_row(const qllm_logit_ops *ops, const float *ref, const float *test,
                                 int64_t vocab, const double *temperatures, int64_t n_temperatures,
                                 int64_t target, void *scratch, const qllm_logit_stats *out,
                                 int *same_top, qllm_error *error)
{
    qllm_pair_tops tops = {.target = target};
    qllm_status status = qllm_logit_stats_check(vocab, temperatures, n_temperatures, target, error);
    if (status != QLLM_OK)
        return status;
    pair s = carve(scratch, vocab);
    status = check_row(ops, ref, vocab, "ref", s.tops, &tops.ref_argmax, &tops.ref_max, error);
    if (status == QLLM_OK)
        status = check_row(ops, test, vocab, "test", s.tops, &tops.test_argmax, &tops.test_max,
                           error);
    if (status != QLLM_OK)
        return status;
    *same_top = tops.ref_argmax == tops.test_argmax;
    sort_pair(ref, test, vocab, &tops, &s);
    tops.test_pick = ref[tops.test_argmax];
    tops.target_ref = target < 0 ? 0 : (double)ref[target] - tops.ref_max;
    tops.target_test = target < 0 ? 0 : (double)test[target] - tops.test_max;
    for (int64_t t = 0; t < n_temperatures; t++) {
        qllm_pair_totals totals = {0};
        if (temperatures[t] > 0)
            totals = sum_pair(ops, &tops, &s, temperatures[t]);
        qllm_logit_stats_finish(&tops, &totals, temperatures[t], out, t);
    }
    return QLLM_OK;
}
