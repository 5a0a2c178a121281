/* What costs something in sampling and in the statistics, as one table of functions over rows of
 * logits.  qllm_logit_ops_core is the plain reference; a device offers faster ones with the same
 * bits, since every sum here has one order:
 *
 * lane sum of n values: 16 partial sums from +0 in float64, partial j over the values j, j + 16,
 * j + 32, ... in ascending order, then partial j += partial j + 8 (j < 8), + 4 (j < 4), + 2, + 1:
 * qllm_lane_sum.  Values that are left out count as +0, which changes no partial sum. */
#ifndef QLLM_CORE_LOGIT_OPS_H
#define QLLM_CORE_LOGIT_OPS_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/device.h"
#include "core/status.h"

enum { QLLM_TILE = 64, QLLM_LANES = 16 }; /* tokens of a tile; partial sums */

/* The tiles of a row of n tokens. */
static inline QLLM_BOTH int64_t qllm_tiles(int64_t n)
{
    return (n + QLLM_TILE - 1) / QLLM_TILE;
}

/* Orders floats as integers: key(a) < key(b) exactly when a < b; not for NaN and -0. */
static inline QLLM_BOTH uint32_t qllm_order_key(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static inline QLLM_BOTH float qllm_key_value(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A draw in progress: what decides which tokens can still win. */
typedef struct qllm_race {
    uint64_t seed, prompt;
    uint32_t step;
    double max, inverse;  /* the score of a token is (logit - max) * inverse + its noise */
    float cut;            /* tokens with a logit below it are not in the race; above -inf */
    double best;          /* the best score so far */
} qllm_race;

/* Two rows sorted by test - ref from the largest down: `groups` groups of 16, where lane j of group
 * k is place j * groups + k of the order, so that partial sum j runs over a stretch of neighbours.
 * Places behind the last token are -inf in both rows. */
typedef struct qllm_pair {
    int64_t groups;
    const float *ref, *test; /* (groups, 16) logits */
    const double *p, *q;     /* (groups, 16) weights of the two rows: the largest is 1 */
    double ref_max, test_max;
    double p_scale, q_scale; /* 1 / sum of the weights */
    double p_above[QLLM_LANES], q_above[QLLM_LANES]; /* masses of the lanes below j */
} qllm_pair;

/* Partial sums over the places of a pair, with a = max(ref, -FLT_MAX) - ref_max, b likewise,
 * p = weight * p_scale, q likewise:
 *   kl: fma(p, a - b, .), kl_reverse: fma(q, b - a, .), mean_a: fma(p, a, .),
 *   mean_b: fma(q, b, .), tv: |p - q|,
 *   disagreement: p * (f / (q + f)) where f = Q p - P q is at least DBL_MIN, else 0, where P starts
 *   as p_above[j] and Q as q_above[j], and p and q are added to them after their place. */
typedef struct qllm_pair_sums {
    double kl[QLLM_LANES], kl_reverse[QLLM_LANES], mean_a[QLLM_LANES], mean_b[QLLM_LANES];
    double tv[QLLM_LANES], disagreement[QLLM_LANES];
} qllm_pair_sums;

/* One of the partial sums, with the masses above its next place. */
typedef struct qllm_pair_lane {
    double kl, kl_reverse, mean_a, mean_b, tv, disagreement, p_above, q_above;
} qllm_pair_lane;

/* Adds a place of its lane: logits and weights of the two rows. */
static inline QLLM_BOTH void qllm_pair_add(const qllm_pair *pair, float ref, float test,
                                           double p_weight, double q_weight, qllm_pair_lane *lane)
{
    double a = (double)fmaxf(ref, -FLT_MAX) - pair->ref_max;
    double b = (double)fmaxf(test, -FLT_MAX) - pair->test_max;
    double p = p_weight * pair->p_scale, q = q_weight * pair->q_scale;
    double f = lane->q_above * p - lane->p_above * q;
    lane->kl = fma(p, a - b, lane->kl);
    lane->kl_reverse = fma(q, b - a, lane->kl_reverse);
    lane->mean_a = fma(p, a, lane->mean_a);
    lane->mean_b = fma(q, b, lane->mean_b);
    lane->tv += fabs(p - q);
    lane->disagreement += f >= DBL_MIN ? p * (f / (q + f)) : 0;
    lane->p_above += p;
    lane->q_above += q;
}

typedef struct qllm_logit_ops {
    const char *name;

    /* tops[t]: the largest logit of tile t, *max that of all, NaN passed over; false where a logit
     * is NaN or +inf. */
    bool (*scan)(const float *logits, int64_t n, float *tops, float *max);
    /* qllm_exp2((logit - max) * factor) of each logit into weights (n), which may be NULL; into
     * sums the partial sums of their lane sum. */
    void (*weights)(const float *logits, int64_t n, double max, double factor, double *weights,
                    double sums[QLLM_LANES]);
    /* How many of n values are at least `bound`. */
    int64_t (*count)(const float *values, int64_t n, float bound);
    /* Partial sums of the weights whose value is at least `bound`. */
    void (*mass)(const float *values, const double *weights, int64_t n, float bound,
                 double sums[QLLM_LANES]);
    /* The tokens whose logit is at least `bound`, in the order of their ids: ids and values (up to
     * n), with tops as scan gave them; returns how many. */
    int64_t (*pick)(const float *logits, int64_t n, const float *tops, float bound, int32_t *ids,
                      float *values);
    /* The noise words of the tokens of tile `tile`, of which `n` are in the vocabulary, and bit i
     * set for those whose logit (logits[i]) is at least the cut and whose score may reach the best:
     * never unset for one that does, but set for some that do not, which may differ between
     * sets. */
    uint64_t (*contenders)(const qllm_race *race, const float *logits, int64_t n, uint32_t tile,
                           uint32_t words[QLLM_TILE]);
    void (*pair_sums)(const qllm_pair *pair, qllm_pair_sums *out);
} qllm_logit_ops;

extern const qllm_logit_ops qllm_logit_ops_core;

double qllm_lane_sum(const double sums[QLLM_LANES]);

/* Why a row of logits is refused, with its name: for the first token that is NaN or +inf, or for
 * one whose tokens are all -inf. */
qllm_status qllm_refuse_logit(const char *name, float value, int64_t token, int64_t vocab,
                              qllm_error *error);
qllm_status qllm_refuse_no_logit(const char *name, int64_t vocab, qllm_error *error);

/* Both of them, for a row that is here; leaves its tops and its largest logit as scan does. */
qllm_status qllm_check_logits(const qllm_logit_ops *ops, const char *name, const float *logits,
                              int64_t vocab, float *tops, float *max, qllm_error *error);

#endif
