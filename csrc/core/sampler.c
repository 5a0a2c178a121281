#include "core/sampler.h"

#include <inttypes.h>

#include "core/rng.h"

typedef qllm_logit_ops row_tools;
#define SAMPLER_FUNCTION static
#include "core/sampler_body.h"

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

static double weigh(const row_tools *ops, const float *logits, int64_t n, double max, double factor,
                    double *weights)
{
    double sums[QLLM_LANES];
    ops->weights(logits, n, max, factor, weights, sums);
    return qllm_lane_sum(sums);
}

qllm_status qllm_logprob(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                         int64_t token, void *scratch, double *out, qllm_error *error)
{
    float max = 0;
    qllm_status status = check_vocab(vocab, error);
    if (status == QLLM_OK)
        status = qllm_check_logits(ops, "logits", logits, vocab, scratch, &max, error);
    if (status != QLLM_OK)
        return status;
    if (token < 0 || token >= vocab)
        return qllm_fail(error, QLLM_VALUE, "token: %" PRId64 " is outside the vocabulary of %"
                         PRId64 " tokens", token, vocab);
    double total = weigh(ops, logits, vocab, max, qllm_weight_factor(1), NULL);
    *out = qllm_log_share(logits[token], max, 1, total);
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
        r->tools->scan(r->changed + start, n, &r->tops[tile], &value);
}

qllm_status qllm_history_check(const int64_t *history, int64_t n_history, int64_t vocab,
                               qllm_error *error)
{
    for (int64_t i = 0; i < n_history; i++)
        if (history[i] < 0 || history[i] >= vocab)
            return qllm_fail(error, QLLM_VALUE, "history: token %" PRId64 " at position %" PRId64
                             " is outside the vocabulary of %" PRId64 " tokens", history[i], i,
                             vocab);
    return QLLM_OK;
}

/* Repetition penalty, on a copy of the row.  Computed from the raw logits, so that a token that
 * came twice is penalized once. */
static void penalize(row *r, double penalty, const int64_t *history, int64_t n_history)
{
    const float *raw = r->logits;
    if (n_history == 0 || penalty == 1)
        return;
    memcpy(r->changed, raw, (size_t)r->vocab * sizeof *raw);
    for (int64_t i = 0; i < n_history; i++)
        set_logit(r, history[i], qllm_penalized(raw[history[i]], penalty));
    r->logits = r->changed;
    r->max = -INFINITY;
    for (int64_t t = 0; t < qllm_tiles(r->vocab); t++)
        r->max = r->tops[t] > r->max ? r->tops[t] : r->max;
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

static double reached(const goal *g, float bound)
{
    double sums[QLLM_LANES];
    if (g->weights == NULL)
        return (double)g->tools->count(g->values, g->n, bound);
    g->tools->mass(g->values, g->weights, g->n, bound, sums);
    return qllm_lane_sum(sums);
}

/* By bisection, since a count falls as the bound rises, and so does a sum of numbers >= 0 in one
 * order. */
static float find_cut(const goal *g, float low, float high)
{
    uint32_t below = qllm_order_key(low), above = qllm_order_key(high);
    while (below < above) {
        uint32_t middle = below + (above - below + 1) / 2;
        if (reached(g, qllm_key_value(middle)) >= g->target)
            below = middle;
        else
            above = middle - 1;
    }
    return qllm_key_value(below);
}

static void keep_from(const row *r, kept *k, float cut, int64_t ties)
{
    int64_t count = 0;
    (void)r;
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

static double weight_of(const row *r, float value)
{
    return qllm_weight_by(qllm_exp2_table, value, r->max, r->factor);
}

static double mass_of(const row *r, const kept *k)
{
    double sums[QLLM_LANES];
    r->tools->mass(k->values, k->weights, k->count, -FLT_MAX, sums);
    return qllm_lane_sum(sums);
}

static int64_t pick(const row *r, kept *k, float bound)
{
    return r->tools->pick(r->logits, r->vocab, r->tops, bound, k->ids, k->values);
}

static float lowest(const row *r, const kept *k, double weight, float from)
{
    (void)r;
    for (int64_t i = 0; i < k->count; i++)
        if (k->weights[i] >= weight && k->values[i] < from)
            from = k->values[i];
    return from;
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
        uint64_t left = r->tools->contenders(&race, r->logits + start, n, (uint32_t)tile, words);
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
    *r = (row){.tools = ops, .logits = logits, .vocab = vocab};
    qllm_status status = qllm_sampling_check(sampling, error);
    if (status == QLLM_OK)
        status = check_vocab(vocab, error);
    if (status != QLLM_OK)
        return status;
    carve(scratch, vocab, r, k);
    status = qllm_check_logits(ops, "logits", logits, vocab, r->tops, raw_max, error);
    if (status == QLLM_OK)
        status = qllm_history_check(history, n_history, vocab, error);
    if (status != QLLM_OK)
        return status;
    r->max = *raw_max;
    r->inverse = qllm_inverse_temperature(sampling->temperature);
    r->factor = qllm_weight_factor(r->inverse);
    penalize(r, sampling->repetition_penalty, history, n_history);
    return QLLM_OK;
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
        log_p = qllm_log_share(r.logits[token], r.max, r.inverse, k.total);
        if (sampling->temperature == 1 && r.logits == logits)
            raw_total = k.unfiltered;
    }
    if (raw_total == 0)
        raw_total = weigh(ops, logits, vocab, raw_max, qllm_weight_factor(1), NULL);
    *out = (qllm_sampled){token, (float)qllm_log_share(logits[token], raw_max, 1, raw_total),
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
