#include "core/logit_stats.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "core/checked.h"
#include "core/exp.h"

/* The tokens that either row can draw, sorted by test - ref from the largest down; then up to
 * LANES - 1 tokens that neither can draw, so that the sums run over whole groups of LANES. */
typedef struct pair {
    int64_t count;    /* a multiple of LANES */
    uint64_t *keys;   /* (count) ascending; equal keys are equal test - ref */
    float *ref;       /* (count) logits */
    float *test;      /* (count) */
    double *p;        /* (count) the two distributions at the temperature at hand */
    double *q;        /* (count) */
    double ref_max, test_max;
} pair;

/* A row of logits before sorting. */
typedef struct row_top {
    int64_t argmax; /* lowest id among equals */
    double max;
} row_top;

enum { DIGIT_BITS = 11, BUCKETS = 1 << DIGIT_BITS, LANES = 4, BLOCK = 256 };

int64_t qllm_logit_stats_scratch(int64_t vocab)
{
    int64_t bytes, each = 4 * sizeof(uint64_t) + 2 * sizeof(float) + 2 * sizeof(int32_t);
    if (vocab < 1 || vocab > INT32_MAX || !qllm_checked_round_up(vocab, LANES, &vocab) ||
        !qllm_checked_mul(vocab, each, &bytes))
        return -1;
    return bytes;
}

static qllm_status check_row(const float *logits, int64_t vocab, const char *name, row_top *top,
                             qllm_error *error)
{
    int64_t best = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (!(logits[i] < INFINITY))
            return qllm_fail(error, QLLM_VALUE, "%s: token %" PRId64 " of %" PRId64 " is %s; "
                             "logits are finite numbers, or -inf for tokens that cannot be drawn",
                             name, i, vocab, isnan(logits[i]) ? "NaN" : "+inf");
        if (logits[i] > logits[best])
            best = i;
    }
    if (logits[best] == -INFINITY)
        return qllm_fail(error, QLLM_VALUE, "%s: all %" PRId64 " tokens are -inf, so that none can "
                         "be drawn", name, vocab);
    *top = (row_top){best, logits[best]};
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
    return bits >> 63 ? bits : ~(bits | UINT64_C(1) << 63);
}

/* One pass of a radix sort by the digit at `shift`; false where all share it and nothing moved. */
static bool sort_digit(const uint64_t *keys, const int32_t *ids, int64_t n, int shift,
                       uint64_t *keys_out, int32_t *ids_out)
{
    int64_t starts[BUCKETS] = {0}, start = 0;
    for (int64_t i = 0; i < n; i++)
        starts[(keys[i] >> shift) % BUCKETS]++;
    if (starts[(keys[0] >> shift) % BUCKETS] == n)
        return false;
    for (int64_t b = 0; b < BUCKETS; b++) {
        int64_t size = starts[b];
        starts[b] = start;
        start += size;
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t to = starts[(keys[i] >> shift) % BUCKETS]++;
        keys_out[to] = keys[i];
        ids_out[to] = ids[i];
    }
    return true;
}

/* Sorts the tokens once for all temperatures.  Tokens that neither row can draw are left out. */
static pair sort_pair(const float *ref, const float *test, int64_t vocab, void *scratch)
{
    pair s = {.keys = scratch};
    int64_t room = (vocab + LANES - 1) / LANES * LANES;
    uint64_t *keys = s.keys, *keys_other = keys + room, *keys_swap;
    s.p = (double *)(keys_other + room);
    s.q = s.p + room;
    s.ref = (float *)(s.q + room);
    s.test = s.ref + room;
    int32_t *ids = (int32_t *)(s.test + room), *ids_other = ids + room, *ids_swap;
    for (int64_t i = 0; i < vocab; i++) {
        if (ref[i] == -INFINITY && test[i] == -INFINITY)
            continue;
        keys[s.count] = descending_key((double)test[i] - (double)ref[i]);
        ids[s.count++] = (int32_t)i;
    }
    for (int shift = 0; shift < 64; shift += DIGIT_BITS)
        if (sort_digit(keys, ids, s.count, shift, keys_other, ids_other)) {
            keys_swap = keys, keys = keys_other, keys_other = keys_swap;
            ids_swap = ids, ids = ids_other, ids_other = ids_swap;
        }
    s.keys = keys;
    for (int64_t i = 0; i < s.count; i++) {
        s.ref[i] = ref[ids[i]];
        s.test[i] = test[ids[i]];
    }
    for (; s.count % LANES != 0; s.count++) {
        s.ref[s.count] = s.test[s.count] = -INFINITY;
        s.keys[s.count] = UINT64_MAX;
    }
    return s;
}

/* out = softmax(logits / temperature); returns sum exp((logit - max) / temperature). */
static double softmax(const float *logits, int64_t count, double max, double inverse_temperature,
                      double *out)
{
    double total = qllm_exp_weights(logits, count, max, inverse_temperature, out);
    double scale = 1 / total;
    for (int64_t i = 0; i < count; i++)
        out[i] *= scale;
    return total;
}

static double sum_lanes(const double lanes[LANES])
{
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/* The sums over tokens that need no order.  With a = ref - max and b likewise, log p = a / T - log
 * of total_p, so that for equal rows every difference below is 0.  A product with a probability of
 * 0 is 0, also where the logit is -inf. */
static void divergences(const pair *s, double inverse_temperature, double total_p, double total_q,
                        const qllm_logit_stats *out, int64_t t)
{
    double kl[LANES] = {0}, kl_reverse[LANES] = {0}, tv[LANES] = {0};
    double mean_a[LANES] = {0}, mean_b[LANES] = {0};
    for (int64_t i = 0; i < s->count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double p = s->p[i + lane], q = s->q[i + lane];
            double a = (double)s->ref[i + lane] - s->ref_max;
            double b = (double)s->test[i + lane] - s->test_max;
            kl[lane] += p > 0 ? p * (a - b) : 0;
            kl_reverse[lane] += q > 0 ? q * (b - a) : 0;
            mean_a[lane] += p > 0 ? p * a : 0;
            mean_b[lane] += q > 0 ? q * b : 0;
            tv[lane] += fabs(p - q);
        }
    double log_p = log(total_p), log_q = log(total_q), shift = log_q - log_p;
    /* rounding can leave a negative trace of what is never negative */
    out->kl[t] = fmax(sum_lanes(kl) * inverse_temperature + shift, 0);
    out->kl_reverse[t] = fmax(sum_lanes(kl_reverse) * inverse_temperature - shift, 0);
    out->tv[t] = fmin(0.5 * sum_lanes(tv), 1);
    out->entropy_ref[t] = log_p - sum_lanes(mean_a) * inverse_temperature;
    out->entropy_test[t] = log_q - sum_lanes(mean_b) * inverse_temperature;
    out->max_ref[t] = 1 / total_p;
}

/* 1 - A: with P and Q the masses of the tokens of larger q / p, e = Q p / q - P, and the term
 * p e / (1 + e) is p f / (q + f) with f = Q p - P q, which neither over- nor underflows.  Tokens of
 * equal q / p see the same P and Q. */
static double disagreement(const pair *s)
{
    double f[BLOCK], lanes[LANES] = {0};
    double mass_p = 0, mass_q = 0, above_p = 0, above_q = 0;
    uint64_t key = s->keys[0];
    for (int64_t start = 0; start < s->count; start += BLOCK) {
        int64_t n = s->count - start < BLOCK ? s->count - start : BLOCK;
        const double *p = s->p + start, *q = s->q + start;
        for (int64_t i = 0; i < n; i++) {
            if (s->keys[start + i] != key) {
                key = s->keys[start + i];
                above_p = mass_p;
                above_q = mass_q;
            }
            f[i] = above_q * p[i] - above_p * q[i];
            mass_p += p[i];
            mass_q += q[i];
        }
        for (int64_t i = 0; i < n; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                double part = f[i + lane] / (q[i + lane] + f[i + lane]);
                lanes[lane] += f[i + lane] > 0 ? p[i + lane] * part : 0;
            }
    }
    return fmin(sum_lanes(lanes), 1);
}

/* Temperature 0: both distributions are one-hot. */
static void greedy(row_top ref, row_top test, int64_t target, const qllm_logit_stats *out,
                   int64_t t)
{
    int differ = ref.argmax != test.argmax;
    out->kl[t] = out->kl_reverse[t] = differ ? INFINITY : 0;
    out->tv[t] = out->disagreement[t] = differ;
    out->entropy_ref[t] = out->entropy_test[t] = 0;
    out->max_ref[t] = 1;
    out->delta_p[t] = (test.argmax == target) - (ref.argmax == target);
}

qllm_status qllm_logit_stats_row(const float *ref, const float *test, int64_t vocab,
                                 const double *temperatures, int64_t n_temperatures, int64_t target,
                                 void *scratch, const qllm_logit_stats *out, int *same_top,
                                 qllm_error *error)
{
    row_top ref_top, test_top;
    qllm_status status = check_arguments(vocab, temperatures, n_temperatures, target, error);
    if (status == QLLM_OK)
        status = check_row(ref, vocab, "ref", &ref_top, error);
    if (status == QLLM_OK)
        status = check_row(test, vocab, "test", &test_top, error);
    if (status != QLLM_OK)
        return status;
    *same_top = ref_top.argmax == test_top.argmax;
    pair s = sort_pair(ref, test, vocab, scratch);
    s.ref_max = ref_top.max;
    s.test_max = test_top.max;
    double target_a = target < 0 ? 0 : (double)ref[target] - s.ref_max;
    double target_b = target < 0 ? 0 : (double)test[target] - s.test_max;
    for (int64_t t = 0; t < n_temperatures; t++) {
        double temperature = temperatures[t];
        if (temperature == 0) {
            greedy(ref_top, test_top, target, out, t);
            continue;
        }
        double inverse = qllm_inverse_temperature(temperature);
        double total_p = softmax(s.ref, s.count, s.ref_max, inverse, s.p);
        double total_q = softmax(s.test, s.count, s.test_max, inverse, s.q);
        divergences(&s, inverse, total_p, total_q, out, t);
        out->disagreement[t] = disagreement(&s);
        out->delta_p[t] = target < 0 ? 0 : qllm_exp(target_b * inverse) / total_q -
                                           qllm_exp(target_a * inverse) / total_p;
    }
    return QLLM_OK;
}
