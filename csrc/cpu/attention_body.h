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
 * out + h * stride. */
QLLM_INLINE void dot_panels(const int heads, const int chains, const float *q, const float *k,
                            int64_t head_dim, float *out, int64_t stride)
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
            lanes_store(out + h * stride + c * QLLM_KV_PANEL, sum[h][c]);
}

/* The dot products of positions [begin, end) of `heads` heads; head h into dots + h * stride.  16
 * floats before each row and behind its last one are written too, since panels are whole. */
QLLM_INLINE void dot_spans(const int heads, const qllm_attention *args, const float *q, float *dots,
                           int64_t stride)
{
    const int64_t head_dim = args->head_dim, panel_size = head_dim * QLLM_KV_PANEL;
    const int chains = chains_for(heads);
    int64_t start = 0; /* position of the span's first key */
    for (int64_t s = 0; s < args->n_spans && start < args->end; s++) {
        const qllm_kv_span *span = &args->spans[s];
        int64_t from = args->begin > start ? args->begin - start : 0;
        int64_t to = args->end - start < span->count ? args->end - start : span->count;
        int64_t panel = from / QLLM_KV_PANEL, panels = (to + QLLM_KV_PANEL - 1) / QLLM_KV_PANEL;
        float *out = dots + (start - args->begin);
        for (; from < to && panel + chains <= panels; panel += chains)
            dot_panels(heads, chains, q, span->k + panel * panel_size, head_dim,
                       out + panel * QLLM_KV_PANEL, stride);
        for (; from < to && panel < panels; panel++)
            dot_panels(heads, 1, q, span->k + panel * panel_size, head_dim,
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

/* out[d ..] of `chains` vectors of `heads` heads: sum over positions of e_j * v_jd, times the scale
 * of the head.  One vector alone may be a part of one. */
QLLM_INLINE void sum_values(const int heads, const int chains, const bool whole,
                            const qllm_attention *args, const float *e, int64_t stride, int64_t d,
                            const float *scale, float *out)
{
    lanes sum[ATTENTION_HEADS][ATTENTION_CHAINS];
    int64_t start = 0, width = whole ? 16 : width_at(d, args->head_dim);
    LANES_UNROLL
    for (int h = 0; h < heads; h++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            sum[h][c] = lanes_zero();
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
            for (int h = 0; h < heads; h++) {
                lanes weight = lanes_set1(weights[h * stride + j]);
                LANES_UNROLL
                for (int c = 0; c < chains; c++)
                    sum[h][c] = lanes_fma(weight, value[c], sum[h][c]);
            }
        }
        start += span->count;
    }
    LANES_UNROLL
    for (int h = 0; h < heads; h++)
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            lanes_store_n(out + h * args->head_dim + d + 16 * c,
                          lanes_mul(sum[h][c], lanes_set1(scale[h])), width);
}

/* The heads first .. first + heads - 1. */
QLLM_INLINE void attend_heads(const int heads, const qllm_attention *args, int64_t first)
{
    int64_t n = args->end - args->begin, stride = qllm_attention_scratch(n, 1), d = 0;
    float *dots = args->scores + QLLM_KV_PANEL, *out = args->out + first * args->head_dim;
    float scale[ATTENTION_HEADS];
    const int chains = chains_for(heads);
    dot_spans(heads, args, args->q + first * args->head_dim, dots, stride);
    for (int h = 0; h < heads; h++) {
        const float *bias = args->bias;
        if (bias != NULL)
            bias += (first + h) * args->bias_stride + args->begin;
        scale[h] = 1.0f / softmax_numerators(dots + h * stride, n, args->scale, bias);
    }
    for (; d + 16 * chains <= args->head_dim; d += 16 * chains)
        sum_values(heads, chains, true, args, dots, stride, d, scale, out);
    for (; d < args->head_dim; d += 16)
        sum_values(heads, 1, false, args, dots, stride, d, scale, out);
}

static void attention(const qllm_attention *args)
{
    int64_t h = 0;
    for (; h + 4 <= args->heads; h += 4)
        attend_heads(4, args, h);
    for (; h + 2 <= args->heads; h += 2)
        attend_heads(2, args, h);
    for (; h < args->heads; h++)
        attend_heads(1, args, h);
}

#endif
