#include "core/sampler.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>

#include "core/exp.h"
#include "core/rng.h"

/* A row at work. */
typedef struct row {
    const qllm_logit_ops *ops;
    const float *logits; /* (vocab) penalized */
    int64_t vocab;
    float *tops;         /* of its tiles */
    double max;          /* the largest logit */
    double inverse;      /* 1 / temperature */
    double factor;       /* of the weights */
    float *changed;      /* (vocab) room for penalized logits */
} row;

/* The tokens that are still in the race: those with a logit above `cut` and, of those equal to it,
 * the ones up to the id `last`.  Filters write them down in the order of their ids. */
typedef struct kept {
    float cut;
    int64_t last;
    double total;    /* sum of their weights */
    double unfiltered; /* that of all tokens, where it was needed, else 0 */
    bool listed;     /* whether what follows is in use */
    int64_t count;
    int32_t *ids;    /* (count) */
    float *values;   /* (count) logits */
    bool weighed;    /* whether there are weights */
    double *weights; /* (count) exp((logit - max) / temperature), so that the largest is 1 */
} kept;

/* What find_cut looks for: where the count of the largest values, or with weights their mass,
 * reaches the target. */
typedef struct goal {
    const qllm_logit_ops *ops;
    const float *values;
    const double *weights; /* NULL: counts */
    int64_t n;
    double target;
} goal;

qllm_sampling qllm_sampling_default(void)
{
    return (qllm_sampling){.temperature = 1, .top_k = 0, .keep_ties = false, .top_p = 1,
                           .min_p = 0, .repetition_penalty = 1, .seed = 0, .prompt = 0};
}

qllm_status qllm_sampling_check(const qllm_sampling *s, qllm_error *error)
{
    if (!(s->temperature >= 0) || isinf(s->temperature))
        return qllm_fail(error, QLLM_VALUE, "temperature: expected a finite number of at least 0 "
                         "(0 is greedy), found %g", s->temperature);
    if (s->top_k < 0)
        return qllm_fail(error, QLLM_VALUE, "top_k: expected 0 (off) or the number of tokens to "
                         "keep, found %" PRId64, s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return qllm_fail(error, QLLM_VALUE, "top_p: expected a number above 0 and at most 1 "
                         "(1 is off), found %g", s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return qllm_fail(error, QLLM_VALUE, "min_p: expected a number from 0 (off) to 1, found %g",
                         s->min_p);
    if (!(s->repetition_penalty > 0) || isinf(s->repetition_penalty))
        return qllm_fail(error, QLLM_VALUE, "repetition_penalty: expected a finite number above 0 "
                         "(1 is off), found %g", s->repetition_penalty);
    return QLLM_OK;
}

int64_t qllm_sample_scratch(int64_t vocab)
{
    int64_t each = sizeof(double) + 3 * sizeof(float) + sizeof(int32_t);
    if (vocab < 1 || vocab > INT32_MAX)
        return -1;
    return (vocab + 1) * each; /* 2^36 at most; a row has fewer tiles than tokens, or one */
}

static void carve(void *scratch, int64_t vocab, row *r, kept *k)
{
    k->weights = scratch;
    k->values = (float *)(k->weights + vocab);
    k->ids = (int32_t *)(k->values + vocab);
    r->changed = (float *)(k->ids + vocab);
    r->tops = r->changed + vocab;
}

static qllm_status check_vocab(int64_t vocab, qllm_error *error)
{
    if (vocab >= 1 && vocab <= INT32_MAX)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "logits: expected 1 to 2147483647 tokens, found %" PRId64,
                     vocab);
}

static qllm_status bad_logit(const float *logits, int64_t vocab, qllm_error *error)
{
    int64_t i = 0;
    while (i < vocab - 1 && logits[i] < INFINITY)
        i++;
    return qllm_fail(error, QLLM_VALUE, "logits: token %" PRId64 " of %" PRId64 " is %s; logits "
                     "are finite numbers, or -inf for tokens that cannot be drawn", i, vocab,
                     isnan(logits[i]) ? "NaN" : "+inf");
}

/* Checks the logits, finds the largest of each tile and of all. */
static qllm_status check_logits(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                                float *tops, float *max, qllm_error *error)
{
    if (!ops->scan(logits, vocab, tops, max))
        return bad_logit(logits, vocab, error);
    if (*max == -INFINITY)
        return qllm_fail(error, QLLM_VALUE, "logits: all %" PRId64 " tokens are -inf, so that none "
                         "can be drawn", vocab);
    return QLLM_OK;
}

/* The sum of exp((logit - max) / temperature) over n logits. */
static double weigh(const qllm_logit_ops *ops, const float *logits, int64_t n, double max,
                    double factor, double *weights)
{
    double sums[QLLM_LANES];
    ops->weights(logits, n, max, factor, weights, sums);
    return qllm_lane_sum(sums);
}

/* log softmax(logits)[token]; total is the sum of exp(logit - max). */
static double log_softmax(const float *logits, double max, double total, int64_t token)
{
    return ((double)logits[token] - max) - log(total);
}

qllm_status qllm_logprob(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                         int64_t token, void *scratch, double *out, qllm_error *error)
{
    float max = 0;
    qllm_status status = check_vocab(vocab, error);
    if (status == QLLM_OK)
        status = check_logits(ops, logits, vocab, scratch, &max, error);
    if (status != QLLM_OK)
        return status;
    if (token < 0 || token >= vocab)
        return qllm_fail(error, QLLM_VALUE, "token: %" PRId64 " is outside the vocabulary of %"
                         PRId64 " tokens", token, vocab);
    double total = weigh(ops, logits, vocab, max, qllm_weight_factor(1), NULL);
    *out = log_softmax(logits, max, total, token);
    return QLLM_OK;
}

/* Sets one logit, and the top of its tile anew where it was or becomes the top. */
static void set_logit(row *r, int64_t id, float value)
{
    int64_t tile = id / QLLM_TILE, start = tile * QLLM_TILE;
    int64_t n = r->vocab - start < QLLM_TILE ? r->vocab - start : QLLM_TILE;
    float old = r->changed[id];
    r->changed[id] = value;
    if (value > r->tops[tile])
        r->tops[tile] = value;
    else if (old == r->tops[tile])
        r->ops->scan(r->changed + start, n, &r->tops[tile], &value);
}

/* Repetition penalty (Keskar et al. 2019, CTRL, section 4.1; for negative logits as transformers
 * does), on a copy of the row.  Computed from the raw logits, so that a token that came twice is
 * penalized once. */
static qllm_status penalize(row *r, double penalty, const int64_t *history, int64_t n_history,
                            qllm_error *error)
{
    const float *raw = r->logits;
    bool active = n_history > 0 && penalty != 1;
    if (active)
        memcpy(r->changed, raw, (size_t)r->vocab * sizeof *raw);
    for (int64_t i = 0; i < n_history; i++) {
        int64_t id = history[i];
        if (id < 0 || id >= r->vocab)
            return qllm_fail(error, QLLM_VALUE, "history: token %" PRId64 " at position %" PRId64
                             " is outside the vocabulary of %" PRId64 " tokens", id, i, r->vocab);
        if (!active)
            continue;
        double value = raw[id];
        double changed = value < 0 ? value * penalty : value / penalty;
        if (isfinite(value))
            changed = changed > FLT_MAX ? FLT_MAX : changed < -FLT_MAX ? -FLT_MAX : changed;
        set_logit(r, id, (float)changed);
    }
    if (!active)
        return QLLM_OK;
    r->logits = r->changed;
    r->max = -INFINITY;
    for (int64_t t = 0; t < qllm_tiles(r->vocab); t++)
        r->max = r->tops[t] > r->max ? r->tops[t] : r->max;
    return QLLM_OK;
}

/* The lowest id among the largest logits. */
static int64_t argmax(const row *r)
{
    int64_t tile = 0, tiles = qllm_tiles(r->vocab);
    while (tile < tiles - 1 && r->tops[tile] < r->max)
        tile++;
    int64_t i = tile * QLLM_TILE;
    while (i < r->vocab - 1 && r->logits[i] < r->max)
        i++;
    return i;
}

/* Orders floats as integers: key(a) < key(b) exactly when a < b; not for NaN and -0. */
static uint32_t order_key(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float key_value(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The count or mass of the values of at least `bound`. */
static double reached(const goal *g, float bound)
{
    double sums[QLLM_LANES];
    if (g->weights == NULL)
        return (double)g->ops->count(g->values, g->n, bound);
    g->ops->mass(g->values, g->weights, g->n, bound, sums);
    return qllm_lane_sum(sums);
}

/* The largest bound from low to high at which the target is reached, or low: by bisection, since
 * a count falls as the bound rises, and so does a sum of numbers >= 0 in one order. */
static float find_cut(const goal *g, float low, float high)
{
    uint32_t below = order_key(low), above = order_key(high);
    while (below < above) {
        uint32_t middle = below + (above - below + 1) / 2;
        if (reached(g, key_value(middle)) >= g->target)
            below = middle;
        else
            above = middle - 1;
    }
    return key_value(below);
}

/* Leaves the tokens above the cut, and the first `ties` of those at it. */
static void keep_from(kept *k, float cut, int64_t ties)
{
    int64_t count = 0;
    k->cut = cut;
    for (int64_t i = 0; i < k->count; i++) {
        float value = k->values[i];
        if (value < cut || (value == cut && ties-- <= 0))
            continue;
        if (value == cut)
            k->last = k->ids[i];
        k->ids[count] = k->ids[i];
        k->values[count] = value;
        if (k->weighed)
            k->weights[count] = k->weights[i];
        count++;
    }
    k->count = count;
}

/* Keeps the largest until the goal is reached, among equals the lower ids. */
static void keep_largest(const row *r, kept *k, const goal *g, double weight_of_tie(const row *r,
                         float value))
{
    float cut = find_cut(g, k->cut, (float)r->max);
    double above = reached(g, key_value(order_key(cut + 0.0f) + 1)); /* -0 and 0 are one number */
    double weight = weight_of_tie(r, cut);
    int64_t ties = 0;
    for (; ties < k->count && above < g->target; ties++)
        above += weight;
    keep_from(k, cut, ties);
}

static double one(const row *r, float value)
{
    (void)r;
    (void)value;
    return 1;
}

static double weight_of(const row *r, float value)
{
    return qllm_exp2(((double)value - r->max) * r->factor);
}

/* Weighs the tokens that were written down; returns the sum. */
static double weigh_list(const row *r, kept *k)
{
    k->weighed = true;
    return weigh(r->ops, k->values, k->count, r->max, r->factor, k->weights);
}

/* Writes down the tokens with a logit of at least `bound`. */
static void list(const row *r, kept *k, float bound)
{
    k->cut = bound;
    k->listed = true;
    k->count = r->ops->pick(r->logits, r->vocab, r->tops, bound, k->ids, k->values);
}

/* Where there are as many tiles, the limit-th largest of their tops bounds the limit-th largest
 * logit from below, and few tokens are left to look at. */
static void keep_top_k(const row *r, kept *k, int64_t limit, bool keep_ties)
{
    goal tops = {r->ops, r->tops, NULL, qllm_tiles(r->vocab), (double)limit};
    list(r, k, tops.n >= limit ? find_cut(&tops, -FLT_MAX, (float)r->max) : -FLT_MAX);
    goal all = {r->ops, k->values, NULL, k->count, (double)limit};
    if (k->count > limit && keep_ties)
        keep_from(k, find_cut(&all, k->cut, (float)r->max), k->count);
    else if (k->count > limit)
        keep_largest(r, k, &all, one);
}

/* A logit below which every weight is smaller than `weight` in (0, 1), with room for rounding. */
static float logit_bound(const row *r, double weight)
{
    double bound = r->max + log(weight * (1 - 1e-6)) / r->inverse;
    float rounded = bound > -FLT_MAX ? nextafterf((float)bound, -INFINITY) : -FLT_MAX;
    return rounded > -FLT_MAX ? rounded : -FLT_MAX;
}

static void keep_top_p(const row *r, kept *k, double top_p)
{
    double target = top_p * k->total;
    if (!k->listed) {
        /* those below a share of what may be left out cannot be more than that together */
        list(r, k, logit_bound(r, (1 - top_p) * k->total / (double)r->vocab));
        weigh_list(r, k);
    }
    goal g = {r->ops, k->values, k->weights, k->count, target};
    keep_largest(r, k, &g, weight_of);
}

static void keep_min_p(const row *r, kept *k, double min_p)
{
    float cut = (float)r->max;
    if (!k->listed) {
        list(r, k, logit_bound(r, min_p));
        weigh_list(r, k);
    }
    for (int64_t i = 0; i < k->count; i++)
        if (k->weights[i] >= min_p && k->values[i] < cut) /* the largest weight is 1 */
            cut = k->values[i];
    if (cut > k->cut)
        keep_from(k, cut, k->count);
}

/* top_k, temperature, top_p, min_p over the penalized logits.  (top_k before the temperature saves
 * exponentials and keeps the same tokens.) */
static void filter(const row *r, const qllm_sampling *s, kept *k)
{
    bool top_k = s->top_k > 0 && s->top_k < r->vocab;
    k->cut = -FLT_MAX;
    k->last = r->vocab - 1;
    k->listed = k->weighed = false;
    k->unfiltered = 0;
    if (top_k) {
        keep_top_k(r, k, s->top_k, s->keep_ties);
        k->total = weigh_list(r, k);
    } else if (s->top_p < 1 || s->min_p <= 0)
        k->total = k->unfiltered = weigh(r->ops, r->logits, r->vocab, r->max, r->factor, NULL);
    if (s->top_p >= 1 && s->min_p <= 0)
        return;
    if (s->top_p < 1)
        keep_top_p(r, k, s->top_p);
    if (s->min_p > 0)
        keep_min_p(r, k, s->min_p);
    double sums[QLLM_LANES];
    r->ops->mass(k->values, k->weights, k->count, -FLT_MAX, sums);
    k->total = qllm_lane_sum(sums);
}

/* argmax of (logit - max) / temperature + gumbel over the kept tokens.  It starts at the largest
 * logit: most others then lose by a bound, tile by tile, before any logarithm. */
static int64_t race(const row *r, const kept *k, const qllm_sampling *s, uint32_t step)
{
    int64_t winner = argmax(r);
    uint32_t words[QLLM_TILE];
    qllm_race race = {s->seed, s->prompt, step, r->max, r->inverse, k->cut,
                      qllm_gumbel(s->seed, s->prompt, step, (uint32_t)winner)};
    for (int64_t start = 0, tile = 0; start < r->vocab; start += QLLM_TILE, tile++) {
        double top = ((double)r->tops[tile] - r->max) * r->inverse;
        if (r->tops[tile] < k->cut || top + QLLM_GUMBEL_MAX < race.best)
            continue;
        int64_t n = r->vocab - start < QLLM_TILE ? r->vocab - start : QLLM_TILE;
        uint64_t left = r->ops->contenders(&race, r->logits + start, n, (uint32_t)tile, words);
        for (; left != 0; left &= left - 1) {
            int i = __builtin_ctzll(left);
            float value = r->logits[start + i];
            double score = ((double)value - r->max) * r->inverse;
            if ((value == k->cut && start + i > k->last) ||
                score + qllm_gumbel_bound(words[i]) < race.best)
                continue;
            score += qllm_gumbel_of(words[i]);
            if (score > race.best || (score == race.best && start + i < winner)) {
                race.best = score;
                winner = start + i;
            }
        }
    }
    return winner;
}

/* Checks everything and leaves the penalized logits in *r.  *raw_max is the largest raw logit. */
static qllm_status prepare(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                           const qllm_sampling *sampling, const int64_t *history, int64_t n_history,
                           void *scratch, row *r, kept *k, float *raw_max, qllm_error *error)
{
    *r = (row){.ops = ops, .logits = logits, .vocab = vocab};
    qllm_status status = qllm_sampling_check(sampling, error);
    if (status == QLLM_OK)
        status = check_vocab(vocab, error);
    if (status != QLLM_OK)
        return status;
    carve(scratch, vocab, r, k);
    status = check_logits(ops, logits, vocab, r->tops, raw_max, error);
    if (status != QLLM_OK)
        return status;
    r->max = *raw_max;
    r->inverse = qllm_inverse_temperature(sampling->temperature);
    r->factor = qllm_weight_factor(r->inverse);
    return penalize(r, sampling->repetition_penalty, history, n_history, error);
}

qllm_status qllm_sample(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                        const qllm_sampling *sampling, const int64_t *history, int64_t n_history,
                        uint32_t step, void *scratch, qllm_sampled *out, qllm_error *error)
{
    row r;
    kept k;
    float raw_max;
    qllm_status status = prepare(ops, logits, vocab, sampling, history, n_history, scratch, &r, &k,
                                 &raw_max, error);
    if (status != QLLM_OK)
        return status;
    double log_p = 0, raw_total = 0;
    int64_t token;
    if (sampling->temperature == 0)
        token = argmax(&r);
    else {
        filter(&r, sampling, &k);
        token = race(&r, &k, sampling, step);
        log_p = ((double)r.logits[token] - r.max) * r.inverse - log(k.total);
        if (sampling->temperature == 1 && r.logits == logits)
            raw_total = k.unfiltered;
    }
    if (raw_total == 0)
        raw_total = weigh(ops, logits, vocab, raw_max, qllm_weight_factor(1), NULL);
    *out = (qllm_sampled){token, (float)log_softmax(logits, raw_max, raw_total, token),
                          (float)log_p};
    return QLLM_OK;
}

qllm_status qllm_distribution(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                              const qllm_sampling *sampling, const int64_t *history,
                              int64_t n_history, void *scratch, float *probabilities,
                              qllm_error *error)
{
    row r;
    kept k;
    float raw_max;
    qllm_status status = prepare(ops, logits, vocab, sampling, history, n_history, scratch, &r, &k,
                                 &raw_max, error);
    if (status != QLLM_OK)
        return status;
    memset(probabilities, 0, (size_t)vocab * sizeof *probabilities);
    if (sampling->temperature == 0) {
        probabilities[argmax(&r)] = 1;
        return QLLM_OK;
    }
    filter(&r, sampling, &k);
    if (!k.listed)
        weigh(ops, r.logits, vocab, r.max, r.factor, k.weights);
    int64_t count = k.listed ? k.count : vocab;
    for (int64_t i = 0; i < count; i++)
        probabilities[k.listed ? k.ids[i] : i] = (float)(k.weights[i] / k.total);
    return QLLM_OK;
}
