/* How a draw filters its tokens, written once for the host and for devices, on top of functions
 * over rows and lists that each of them brings.  Before it includes this file, it defines
 *   SAMPLER_FUNCTION   how functions are declared
 *   row_tools          the type that row.tools points to
 * and afterwards the functions that are declared below without a body. */
#ifndef QLLM_CORE_SAMPLER_BODY_H
#define QLLM_CORE_SAMPLER_BODY_H

#include <float.h>
#include <math.h>

#include "core/exp.h"
#include "core/log.h"
#include "core/sampler.h"

/* A row at work. */
typedef struct row {
    const row_tools *tools;
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
    const row_tools *tools;
    const float *values;
    const double *weights; /* NULL: counts */
    int64_t n;
    double target;
} goal;

/* The sum of exp((logit - max) / temperature) over n logits, each into weights unless NULL. */
SAMPLER_FUNCTION double weigh(const row_tools *tools, const float *logits, int64_t n, double max,
                              double factor, double *weights);
/* exp((value - max) / temperature). */
SAMPLER_FUNCTION double weight_of(const row *r, float value);
/* As mass of core/logit_ops.h with the bound -FLT_MAX, folded. */
SAMPLER_FUNCTION double mass_of(const row *r, const kept *k);
/* As pick of core/logit_ops.h, into ids and values; returns how many. */
SAMPLER_FUNCTION int64_t pick(const row *r, kept *k, float bound);
/* The count or mass of the values of at least `bound`. */
SAMPLER_FUNCTION double reached(const goal *g, float bound);
/* The largest bound from low to high at which the target is reached, or low. */
SAMPLER_FUNCTION float find_cut(const goal *g, float low, float high);
/* Leaves the tokens above the cut, and the first `ties` of those at it. */
SAMPLER_FUNCTION void keep_from(const row *r, kept *k, float cut, int64_t ties);
/* The smallest of `from` and the values whose weight is at least `weight`. */
SAMPLER_FUNCTION float lowest(const row *r, const kept *k, double weight, float from);

/* Keeps the largest until the goal is reached, among equals the lower ids; all those at the cut
 * have one weight. */
SAMPLER_FUNCTION void keep_largest(const row *r, kept *k, const goal *g)
{
    float cut = find_cut(g, k->cut, (float)r->max);
    /* -0 and 0 are one number */
    double above = reached(g, qllm_key_value(qllm_order_key(cut + 0.0f) + 1));
    double weight = g->weights == NULL ? 1 : weight_of(r, cut);
    int64_t ties = 0;
    for (; ties < k->count && above < g->target; ties++)
        above += weight;
    keep_from(r, k, cut, ties);
}

/* Writes down the tokens with a logit of at least `bound`. */
SAMPLER_FUNCTION void list(const row *r, kept *k, float bound)
{
    k->cut = bound;
    k->listed = true;
    k->count = pick(r, k, bound);
}

/* Weighs the tokens that were written down; returns the sum. */
SAMPLER_FUNCTION double weigh_list(const row *r, kept *k)
{
    k->weighed = true;
    return weigh(r->tools, k->values, k->count, r->max, r->factor, k->weights);
}

/* Where there are as many tiles, the limit-th largest of their tops bounds the limit-th largest
 * logit from below, and few tokens are left to look at. */
SAMPLER_FUNCTION void keep_top_k(const row *r, kept *k, int64_t limit, bool keep_ties)
{
    goal tops = {r->tools, r->tops, NULL, qllm_tiles(r->vocab), (double)limit};
    list(r, k, tops.n >= limit ? find_cut(&tops, -FLT_MAX, (float)r->max) : -FLT_MAX);
    goal all = {r->tools, k->values, NULL, k->count, (double)limit};
    if (k->count > limit && keep_ties)
        keep_from(r, k, find_cut(&all, k->cut, (float)r->max), k->count);
    else if (k->count > limit)
        keep_largest(r, k, &all);
}

/* A logit below which every weight is smaller than `weight` in (0, 1), with room for rounding. */
SAMPLER_FUNCTION float logit_bound(const row *r, double weight)
{
    double bound = r->max + qllm_log(weight * (1 - 1e-6)) / r->inverse;
    float rounded = bound > -FLT_MAX ? nextafterf((float)bound, -INFINITY) : -FLT_MAX;
    return rounded > -FLT_MAX ? rounded : -FLT_MAX;
}

SAMPLER_FUNCTION void keep_top_p(const row *r, kept *k, double top_p)
{
    double target = top_p * k->total;
    if (!k->listed) {
        /* those below a share of what may be left out cannot be more than that together */
        list(r, k, logit_bound(r, (1 - top_p) * k->total / (double)r->vocab));
        weigh_list(r, k);
    }
    goal g = {r->tools, k->values, k->weights, k->count, target};
    keep_largest(r, k, &g);
}

SAMPLER_FUNCTION void keep_min_p(const row *r, kept *k, double min_p)
{
    if (!k->listed) {
        list(r, k, logit_bound(r, min_p));
        weigh_list(r, k);
    }
    float cut = lowest(r, k, min_p, (float)r->max); /* the largest weight is 1 */
    if (cut > k->cut)
        keep_from(r, k, cut, k->count);
}

/* top_k, temperature, top_p, min_p over the penalized logits.  (top_k before the temperature saves
 * exponentials and keeps the same tokens.) */
SAMPLER_FUNCTION void filter(const row *r, const qllm_sampling *s, kept *k)
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
        k->total = k->unfiltered = weigh(r->tools, r->logits, r->vocab, r->max, r->factor, NULL);
    if (s->top_p >= 1 && s->min_p <= 0)
        return;
    if (s->top_p < 1)
        keep_top_p(r, k, s->top_p);
    if (s->min_p > 0)
        keep_min_p(r, k, s->min_p);
    k->total = mass_of(r, k);
}

#endif
