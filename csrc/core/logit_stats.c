#include "core/logit_stats.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/exp.h"

/* The two rows, sorted, and where their parts lie in the scratch. */
typedef struct pair {
    float *ref, *test;  /* (groups, 16): see qllm_pair */
    double *p, *q;      /* (groups, 16); before that, the two buffers of the sort */
    float *tops;
    int64_t groups;
    double ref_max, test_max;
    double ref_alone, test_alone; /* the largest logit, less the maximum, that only that row has */
} pair;

/* A row of logits before sorting. */
typedef struct row_top {
    int64_t argmax; /* lowest id among equals */
    double max;
} row_top;

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
    pair s = {.p = scratch, .ref_alone = -INFINITY, .test_alone = -INFINITY};
    s.q = s.p + room;
    s.ref = (float *)(s.q + room);
    s.test = s.ref + room;
    s.tops = s.test + room;
    return s;
}

static qllm_status bad_logit(const float *logits, int64_t vocab, const char *name,
                             qllm_error *error)
{
    int64_t i = 0;
    while (i < vocab - 1 && logits[i] < INFINITY)
        i++;
    return qllm_fail(error, QLLM_VALUE, "%s: token %" PRId64 " of %" PRId64 " is %s; "
                     "logits are finite numbers, or -inf for tokens that cannot be drawn",
                     name, i, vocab, isnan(logits[i]) ? "NaN" : "+inf");
}

static qllm_status check_row(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                             const char *name, float *tops, row_top *top, qllm_error *error)
{
    float max;
    if (!ops->scan(logits, vocab, tops, &max))
        return bad_logit(logits, vocab, name, error);
    if (max == -INFINITY)
        return qllm_fail(error, QLLM_VALUE, "%s: all %" PRId64 " tokens are -inf, so that none can "
                         "be drawn", name, vocab);
    int64_t tile = 0, i;
    while (tile < qllm_tiles(vocab) - 1 && tops[tile] < max)
        tile++;
    for (i = tile * QLLM_TILE; i < vocab - 1 && logits[i] < max; i++)
        continue;
    *top = (row_top){i, max};
    return QLLM_OK;
}

static qllm_status check_arguments(int64_t vocab, const double *temperatures,
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

/* Orders doubles as integers, from the largest down. */
static uint64_t descending_key(double value)
{
    uint64_t bits;
    value += 0.0; /* -0 and 0 are one number */
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (~(uint64_t)((int64_t)bits >> 63) & UINT64_C(0x7fffffffffffffff));
}

static uint64_t key_of(const float *ref, const float *test, int64_t id)
{
    return descending_key((double)test[id] - (double)ref[id]);
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
static int64_t write_items(const float *ref, const float *test, int64_t vocab, pair *s,
                           uint64_t *items)
{
    int64_t count = 0;
    for (int64_t i = 0; i < vocab; i++) {
        items[count] = (key_of(ref, test, i) & ~(uint64_t)UINT32_MAX) | (uint64_t)i;
        count += ref[i] > -INFINITY || test[i] > -INFINITY;
        if (test[i] == -INFINITY && ref[i] - s->ref_max > s->ref_alone)
            s->ref_alone = ref[i] - s->ref_max;
        if (ref[i] == -INFINITY && test[i] - s->test_max > s->test_alone)
            s->test_alone = test[i] - s->test_max;
    }
    return count;
}

/* Sorts the tokens by test - ref, from the largest down, once for all temperatures, equals by
 * their ids, and lays both rows out lane by lane. */
static void sort_pair(const float *ref, const float *test, int64_t vocab, pair *s)
{
    uint64_t *items = (uint64_t *)(void *)s->p, *other = (uint64_t *)(void *)s->q;
    int64_t count = write_items(ref, test, vocab, s, items), run = 0;
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

/* With a = ref - max and b likewise, log p = a / T - log of p's total, so that for equal rows every
 * difference is 0. */
static void compare(const qllm_logit_ops *ops, const pair *s, double inverse, double totals[2],
                    const qllm_logit_stats *out, int64_t t)
{
    double factor = qllm_weight_factor(inverse);
    qllm_pair pair = {.groups = s->groups, .ref = s->ref, .test = s->test, .p = s->p, .q = s->q,
                      .ref_max = s->ref_max, .test_max = s->test_max};
    qllm_pair_sums sums;
    totals[0] = weigh(ops, s->ref, s->groups, s->ref_max, factor, s->p, pair.p_above);
    totals[1] = weigh(ops, s->test, s->groups, s->test_max, factor, s->q, pair.q_above);
    pair.p_scale = 1 / totals[0];
    pair.q_scale = 1 / totals[1];
    ops->pair_sums(&pair, &sums);
    double log_p = log(totals[0]), log_q = log(totals[1]), shift = log_q - log_p;
    /* rounding can leave a negative trace of what is never negative */
    out->kl[t] = fmax(qllm_lane_sum(sums.kl) * inverse + shift, 0);
    out->kl_reverse[t] = fmax(qllm_lane_sum(sums.kl_reverse) * inverse - shift, 0);
    if (qllm_exp2(s->ref_alone * factor) > 0)
        out->kl[t] = INFINITY;
    if (qllm_exp2(s->test_alone * factor) > 0)
        out->kl_reverse[t] = INFINITY;
    out->tv[t] = fmin(0.5 * qllm_lane_sum(sums.tv), 1);
    out->disagreement[t] = fmin(qllm_lane_sum(sums.disagreement), 1);
    out->entropy_ref[t] = log_p - qllm_lane_sum(sums.mean_a) * inverse;
    out->entropy_test[t] = log_q - qllm_lane_sum(sums.mean_b) * inverse;
    out->max_ref[t] = pair.p_scale;
    /* sum q a = sum q b - sum q (b - a) */
    out->cross[t] = s->ref_max + (qllm_lane_sum(sums.mean_b) - qllm_lane_sum(sums.kl_reverse));
    if (isinf(out->kl_reverse[t]))
        out->cross[t] = -INFINITY;
    out->log_z_ref[t] = s->ref_max * inverse + log_p;
}

/* Temperature 0: both distributions are one-hot.  test_pick: the reference's logit at the argmax
 * of the other. */
static void greedy(row_top ref, row_top test, double test_pick, int64_t target,
                   const qllm_logit_stats *out, int64_t t)
{
    int differ = ref.argmax != test.argmax;
    out->kl[t] = out->kl_reverse[t] = differ ? INFINITY : 0;
    out->tv[t] = out->disagreement[t] = differ;
    out->entropy_ref[t] = out->entropy_test[t] = 0;
    out->max_ref[t] = 1;
    out->cross[t] = test_pick;
    out->log_z_ref[t] = ref.max == 0 ? 0 : copysign(INFINITY, ref.max);
    out->delta_p[t] = (test.argmax == target) - (ref.argmax == target);
}

qllm_status qllm_logit_stats_row(const qllm_logit_ops *ops, const float *ref, const float *test,
                                 int64_t vocab, const double *temperatures, int64_t n_temperatures,
                                 int64_t target, void *scratch, const qllm_logit_stats *out,
                                 int *same_top, qllm_error *error)
{
    row_top ref_top, test_top;
    qllm_status status = check_arguments(vocab, temperatures, n_temperatures, target, error);
    if (status != QLLM_OK)
        return status;
    pair s = carve(scratch, vocab);
    status = check_row(ops, ref, vocab, "ref", s.tops, &ref_top, error);
    if (status == QLLM_OK)
        status = check_row(ops, test, vocab, "test", s.tops, &test_top, error);
    if (status != QLLM_OK)
        return status;
    *same_top = ref_top.argmax == test_top.argmax;
    s.ref_max = ref_top.max;
    s.test_max = test_top.max;
    sort_pair(ref, test, vocab, &s);
    double target_a = target < 0 ? 0 : (double)ref[target] - s.ref_max;
    double target_b = target < 0 ? 0 : (double)test[target] - s.test_max;
    for (int64_t t = 0; t < n_temperatures; t++) {
        double inverse = qllm_inverse_temperature(temperatures[t]), totals[2];
        double factor = qllm_weight_factor(inverse);
        if (temperatures[t] == 0) {
            greedy(ref_top, test_top, ref[test_top.argmax], target, out, t);
            continue;
        }
        compare(ops, &s, inverse, totals, out, t);
        out->delta_p[t] = target < 0 ? 0 : qllm_exp2(target_b * factor) / totals[1] -
                                           qllm_exp2(target_a * factor) / totals[0];
    }
    return QLLM_OK;
}
