/* One draw of the next token.  The order is that of Hugging Face transformers: repetition penalty,
 * then temperature, top_k, top_p, min_p, then the draw
 *     argmax_i (logit_i / temperature + g_i),   g_i = qllm_gumbel(seed, prompt, step, i)
 * over the kept tokens: an exact sample of their softmax (Gumbel-max), coupled across arms and
 * temperatures by common noise.  temperature 0 is greedy: argmax of the penalized logits, the
 * lowest id among equals; the other filters cannot change it. */
#ifndef QLLM_CORE_SAMPLER_H
#define QLLM_CORE_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/logit_ops.h"
#include "core/status.h"

typedef struct qllm_sampling {
    double temperature;        /* >= 0, finite; 0 is greedy */
    int64_t top_k;             /* keep the k largest, ties by lower id; 0 = off; > vocab = all */
    bool keep_ties;            /* top_k keeps all that equal the k-th largest */
    double top_p;              /* (0, 1]: smallest set of largest probabilities with sum >= top_p,
                                  ties by lower id; 1 = off */
    double min_p;              /* [0, 1]: keep p_i >= min_p * max p; 0 = off */
    double repetition_penalty; /* > 0, finite: the logit of a token of the history is divided by it
                                  where positive, else multiplied, once, and saturates at the
                                  largest float32 */
    uint64_t seed;
    uint64_t prompt;           /* names the noise stream, see rng.h */
} qllm_sampling;

/* {1, 0, false, 1, 0, 1, 0, 0}: plain sampling at temperature 1. */
qllm_sampling qllm_sampling_default(void);

/* Refuses values outside the ranges above with a sentence that names the parameter. */
qllm_status qllm_sampling_check(const qllm_sampling *sampling, qllm_error *error);

/* Refuses a token of the history that is outside the vocabulary. */
qllm_status qllm_history_check(const int64_t *history, int64_t n_history, int64_t vocab,
                               qllm_error *error);

/* The logit of a token of the history (Keskar et al. 2019, CTRL, section 4.1; for negative logits
 * as transformers does). */
static inline QLLM_BOTH float qllm_penalized(float logit, double penalty)
{
    double value = logit;
    double changed = value < 0 ? value * penalty : value / penalty;
    if (isfinite(value))
        changed = changed > FLT_MAX ? FLT_MAX : changed < -FLT_MAX ? -FLT_MAX : changed;
    return (float)changed;
}

typedef struct qllm_sampled {
    int64_t token;
    float logprob;          /* natural log of softmax(raw logits)[token]: what the model said */
    float sampling_logprob; /* natural log of the processed, renormalised probability of the draw;
                               0 when greedy */
} qllm_sampled;

/* log softmax(logits / temperature) of a token; total is the sum of exp((logit - max) / T). */
static inline double qllm_log_share(float logit, double max, double inverse_temperature,
                                    double total)
{
    return ((double)logit - max) * inverse_temperature - qllm_log(total);
}

/* Scratch bytes that the functions below need for one row; -1 where the vocabulary
 * has fewer than 1 or more than 2^31 - 1 tokens. */
int64_t qllm_sample_scratch(int64_t vocab);

/* `ops` are the functions over rows (core/logit_ops.h); the results have the same bits with any.
 * logits (vocab) float32, not changed; history (n_history) token ids for the repetition penalty,
 * out-of-range ids are an error.  -inf logits are tokens that cannot be drawn; NaN, +inf, all -inf,
 * or vocab < 1 are errors.  `scratch` is 64-byte aligned memory of qllm_sample_scratch(vocab). */
qllm_status qllm_sample(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                        const qllm_sampling *sampling, const int64_t *history, int64_t n_history,
                        uint32_t step, void *scratch, qllm_sampled *out, qllm_error *error);

/* The distribution that qllm_sample draws from, into probabilities (vocab) float32: exact zeros for
 * tokens that were filtered out; one-hot when greedy. */
qllm_status qllm_distribution(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                              const qllm_sampling *sampling, const int64_t *history,
                              int64_t n_history, void *scratch, float *probabilities,
                              qllm_error *error);

/* log softmax(logits)[token] in float64 sums. */
qllm_status qllm_logprob(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                         int64_t token, void *scratch, double *out, qllm_error *error);

#endif
