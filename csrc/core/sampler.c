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
    double total;    /* sum of the weights after top_k, before top_p */
} candidates;

/* The smallest kept logit, as a key, and the mass strictly above it. */
typedef struct cut {
    uint32_t key;
    double above;
} cut;

enum { BINS = 2048, TILE = 64, LANES = 8, WINDOW = 4 * QLLM_NOISE_BLOCKS };

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
    return qllm_fail(error, QLLM_VALUE, "logits: token %" PRId64 " of %" PRId64 " is %s; logits "
                     "are finite numbers, or -inf for tokens that cannot be drawn", i, vocab,
                     isnan(logits[i]) ? "NaN" : "+inf");
}

/* The largest of `count` logits; NaN are passed over. */
static float largest(const float *logits, int64_t count)
{
    float lanes[LANES], max = -INFINITY;
    int64_t i = 0;
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = -INFINITY;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] = logits[i + lane] > lanes[lane] ? logits[i + lane] : lanes[lane];
    for (; i < count; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int lane = 0; lane < LANES; lane++)
        max = lanes[lane] > max ? lanes[lane] : max;
    return max;
}

/* Checks the logits and finds the largest. */
static qllm_status check_logits(const float *logits, int64_t vocab, float *max, qllm_error *error)
{
    int bad = 0;
    for (int64_t i = 0; i < vocab; i++)
        bad |= !(logits[i] < INFINITY);
    *max = largest(logits, vocab);
    if (bad)
        return bad_logit(logits, vocab, error);
    if (*max == -INFINITY)
        return qllm_fail(error, QLLM_VALUE, "logits: all %" PRId64 " tokens are -inf, so that none "
                         "can be drawn", vocab);
    return QLLM_OK;
}

/* log softmax(logits)[token]; total is the sum of exp(logit - max). */
static double log_softmax(const float *logits, double max, double total, int64_t token)
{
    return ((double)logits[token] - max) - log(total);
}

qllm_status qllm_logprob(const float *logits, int64_t vocab, int64_t token, double *out,
                         qllm_error *error)
{
    float max = 0;
    qllm_status status = check_vocab(vocab, error);
    if (status == QLLM_OK)
        status = check_logits(logits, vocab, &max, error);
    if (status != QLLM_OK)
        return status;
    if (token < 0 || token >= vocab)
        return qllm_fail(error, QLLM_VALUE, "token: %" PRId64 " is outside the vocabulary of %"
                         PRId64 " tokens", token, vocab);
    *out = log_softmax(logits, max, qllm_exp_weights(logits, vocab, max, 1, NULL), token);
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

static int64_t first_equal(const float *logits, int64_t count, float value)
{
    int64_t i = 0;
    while (i < count - 1 && logits[i] != value)
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

/* Where the `target` mass of the largest logits ends; masses NULL counts each as 1.  Radix
 * selection: each level adds up the masses by the next 11 bits of the key and descends into the
 * bin where the target is reached, or into the lowest that holds anything where rounding keeps it
 * from being reached. */
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

/* Drops the candidates whose logit is -inf or lies below the cut; among equals at the cut the
 * lowest ids stay until the target is reached. */
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

static void all_ids(candidates *c)
{
    for (int64_t i = 0; i < c->count; i++)
        c->ids[i] = (int32_t)i;
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

/* Keeps the k largest.  Where the vocabulary has k tiles or more, the k-th largest of the tiles'
 * largest logits bounds the k-th largest logit from below, and few tokens are left to look at. */
static void keep_top_k(candidates *c, int64_t k)
{
    int64_t tiles = c->count / TILE, kept = 0;
    if (tiles >= k) {
        float *tops = (float *)c->weights; /* not in use yet */
        for (int64_t t = 0; t <= tiles; t++)
            tops[t] = largest(c->logits + t * TILE, t < tiles ? TILE : c->count % TILE);
        uint32_t bound = find_cut(tops, NULL, tiles, (double)k).key;
        for (int64_t t = 0; t <= tiles; t++) {
            if (order_key(tops[t]) < bound)
                continue;
            int64_t stop = t < tiles ? (t + 1) * TILE : c->count;
            for (int64_t i = t * TILE; i < stop; i++) {
                if (order_key(c->logits[i]) < bound)
                    continue;
                c->ids[kept] = (int32_t)i;
                c->logits[kept++] = c->logits[i];
            }
        }
        c->count = kept;
    } else
        all_ids(c);
    keep_above(c, NULL, (double)k, find_cut(c->logits, NULL, c->count, (double)k));
}

/* top_k, temperature, top_p, min_p over the penalized logits; returns the sum of the weights that
 * are left.  (top_k before the temperature saves exponentials and keeps the same tokens.) */
static double filter(candidates *c, const qllm_sampling *s)
{
    if (s->top_k > 0 && s->top_k < c->count)
        keep_top_k(c, s->top_k);
    else
        all_ids(c);
    c->total = qllm_exp_weights(c->logits, c->count, c->max,
                                qllm_inverse_temperature(s->temperature), c->weights);
    if (s->top_p >= 1 && s->min_p <= 0)
        return c->total;
    if (s->top_p < 1) {
        double target = s->top_p * c->total;
        keep_above(c, c->weights, target, find_cut(c->logits, c->weights, c->count, target));
    }
    if (s->min_p > 0)
        keep_min_p(c, s->min_p);
    double total = 0;
    for (int64_t i = 0; i < c->count; i++)
        total += c->weights[i];
    return total;
}

/* The noise words of candidates first .. stop - 1, whose ids lie in one window of tokens, into
 * `words` by id within the window: all at once, or only those blocks that hold a candidate which
 * can still win. */
static void window_words(const candidates *c, const qllm_sampling *s, uint32_t step, int64_t first,
                         int64_t stop, const double *scores, double best, uint32_t *words)
{
    uint32_t window = (uint32_t)c->ids[first] / WINDOW, done = UINT32_MAX;
    if (stop - first >= WINDOW / 4) {
        qllm_noise_blocks(s->seed, s->prompt, step, window * QLLM_NOISE_BLOCKS, words);
        return;
    }
    for (int64_t i = first; i < stop; i++) {
        uint32_t block = (uint32_t)c->ids[i] / 4;
        if (block == done || scores[i - first] + QLLM_GUMBEL_MAX < best)
            continue;
        qllm_noise_block(s->seed, s->prompt, step, block, words + block % QLLM_NOISE_BLOCKS * 4);
        done = block;
    }
}

/* argmax of (logit - max) / temperature + gumbel over the candidates; returns its position.  It
 * starts at the largest logit: most others then lose by a bound, before any logarithm. */
static int64_t race(const candidates *c, const qllm_sampling *s, uint32_t step)
{
    double inverse = qllm_inverse_temperature(s->temperature), scores[WINDOW], best;
    uint32_t words[WINDOW] = {0}; /* stale where a block cannot win: see window_words */
    int64_t winner = first_equal(c->logits, c->count, (float)c->max), stop;
    best = qllm_gumbel(s->seed, s->prompt, step, (uint32_t)c->ids[winner]);
    for (int64_t first = 0; first < c->count; first = stop) {
        int32_t window = c->ids[first] / WINDOW;
        double top = -INFINITY;
        for (stop = first; stop < c->count && c->ids[stop] / WINDOW == window; stop++) {
            double score = ((double)c->logits[stop] - c->max) * inverse;
            scores[stop - first] = score;
            top = score > top ? score : top;
        }
        if (top + QLLM_GUMBEL_MAX < best)
            continue;
        window_words(c, s, step, first, stop, scores, best, words);
        for (int64_t i = first; i < stop; i++) {
            uint32_t word = words[c->ids[i] % WINDOW];
            double score = scores[i - first];
            /* | and not ||: the first is as good as random for a branch, the second nearly true */
            if ((score + QLLM_GUMBEL_MAX < best) | (score + qllm_gumbel_bound(word) < best))
                continue;
            score += qllm_gumbel_of(word);
            if (score > best || (score == best && i < winner)) {
                best = score;
                winner = i;
            }
        }
    }
    return winner;
}

/* Checks everything and leaves the penalized logits in *c.  *raw_max is the largest raw logit. */
static qllm_status prepare(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                           const int64_t *history, int64_t n_history, void *scratch,
                           candidates *c, float *raw_max, qllm_error *error)
{
    qllm_status status = qllm_sampling_check(sampling, error);
    if (status == QLLM_OK)
        status = check_vocab(vocab, error);
    if (status == QLLM_OK)
        status = check_logits(logits, vocab, raw_max, error);
    if (status != QLLM_OK)
        return status;
    *c = carve(scratch, vocab);
    for (int64_t i = 0; i < vocab; i++)
        c->logits[i] = logits[i] + 0.0f; /* -0 becomes 0, so that equal numbers have equal bits */
    status = penalize(logits, c->logits, vocab, sampling->repetition_penalty, history, n_history,
                      error);
    c->max = n_history > 0 ? largest(c->logits, vocab) : *raw_max;
    return status;
}

/* Whether the weights of filter(), before top_p, are those of the raw logits. */
static int weighs_raw(const qllm_sampling *s, int64_t vocab, int64_t n_history)
{
    return s->temperature == 1 && (s->top_k == 0 || s->top_k >= vocab) &&
           (s->repetition_penalty == 1 || n_history == 0);
}

qllm_status qllm_sample(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                        const int64_t *history, int64_t n_history, uint32_t step, void *scratch,
                        qllm_sampled *out, qllm_error *error)
{
    candidates c;
    float raw_max;
    qllm_status status = prepare(logits, vocab, sampling, history, n_history, scratch, &c,
                                 &raw_max, error);
    if (status != QLLM_OK)
        return status;
    double log_p = 0;
    int64_t token = 0;
    if (sampling->temperature == 0)
        token = first_equal(c.logits, vocab, (float)c.max);
    else {
        double total = filter(&c, sampling);
        int64_t winner = race(&c, sampling, step);
        token = c.ids[winner];
        log_p = ((double)c.logits[winner] - c.max) *
                qllm_inverse_temperature(sampling->temperature) - log(total);
    }
    double raw_total = sampling->temperature > 0 && weighs_raw(sampling, vocab, n_history)
        ? c.total : qllm_exp_weights(logits, vocab, raw_max, 1, NULL);
    *out = (qllm_sampled){token, (float)log_softmax(logits, raw_max, raw_total, token),
                          (float)log_p};
    return QLLM_OK;
}

qllm_status qllm_distribution(const float *logits, int64_t vocab, const qllm_sampling *sampling,
                              const int64_t *history, int64_t n_history, void *scratch,
                              float *probabilities, qllm_error *error)
{
    candidates c;
    float raw_max;
    qllm_status status = prepare(logits, vocab, sampling, history, n_history, scratch, &c,
                                 &raw_max, error);
    if (status != QLLM_OK)
        return status;
    memset(probabilities, 0, (size_t)vocab * sizeof *probabilities);
    if (sampling->temperature == 0) {
        probabilities[first_equal(c.logits, vocab, (float)c.max)] = 1;
        return QLLM_OK;
    }
    double total = filter(&c, sampling);
    for (int64_t i = 0; i < c.count; i++)
        probabilities[c.ids[i]] = (float)(c.weights[i] / total);
    return QLLM_OK;
}
