/* What quantization did to a next-token distribution, at many temperatures in one pass, exactly
 * and without sampling.  p = softmax(ref / T), q = softmax(test / T).
 *
 * Coupled agreement A is the probability that p and q draw the same token from common Gumbel
 * noise:
 *     A = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)
 * (Gumbel coupling: arXiv 2408.07978).  With r_i = q_i / p_i, sorted once for all temperatures
 * since the order of r is that of test - ref whatever T, the disagreement is
 *     1 - A = sum_i p_i e_i / (1 + e_i),   e_i = Q(r_j > r_i) / r_i - P(r_j > r_i) >= 0,
 * running sums over the sorted order.  In this form, and with
 * log(p_i / q_i) = (ref_i - test_i) / T + constant, equal rows give exactly 0 in every metric. */
#ifndef QLLM_CORE_LOGIT_STATS_H
#define QLLM_CORE_LOGIT_STATS_H

#include <stdint.h>

#include "core/logit_ops.h"
#include "core/status.h"

/* One value per temperature; every pointer (n_temperatures) float64, none NULL. */
typedef struct qllm_logit_stats {
    double *kl;           /* KL(p || q), nats; +inf where q is 0 and p is not */
    double *kl_reverse;   /* KL(q || p) */
    double *tv;           /* total variation, 0.5 sum |p - q| */
    double *disagreement; /* 1 - A */
    double *entropy_ref;  /* H(p), nats */
    double *entropy_test; /* H(q) */
    double *max_ref;      /* max_i p_i */
    double *delta_p;      /* q[target] - p[target]; 0 without a target */
    double *cross;        /* sum q_i ref_i, the mean of the reference's logits under q; -inf where q
                             can draw what ref cannot */
    double *log_z_ref;    /* log sum exp(ref_i / T); at T = 0 its limit: inf with the sign of the
                             largest logit, and 0 where that is 0 */
} qllm_logit_stats;

/* Orders doubles as integers, from the largest down: the key of test - ref by which tokens are
 * sorted, equals by their ids. */
static inline QLLM_BOTH uint64_t qllm_descending_key(double value)
{
    uint64_t bits;
    value += 0.0; /* -0 and 0 are one number */
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (~(uint64_t)((int64_t)bits >> 63) & UINT64_C(0x7fffffffffffffff));
}

/* What is known of two rows before any temperature. */
typedef struct qllm_pair_tops {
    int64_t ref_argmax, test_argmax; /* lowest id among equals */
    double ref_max, test_max;
    double ref_alone, test_alone; /* the largest logit, less the maximum, that only that row has */
    double test_pick;             /* the reference's logit at the argmax of the other */
    int64_t target;               /* token or -1 */
    double target_ref, target_test; /* its logits, less the maximum; 0 without a target */
} qllm_pair_tops;

/* The sums at one temperature. */
typedef struct qllm_pair_totals {
    double p, q; /* of the weights */
    double kl, kl_reverse, mean_a, mean_b, tv, disagreement; /* qllm_pair_sums, folded */
} qllm_pair_totals;

/* Writes entry t of *out; the totals are not read at temperature 0. */
void qllm_logit_stats_finish(const qllm_pair_tops *tops, const qllm_pair_totals *totals,
                             double temperature, const qllm_logit_stats *out, int64_t t);

/* Refuses a vocabulary, a target or a temperature outside the ranges below. */
qllm_status qllm_logit_stats_check(int64_t vocab, const double *temperatures,
                                   int64_t n_temperatures, int64_t target, qllm_error *error);

/* Scratch bytes for one row; -1 where vocab is not 1 .. 2^31 - 1. */
int64_t qllm_logit_stats_scratch(int64_t vocab);

/* `ops` are the functions over rows (core/logit_ops.h); the results have the same bits with any.
 * ref, test (vocab) float32, finite or -inf (not all -inf; NaN and +inf are errors); temperatures
 * >= 0 and finite, 0 meaning the one-hot argmax (lowest id among equals).  target: token id or -1.
 * *same_top is 1 when the argmaxes agree, else 0.  Sums in float64, fixed order.  `scratch` is
 * 64-byte aligned memory of qllm_logit_stats_scratch(vocab). */
qllm_status qllm_logit_stats_row(const qllm_logit_ops *ops, const float *ref, const float *test,
                                 int64_t vocab, const double *temperatures, int64_t n_temperatures,
                                 int64_t target, void *scratch, const qllm_logit_stats *out,
                                 int *same_top, qllm_error *error);

#endif
