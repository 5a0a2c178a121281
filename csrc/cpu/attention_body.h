/* Attention of one row and one key-value head, written once on top of sixteen lanes.  Included by
 * ops_<set>.c after its lanes_<set>.h and ops_body.h.  Lanes are positions while scores are formed
 * (keys lie interleaved for that) and elements of the head while values are summed.  Query heads go
 * by four, two and one: a key or value that has been read serves all of them. */
#ifndef QLLM_CPU_ATTENTION_BODY_H
#define QLLM_CPU_ATTENTION_BODY_H

#include "cpu/cpu_ops.h"
#include "cpu/ops_body.h"

enum { ATTENTION_HEADS = QLLM_ATTENTION_HEADS, ATTENTION_CHAINS = 4 };

/* Vectors side by side for `heads` heads: as many sums as there are registers for. */
QLLM_INLINE int chains_for(const int heads)
{
    return LANES_ATTENTION_SUMS / heads < ATTENTION_CHAINS ? LANES_ATTENTION_SUMS / heads
                                                           : ATTENTION_CHAINS;
}

/* q . k of `heads` heads and `chains` panels of 16 positions, from `k` on; head h into
 * out + h * stride.  The last panel gives `width` positions. */
QLLM_INLINE void dot_panels(const int heads, const int chains, const float *q, const float *k,
                            int64_t head_dim, int64_t width, float *out, int64_t stride)
{
    lanes sum[ATTENTION_HEADS][ATTENTION_CHAINS];
    LANES_UNROLL
    for (int h = 0; h < heads; h++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            sum[h][c] = lanes_zero();
    for (int64_t d = 0; d < head_dim; d++) {
        lanes key[ATTENTION_CHAINS];
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            key[c] = lanes_load(k + (c * head_dim + d) * QLLM_KV_PANEL);
        LANES_UNROLL
        for (int h = 0; h < heads; h++) {
            lanes value = lanes_set1(q[h * head_dim + d]);
            LANES_UNROLL
            for (int c = 0; c < chains; c++)
                sum[h][c] = lanes_fma(value, key[c], sum[h][c]);
        }
    }
    LANES_UNROLL
    for (int h = 0; h < heads; h++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            lanes_store_n(out + h * stride + c * QLLM_KV_PANEL, sum[h][c],
                          c + 1 < chains ? QLLM_KV_PANEL : width);
}

static int64_t weights_stride(const qllm_attention *args)
{
    return qllm_attention_scratch(args->end - args->begin, 1);
}

/* Where the scores and then the weights of head h lie.  Up to 16 floats before them are written
 * too, since panels are whole; in the end the float before them is 1 / the sum of the weights. */
static float *weights_of(const qllm_attention *args, int64_t h)
{
    return args->scores + QLLM_KV_PANEL + h * weights_stride(args);
}

/* The dot products of the heads h .. h + heads - 1 with the keys of the spans [first, last). */
QLLM_INLINE void dot_spans(const int heads, const qllm_attention *args, int64_t h, int64_t first,
                           int64_t last)
{
    const int64_t head_dim = args->head_dim, panel_size = head_dim * QLLM_KV_PANEL;
    const int64_t stride = weights_stride(args);
    const int chains = chains_for(heads);
    const float *q = args->q + h * head_dim;
    float *dots = weights_of(args, h);
    int64_t start = 0; /* position of the span's first key */
    for (int64_t s = 0; s < first; s++)
        start += args->spans[s].count;
    for (int64_t s = first; s < last && start < args->end; s++) {
        const qllm_kv_span *span = &args->spans[s];
        int64_t from = args->begin > start ? args->begin - start : 0;
        int64_t to = args->end - start < span->count ? args->end - start : span->count;
        int64_t panel = from / QLLM_KV_PANEL, whole = to / QLLM_KV_PANEL, rest = to % QLLM_KV_PANEL;
        float *out = dots + (start - args->begin);
        for (; panel + chains <= whole; panel += chains)
            dot_panels(heads, chains, q, span->k + panel * panel_size, head_dim, QLLM_KV_PANEL,
                       out + panel * QLLM_KV_PANEL, stride);
        for (; panel < whole; panel++)
            dot_panels(heads, 1, q, span->k + panel * panel_size, head_dim, QLLM_KV_PANEL,
                       out + panel * QLLM_KV_PANEL, stride);
        if (from < to && rest > 0)
            dot_panels(heads, 1, q, span->k + panel * panel_size, head_dim, rest,
                       out + panel * QLLM_KV_PANEL, stride);
        start += span->count;
    }
}

/* dots -> exp(score - max score) in place; returns their lane sum. */
static float softmax_numerators(float *dots, int64_t n, float scale, const float *bias)
{
    lanes factor = lanes_set1(scale), largest = lanes_set1(-INFINITY), sum = lanes_zero();
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes score = lanes_load_n(dots + i, width);
        score = bias != NULL ? lanes_fma(score, factor, lanes_load_n(bias + i, width))
                             : lanes_mul(score, factor);
        lanes_store_n(dots + i, score, width);
        if (width == 16)
            largest = lanes_max(score, largest);
    }
    float max = lanes_max_all(largest);
    for (int64_t i = n / 16 * 16; i < n; i++)
        max = dots[i] > max ? dots[i] : max;
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes e = lanes_exp(lanes_sub(lanes_load_n(dots + i, width), lanes_set1(max)));
        lanes_store_n(dots + i, e, width);
        sum = lanes_add(sum, width == 16 ? e : lanes_load_n(dots + i, width));
    }
    return lanes_sum(sum);
}

/* Elements [d, d + 16 * chains) of the outputs of the heads h .. h + heads - 1: sum over positions
 * of weight * value, times the scale of the head.  One vector alone may be a part of one. */
QLLM_INLINE void sum_values(const int heads, const int chains, const bool whole,
                            const qllm_attention *args, int64_t h, int64_t d)
{
    lanes sum[ATTENTION_HEADS][ATTENTION_CHAINS];
    const float *e = weights_of(args, h);
    int64_t start = 0, width = whole ? 16 : width_at(d, args->head_dim);
    int64_t stride = weights_stride(args);
    float *out = args->out + h * args->head_dim + d;
    LANES_UNROLL
    for (int i = 0; i < heads; i++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            sum[i][c] = lanes_zero();
    for (int64_t s = 0; s < args->n_spans && start < args->end; s++) {
        const qllm_kv_span *span = &args->spans[s];
        int64_t from = args->begin > start ? args->begin - start : 0;
        int64_t to = args->end - start < span->count ? args->end - start : span->count;
        const float *weights = e + (start - args->begin);
        for (int64_t j = from; j < to; j++) {
            const float *v = span->v + j * args->head_dim + d;
            lanes value[ATTENTION_CHAINS];
            LANES_UNROLL
            for (int c = 0; c < chains; c++)
                value[c] = whole ? lanes_load(v + 16 * c) : lanes_load_n(v, width);
            LANES_UNROLL
            for (int i = 0; i < heads; i++) {
                lanes weight = lanes_set1(weights[i * stride + j]);
                LANES_UNROLL
                for (int c = 0; c < chains; c++)
                    sum[i][c] = lanes_fma(weight, value[c], sum[i][c]);
            }
        }
        start += span->count;
    }
    LANES_UNROLL
    for (int i = 0; i < heads; i++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            lanes_store_n(out + i * args->head_dim + 16 * c,
                          lanes_mul(sum[i][c], lanes_set1(e[i * stride - 1])), width);
}

/* Vectors [first, last) of the outputs of the heads h .. h + heads - 1. */
QLLM_INLINE void sum_vectors(const int heads, const qllm_attention *args, int64_t h, int64_t first,
                             int64_t last)
{
    const int chains = chains_for(heads);
    int64_t d = 16 * first, end = 16 * last < args->head_dim ? 16 * last : args->head_dim;
    for (; d + 16 * chains <= end; d += 16 * chains)
        sum_values(heads, chains, true, args, h, d);
    for (; d < end; d += 16)
        sum_values(heads, 1, false, args, h, d);
}

static void attention_scores(const qllm_attention *args, int64_t first, int64_t last)
{
    int64_t h = 0;
    for (; h + 4 <= args->heads; h += 4)
        dot_spans(4, args, h, first, last);
    for (; h + 2 <= args->heads; h += 2)
        dot_spans(2, args, h, first, last);
    for (; h < args->heads; h++)
        dot_spans(1, args, h, first, last);
}

static void attention_weights(const qllm_attention *args, int64_t h)
{
    const float *bias = args->bias;
    float *weights = weights_of(args, h);
    if (bias != NULL)
        bias += h * args->bias_stride + args->begin;
    weights[-1] = 1.0f / softmax_numerators(weights, args->end - args->begin, args->scale, bias);
}

static void attention_values(const qllm_attention *args, int64_t first, int64_t last)
{
    int64_t h = 0;
    for (; h + 4 <= args->heads; h += 4)
        sum_vectors(4, args, h, first, last);
    for (; h + 2 <= args->heads; h += 2)
        sum_vectors(2, args, h, first, last);
    for (; h < args->heads; h++)
        sum_vectors(1, args, h, first, last);
}

static void attention(const qllm_attention *args)
{
    for (int64_t h = 0; h < args->heads; h += QLLM_ATTENTION_HEADS) {
        qllm_attention few = *args;
        few.q += h * args->head_dim;
        few.out += h * args->head_dim;
        few.bias = args->bias != NULL ? args->bias + h * args->bias_stride : NULL;
        few.heads = args->heads - h < QLLM_ATTENTION_HEADS ? args->heads - h : QLLM_ATTENTION_HEADS;
        attention_scores(&few, 0, few.n_spans);
        for (int64_t i = 0; i < few.heads; i++)
            attention_weights(&few, i);
        attention_values(&few, 0, (few.head_dim + 15) / 16);
    }
}

#endif
