#include "core/sampler.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>

#include "core/checked.h"
#include "core/exp.h"
#include "core/rng.h"

/* The tokens that are still in the race, in the order of their ids. */
typedef struct candidates {
    int64_t count;
    int32_t *ids;    /* (count) */
    float *logits;   /* (count) penalized */
    double *weights; /* (count) exp((logit - max) / temperature), so the largest is 1 */
    double max;      /* the largest logit */
} candidates;

/* The smallest kept logit, as a key, and the mass strictly above it. */
typedef struct cut {
    uint32_t key;
    double above;
} cut;

enum { BINS = 2048, EXP_BLOCK = 256 };

qllm_sampling qllm_sampling_default(void)
{
    return (qllm_sampling){.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0,
                           .repetition_penalty = 1, .seed = 0, .prompt = 0};
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
    int64_t bytes;
    if (vocab < 1 || vocab > INT32_MAX ||
        !qllm_checked_mul(vocab, sizeof(double) + sizeof(float) + sizeof(int32_t), &bytes))
        return -1;
    return bytes;
}

static candidates carve(void *scratch, int64_t vocab)
{
    candidates c = {.count = vocab, .weights = scratch};
    c.logits = (float *)(c.weights + vocab);
    c.ids = (int32_t *)(c.logits + vocab);
    return c;
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
    return qllm_fail(error, QLLM_VALUE, "logits: token %" PRId64 " of %" PRId64 " is %s; logits are "
                     "finite numbers, or -inf for tokens that cannot be drawn", i, vocab,
                     isnan(logits[i]) ? "NaN" : "+inf");
}

/* Checks the logits while copying them (out may be NULL) and finds the largest.  Adding 0 turns -0
 * into +0, so that equal numbers have equal bits. */
static qllm_status load(const float *logits, int64_t vocab, float *out, float *max,
                        qllm_error *error)
{
    int bad = 0;
    float largest = -INFINITY;
    for (int64_t i = 0; i < vocab; i++) {
        float value = logits[i] + 0.0f;
        bad |= !(value < INFINITY);
        largest = value > largest ? value : largest;
        if (out != NULL)
            out[i] = value;
    }
    *max = largest;
    if (bad)
        return bad_logit(logits, vocab, error);
    if (largest == -INFINITY)
        return qllm_fail(error, QLLM_VALUE, "logits: all %" PRId64 " tokens are -inf, so that none "
                         "can be drawn", vocab);
    return QLLM_OK;
}

/* sum of exp(logit - max), in float64, in an order that depends on the vocabulary's size alone. */
static double exp_sum(const float *logits, int64_t vocab, double max)
{
    double block[EXP_BLOCK], lanes[4] = {0, 0, 0, 0};
    for (int64_t start = 0; start < vocab; start += EXP_BLOCK) {
        int64_t n = vocab - start < EXP_BLOCK ? vocab - start : EXP_BLOCK;
        for (int64_t i = 0; i < n; i++)
            block[i] = qllm_exp((double)logits[start + i] - max);
        for (int64_t i = 0; i < n; i++)
            lanes[i % 4] += block[i];
    }
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/* log softmax(logits)[token] for logits that load() has checked. */
static double log_softmax(const float *logits, int64_t vocab, double max, int64_t token)
{
    return ((double)logits[token] - max) - log(exp_sum(logits, vocab, max));
}

qllm_status qllm_logprob(const float *logits, int64_t vocab, int64_t token, double *out,
                         qllm_error *error)
{
    float max = 0;
    qllm_status status = check_vocab(vocab, error);
    if (status == QLLM_OK)
        status = load(logits, vocab, NULL, &max, error);
    if (status != QLLM_OK)
        return status;
    if (token < 0 || token >= vocab)
        return qllm_fail(error, QLLM_VALUE, "token: %" PRId64 " is outside the vocabulary of %"
                         PRId64 " tokens", token, vocab);
    *out = log_softmax(logits, vocab, max, token);
    return QLLM_OK;
}

/* Repetition penalty (Keskar et al. 2019, CTRL, section 4.1; for negative logits as transformers
 * does).  Computed from the raw logits, so that a token that came twice is penalized once. */
static qllm_status penalize(const float *raw, float *logits, int64_t vocab, double penalty,
                            const int64_t *history, int64_t n_history, qllm_error *error)
{
    for (int64_t i = 0; i < n_history; i++) {
        int64_t id = history[i];
        if (id < 0 || id >= vocab)
            return qllm_fail(error, QLLM_VALUE, "history: token %" PRId64 " at position %" PRId64
                             " is outside the vocabulary of %" PRId64 " tokens", id, i, vocab);
        double value = raw[id];
        double changed = value < 0 ? value * penalty : value / penalty;
        if (isfinite(value))
            changed = changed > FLT_MAX ? FLT_MAX : changed < -FLT_MAX ? -FLT_MAX : changed;
        logits[id] = (float)changed + 0.0f;
    }
    return QLLM_OK;
}

static int64_t first_argmax(const float *logits, int64_t count, double *max)
{
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    *max = logits[best];
    return best;
}

/* Orders floats as integers: key(a) < key(b) exactly when a < b, for floats other than NaN and -0. */
static uint32_t order_key(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Where the `target` mass of the largest logits ends; masses NULL counts each as 1.  Radix selection:
 * each level adds up the masses by the next 11 bits of the key and descends into the bin where the
 * target is reached, or into the lowest that holds anything where rounding keeps it from being
 * reached. */
static cut find_cut(const float *logits, const double *masses, int64_t count, double target)
{
    static const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
    double bins[BINS];
    cut found = {0, 0};
    for (int level = 0; level < 3; level++) {
        int shift = shifts[level], width = widths[level];
        uint32_t mask = (1u << width) - 1;
        memset(bins, 0, sizeof bins);
        for (int64_t i = 0; i < count; i++) {
            uint32_t key = order_key(logits[i]) >> shift;
            if (level == 0 || key >> width == found.key)
                bins[key & mask] += masses ? masses[i] : 1;
        }
        int chosen = -1;
        for (int bin = (int)mask; bin >= 0; bin--) {
            if (bins[bin] == 0)
                continue;
            found.above += chosen >= 0 ? bins[chosen] : 0;
            chosen = bin;
            if (found.above + bins[bin] >= target)
                break;
        }
        found.key = (found.key << width) | (uint32_t)(chosen >= 0 ? chosen : 0);
    }
    return found;
}

/* Drops the candidates whose logit is -inf or lies below the cut; among equals at the cut the lowest
 * ids stay until the target is reached. */
static void keep_above(candidates *c, const double *masses, double target, cut at)
{
    int64_t kept = 0;
    double mass = at.above;
    for (int64_t i = 0; i < c->count; i++) {
        uint32_t key = order_key(c->logits[i]);
        if (key < at.key || c->logits[i] == -INFINITY)
            continue;
        if (key == at.key) {
            if (mass >= target)
                continue;
            mass += masses ? masses[i] : 1;
        }
        c->ids[kept] = c->ids[i];
        c->logits[kept] = c->logits[i];
        if (masses)
            c->weights[kept] = c->weights[i];
        kept++;
    }
    c->count = kept;
}

static void keep_min_p(candidates *c, double min_p)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < c->count; i++) {
        if (c->weights[i] < min_p) /* the largest weight is 1 */
            continue;
        c->ids[kept] = c->ids[i];
        c->logits[kept] = c->logits[i];
        c->weights[kept] = c->weights[i];
        kept++;
    }
    c->count = kept;
}

static double sum(const double *values, int64_t count)
{
    double lanes[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < count; i++)
        lanes[i % 4] += values[i];
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/* top_k, temperature, top_p, min_p over the penalized logits; returns the sum of the weights that
 * are left.  (top_k before the temperature saves exponentials and keeps the same tokens.) */
static double filter(candidates *c, const qllm_sampling *s)
{
    int64_t vocab = c->count;
    double all = (double)vocab, k = s->top_k > 0 && s->top_k < vocab ? (double)s->top_k : all;
    for (int64_t i = 0; i < vocab; i++)
        c->ids[i] = (int32_t)i;
    if (k < all)
        keep_above(c, NULL, k, find_cut(c->logits, NULL, vocab, k));
    for (int64_t i = 0; i < c->count; i++)
        c->weights[i] = qllm_exp(((double)c->logits[i] - c->max) / s->temperature);
    double total = sum(c->weights, c->count);
    if (s->top_p < 1) {
        double target = s->top_p * total;
        keep_above(c, c->weights, target, find_cut(c->logits, c->weights, c->count, target));
    }
    if (s->min_p > 0)
        keep_min_p(c, s->min_p);
    return sum(c->weights, c->count);
}

/* argmax of (logit - max) / temperature + gumbel over the candidates; returns its position.  It
 * starts at the largest logit: most others then lose by a bound, before any logarithm. */
static int64_t race(const candidates *c, const qllm_sampling *s, uint32_t step)
{
    double max, best;
    int64_t winner = first_argmax(c->logits, c->count, &max), block = -1;
    uint32_t words[4] = {0, 0, 0, 0};
    best = qllm_gumbel(s->seed, s->prompt, step, (uint32_t)c->ids[winner]);
    for (int64_t i = 0; i < c->count; i++) {
        double z = ((double)c->logits[i] - max) / s->temperature;
        if (z + QLLM_GUMBEL_MAX < best)
            continue;
        uint32_t id = (uint32_t)c->ids[i];
        if (id / 4 != block) {
            block = id / 4;
            qllm_noise_block(s->seed, s->prompt, step, (uint32_t)block, words);
        }
        if (z + qllm_gumbel_bound(words[id % 4]) < best)
            continue;
        double score = z + qllm_gumbel_of(words[id % 4]);
        if (score > best || (score == best && i < winner)) {
            best = score;
            winner = i;
        }
    }
    return winner;
}

/* Checks everything and leaves the penalized logits in *c.  *raw_max is the largest raw logit. */
static qllm_status prepare(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                           const int64_t *history, int64_t n_history, void *scratch,
                           candidates *c, float *raw_max, int64_t *argmax, qllm_error *error)
{
    qllm_status status = qllm_sampling_check(sampling, error);
    if (status == QLLM_OK)
        status = check_vocab(vocab, error);
    if (status != QLLM_OK)
        return status;
    *c = carve(scratch, vocab);
    status = load(logits, vocab, c->logits, raw_max, error);
    if (status == QLLM_OK)
        status = penalize(logits, c->logits, vocab, sampling->repetition_penalty, history,
                          n_history, error);
    if (status == QLLM_OK)
        *argmax = first_argmax(c->logits, vocab, &c->max);
    return status;
}

qllm_status qllm_sample(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                        const int64_t *history, int64_t n_history, uint32_t step, void *scratch,
                        qllm_sampled *out, qllm_error *error)
{
    candidates c;
    float raw_max;
    int64_t argmax;
    qllm_status status = prepare(logits, vocab, sampling, history, n_history, scratch, &c,
                                 &raw_max, &argmax, error);
    if (status != QLLM_OK)
        return status;
    *out = (qllm_sampled){.token = argmax, .sampling_logprob = 0};
    if (sampling->temperature > 0) {
        double total = filter(&c, sampling);
        int64_t winner = race(&c, sampling, step);
        double z = ((double)c.logits[winner] - c.max) / sampling->temperature;
        out->token = c.ids[winner];
        out->sampling_logprob = (float)(z - log(total));
    }
    out->logprob = (float)log_softmax(logits, vocab, raw_max, out->token);
    return QLLM_OK;
}

qllm_status qllm_distribution(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                              const int64_t *history, int64_t n_history, void *scratch,
                              float *probabilities, qllm_error *error)
{
    candidates c;
    float raw_max;
    int64_t argmax;
    qllm_status status = prepare(logits, vocab, sampling, history, n_history, scratch, &c,
                                 &raw_max, &argmax, error);
    if (status != QLLM_OK)
        return status;
    memset(probabilities, 0, (size_t)vocab * sizeof *probabilities);
    if (sampling->temperature == 0) {
        probabilities[argmax] = 1;
        return QLLM_OK;
    }
    double total = filter(&c, sampling);
    for (int64_t i = 0; i < c.count; i++)
        probabilities[c.ids[i]] = (float)(c.weights[i] / total);
    return QLLM_OK;
}
