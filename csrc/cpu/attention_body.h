/* Attention of one row and one key-value head, written once on top of sixteen lanes.  Included by
 * ops_<set>.c after its lanes_<set>.h and ops_body.h.  Lanes are positions while scores are formed
 * (keys lie interleaved for that) and elements of the head while values are summed. */
#ifndef QLLM_CPU_ATTENTION_BODY_H
#define QLLM_CPU_ATTENTION_BODY_H

#include "cpu/cpu_ops.h"
#include "cpu/ops_body.h"

enum { ATTENTION_CHAINS = 4 };

/* q . k of `chains` panels of 16 positions, from `k` on, into out. */
QLLM_INLINE void dot_panels(const int chains, const float *q, const float *k, int64_t head_dim,
                            float *out)
{
    lanes sum[ATTENTION_CHAINS];
    LANES_UNROLL
    for (int c = 0; c < chains; c++)
        sum[c] = lanes_zero();
    for (int64_t d = 0; d < head_dim; d++) {
        lanes value = lanes_set1(q[d]);
        LANES_UNROLL
        for (int c = 0; c < chains; c++)
            sum[c] = lanes_fma(value, lanes_load(k + (c * head_dim + d) * QLLM_KV_PANEL), sum[c]);
    }
    LANES_UNROLL
    for (int c = 0; c < chains; c++)
        lanes_store(out + c * QLLM_KV_PANEL, sum[c]);
}

/* The dot products of positions [begin, end) into dots[0 ..]; 16 floats before dots and behind the
 * last one are written too, since panels are whole. */
static void dot_spans(const qllm_attention *args, const float *q, float *dots)
{
    const int64_t panel_size = args->head_dim * QLLM_KV_PANEL;
    int64_t start = 0; /* position of the span's first key */
    for (int64_t s = 0; s < args->n_spans && start < args->end; s++) {
        const qllm_kv_span *span = &args->spans[s];
        int64_t from = args->begin > start ? args->begin - start : 0;
        int64_t to = args->end - start < span->count ? args->end - start : span->count;
        int64_t panel = from / QLLM_KV_PANEL, panels = (to + QLLM_KV_PANEL - 1) / QLLM_KV_PANEL;
        float *out = dots + (start - args->begin);
        for (; from < to && panel + ATTENTION_CHAINS <= panels; panel += ATTENTION_CHAINS)
            dot_panels(ATTENTION_CHAINS, q, span->k + panel * panel_size, args->head_dim,
                       out + panel * QLLM_KV_PANEL);
        for (; from < to && panel < panels; panel++)
            dot_panels(1, q, span->k + panel * panel_size, args->head_dim,
                       out + panel * QLLM_KV_PANEL);
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

/* out[d ..] of `chains` vectors of the head: sum over positions of e_j * v_jd, times `scale`. */
QLLM_INLINE void sum_values(const int chains, const qllm_attention *args, const float *e, int64_t d,
                            float scale, float *out)
{
    lanes sum[ATTENTION_CHAINS];
    int64_t start = 0, width = width_at(d, args->head_dim);
    LANES_UNROLL
    for (int c = 0; c < chains; c++)
        sum[c] = lanes_zero();
    for (int64_t s = 0; s < args->n_spans && start < args->end; s++) {
        const qllm_kv_span *span = &args->spans[s];
        int64_t from = args->begin > start ? args->begin - start : 0;
        int64_t to = args->end - start < span->count ? args->end - start : span->count;
        const float *weights = e + (start - args->begin);
        for (int64_t j = from; j < to; j++) {
            const float *v = span->v + j * args->head_dim + d;
            lanes weight = lanes_set1(weights[j]);
            LANES_UNROLL
            for (int c = 0; c < chains; c++)
                sum[c] = lanes_fma(weight, chains > 1 ? lanes_load(v + 16 * c)
                                                      : lanes_load_n(v, width), sum[c]);
        }
        start += span->count;
    }
    LANES_UNROLL
    for (int c = 0; c < chains; c++)
        lanes_store_n(out + d + 16 * c, lanes_mul(sum[c], lanes_set1(scale)),
                      chains > 1 ? 16 : width);
}

static void attention(const qllm_attention *args)
{
    float *dots = args->scores + QLLM_KV_PANEL;
    int64_t n = args->end - args->begin, wide = 16 * ATTENTION_CHAINS;
    for (int64_t h = 0; h < args->heads; h++) {
        float *out = args->out + h * args->head_dim;
        const float *bias = args->bias != NULL ? args->bias + h * args->bias_stride + args->begin
                                               : NULL;
        dot_spans(args, args->q + h * args->head_dim, dots);
        float scale = 1.0f / softmax_numerators(dots, n, args->scale, bias);
        int64_t d = 0;
        for (; d + wide <= args->head_dim; d += wide)
            sum_values(ATTENTION_CHAINS, args, dots, d, scale, out);
        for (; d < args->head_dim; d += 16)
            sum_values(1, args, dots, d, scale, out);
    }
}

#endif
