/* Norms, rotation, activations and the int8 form of a row, written once on top of sixteen lanes.
 * Included by ops_<set>.c after its lanes_<set>.h.  What each function computes, and in which
 * order, stands in cpu_ops.h and core/elementary.h. */
#ifndef QLLM_CPU_OPS_BODY_H
#define QLLM_CPU_OPS_BODY_H

#include <math.h>
#include <string.h>

#include "core/elementary.h"
#include "cpu/cpu_ops.h"

/* Elements of the vector at i: 16, or what is left of n. */
QLLM_INLINE int64_t width_at(int64_t i, int64_t n)
{
    return n - i < 16 ? n - i : 16;
}

QLLM_INLINE lanes lanes_exp(lanes x)
{
    x = lanes_max(lanes_set1(QLLM_EXP_MIN), x);
    x = lanes_min(lanes_set1(QLLM_EXP_MAX), x);
    lanes t = lanes_fma(x, lanes_set1(QLLM_EXP_LOG2E), lanes_set1(QLLM_EXP_ROUND));
    lanes n = lanes_sub(t, lanes_set1(QLLM_EXP_ROUND));
    lanes r = lanes_fma(n, lanes_set1(-QLLM_EXP_LN2_HIGH), x);
    r = lanes_fma(n, lanes_set1(-QLLM_EXP_LN2_LOW), r);
    lanes q = lanes_set1(QLLM_EXP_E4);
    q = lanes_fma(q, r, lanes_set1(QLLM_EXP_E3));
    q = lanes_fma(q, r, lanes_set1(QLLM_EXP_E2));
    q = lanes_fma(q, r, lanes_set1(QLLM_EXP_E1));
    q = lanes_fma(q, r, lanes_set1(QLLM_EXP_E0));
    lanes p = lanes_add(lanes_fma(lanes_mul(r, r), q, r), lanes_set1(1.0f));
    return lanes_scale(p, t);
}

static float sum_of(const float *x, int64_t n)
{
    lanes sum = lanes_zero();
    for (int64_t i = 0; i < n; i += 16)
        sum = lanes_add(sum, lanes_load_n(x + i, width_at(i, n)));
    return lanes_sum(sum);
}

/* lane sum of (x - mean)^2 */
static float sum_of_squares(const float *x, int64_t n, float mean)
{
    lanes sum = lanes_zero(), m = lanes_set1(mean);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        lanes d = lanes_sub(lanes_load(x + i), m);
        sum = lanes_add(sum, lanes_mul(d, d));
    }
    if (i < n) {
        float rest[16] = {0.0f};
        lanes d = lanes_sub(lanes_load_n(x + i, n - i), m);
        lanes_store_n(rest, lanes_mul(d, d), n - i);
        sum = lanes_add(sum, lanes_load(rest));
    }
    return lanes_sum(sum);
}

static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *y)
{
    lanes scale = lanes_set1(1.0f / sqrtf(sum_of_squares(x, n, 0.0f) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes value = lanes_mul(lanes_load_n(x + i, width), scale);
        lanes_store_n(y + i, lanes_mul(lanes_load_n(weight + i, width), value), width);
    }
}

static void layer_norm(const float *x, const float *weight, const float *bias, int64_t n, float eps,
                       float *y)
{
    float mean = sum_of(x, n) / (float)n;
    float variance = sum_of_squares(x, n, mean) / (float)n;
    lanes m = lanes_set1(mean), scale = lanes_set1(1.0f / sqrtf(variance + eps));
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes w = lanes_load_n(weight + i, width);
        lanes value = lanes_mul(lanes_sub(lanes_load_n(x + i, width), m), scale);
        value = bias != NULL ? lanes_fma(value, w, lanes_load_n(bias + i, width))
                             : lanes_mul(value, w);
        lanes_store_n(y + i, value, width);
    }
}

static void rope(float *x, const float *cos, const float *sin, int64_t half)
{
    for (int64_t i = 0; i < half; i += 16) {
        int64_t width = width_at(i, half);
        lanes a = lanes_load_n(x + i, width), b = lanes_load_n(x + half + i, width);
        lanes c = lanes_load_n(cos + i, width), s = lanes_load_n(sin + i, width);
        lanes_store_n(x + i, lanes_fma(a, c, lanes_negate(lanes_mul(b, s))), width);
        lanes_store_n(x + half + i, lanes_fma(b, c, lanes_mul(a, s)), width);
    }
}

QLLM_INLINE lanes lanes_silu(lanes x)
{
    lanes e = lanes_exp(lanes_negate(lanes_abs(x)));
    lanes above = lanes_where_negative(x, lanes_mul(x, e), x);
    return lanes_div(above, lanes_add(lanes_set1(1.0f), e));
}

QLLM_INLINE lanes lanes_gelu_tanh(lanes x)
{
    lanes cubic = lanes_fma(lanes_mul(x, x), lanes_set1(QLLM_GELU_TANH_B),
                            lanes_set1(QLLM_GELU_TANH_A));
    lanes e = lanes_exp(lanes_mul(cubic, x));
    return lanes_div(x, lanes_add(lanes_set1(1.0f), e));
}

/* erfc(z / sqrt 2) / 2 for 0 <= z < 1, s = z * z */
QLLM_INLINE lanes lanes_tail_near(lanes z, lanes s)
{
    lanes a = lanes_set1(QLLM_GELU_A5);
    a = lanes_fma(a, s, lanes_set1(QLLM_GELU_A4));
    a = lanes_fma(a, s, lanes_set1(QLLM_GELU_A3));
    a = lanes_fma(a, s, lanes_set1(QLLM_GELU_A2));
    a = lanes_fma(a, s, lanes_set1(QLLM_GELU_A1));
    a = lanes_fma(a, s, lanes_set1(QLLM_GELU_A0));
    return lanes_fma(lanes_negate(z), a, lanes_set1(0.5f));
}

/* The same for 1 <= z <= 14.5. */
QLLM_INLINE lanes lanes_tail_far(lanes z, lanes s)
{
    const lanes minus_half = lanes_set1(-0.5f);
    lanes d = lanes_fma(z, z, lanes_negate(s));
    lanes e = lanes_exp(lanes_mul(minus_half, s));
    e = lanes_fma(e, lanes_mul(minus_half, d), e);
    lanes p = lanes_set1(QLLM_GELU_N4), q = lanes_set1(QLLM_GELU_D5);
    p = lanes_fma(p, z, lanes_set1(QLLM_GELU_N3));
    p = lanes_fma(p, z, lanes_set1(QLLM_GELU_N2));
    p = lanes_fma(p, z, lanes_set1(QLLM_GELU_N1));
    p = lanes_fma(p, z, lanes_set1(QLLM_GELU_N0));
    q = lanes_fma(q, z, lanes_set1(QLLM_GELU_D4));
    q = lanes_fma(q, z, lanes_set1(QLLM_GELU_D3));
    q = lanes_fma(q, z, lanes_set1(QLLM_GELU_D2));
    q = lanes_fma(q, z, lanes_set1(QLLM_GELU_D1));
    q = lanes_fma(q, z, lanes_set1(QLLM_GELU_D0));
    return lanes_mul(e, lanes_div(p, q));
}

QLLM_INLINE lanes lanes_gelu(lanes x)
{
    lanes z = lanes_min(lanes_set1(QLLM_GELU_LIMIT), lanes_abs(x)), s = lanes_mul(z, z);
    lanes tail = lanes_where_negative(lanes_sub(z, lanes_set1(1.0f)), lanes_tail_near(z, s),
                                      lanes_tail_far(z, s));
    return lanes_fma(lanes_negate(z), tail, lanes_max(lanes_zero(), x));
}

typedef enum activation { ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH } activation;

QLLM_INLINE void activate(activation kind, const float *gate, const float *up, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes x = lanes_load_n(gate + i, width);
        lanes value = kind == ACTIVATION_SILU   ? lanes_silu(x)
                      : kind == ACTIVATION_GELU ? lanes_gelu(x)
                                                : lanes_gelu_tanh(x);
        if (up != NULL)
            value = lanes_mul(value, lanes_load_n(up + i, width));
        lanes_store_n(y + i, value, width);
    }
}

static void silu(const float *gate, const float *up, int64_t n, float *y)
{
    activate(ACTIVATION_SILU, gate, up, n, y);
}

static void gelu(const float *gate, const float *up, int64_t n, float *y)
{
    activate(ACTIVATION_GELU, gate, up, n, y);
}

static void gelu_tanh(const float *gate, const float *up, int64_t n, float *y)
{
    activate(ACTIVATION_GELU_TANH, gate, up, n, y);
}

static void add(const float *a, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = width_at(i, n);
        lanes_store_n(x + i, lanes_add(lanes_load_n(x + i, width), lanes_load_n(a + i, width)),
                      width);
    }
}

/* Appends the columns of the vector at `first` whose bit is set, clears them in `magnitude`. */
static int64_t take_outliers(uint32_t mask, int64_t first, float *magnitude, int32_t *outliers)
{
    int64_t n = 0;
    for (int i = 0; i < 16; i++)
        if ((mask >> i) & 1u) {
            outliers[n++] = (int32_t)(first + i);
            magnitude[i] = 0.0f;
        }
    return n;
}

/* The bits of the largest |x| below the threshold; NaN counts as larger than infinity. */
static float absmax_and_outliers(const float *x, int64_t cols, float threshold, int32_t *outliers,
                                 int64_t *n_outliers)
{
    ilanes largest = ilanes_set1(0);
    int64_t found = 0;
    for (int64_t i = 0; i < cols; i += 16) {
        lanes magnitude = lanes_abs(lanes_load_n(x + i, width_at(i, cols)));
        uint32_t mask = threshold > 0.0f ? lanes_not_below(magnitude, threshold) : 0;
        if (mask != 0) {
            float values[16];
            lanes_store(values, magnitude);
            found += take_outliers(mask, i, values, outliers + found);
            magnitude = lanes_load(values);
        }
        largest = ilanes_max(largest, lanes_bits(magnitude));
    }
    *n_outliers = found;
    return qllm_float_from_bits((uint32_t)ilanes_max_all(largest));
}

static void int8_activation(const float *x, int64_t cols, float threshold, int8_t *q, int64_t step,
                            float *scale, int32_t *outliers, int64_t *n_outliers)
{
    int64_t padded = (cols + 63) / 64 * 64;
    float absmax = absmax_and_outliers(x, cols, threshold, outliers, n_outliers);
    float factor = 127.0f / absmax;
    bool usable = isfinite(absmax) && isfinite(factor);
    *scale = usable ? absmax / 127.0f : isfinite(absmax) ? 0.0f : NAN;
    for (int64_t i = 0; i < padded; i += 16) {
        int8_t *to = q + i / 64 * step + i % 64;
        if (usable && i < cols)
            lanes_store_int8(to, lanes_mul(lanes_load_n(x + i, width_at(i, cols)),
                                           lanes_set1(factor)));
        else
            memset(to, 0, 16);
    }
    for (int64_t j = 0; j < *n_outliers; j++)
        q[outliers[j] / 64 * step + outliers[j] % 64] = 0;
}

/* What the values of a block are multiplied by, 0 where all of them become 0; and its scale. */
QLLM_INLINE float block_factor(const bool wide, const float *x, int64_t block, float *scale)
{
    const float limit = wide ? QLLM_INT16_LIMIT : QLLM_INT8_LIMIT;
    ilanes largest = ilanes_set1(0);
    for (int64_t i = 0; i < block; i += 16)
        largest = ilanes_max(largest, lanes_bits(lanes_abs(lanes_load(x + i))));
    float absmax = qllm_float_from_bits((uint32_t)ilanes_max_all(largest));
    float factor = limit / absmax;
    bool usable = isfinite(absmax) && isfinite(factor);
    *scale = usable ? absmax / limit : isfinite(absmax) ? 0.0f : NAN;
    return usable ? factor : 0.0f;
}

/* One block of `block` values by tier. */
QLLM_INLINE void round_block(const bool wide, const float *x, int64_t block, void *q, float *scale)
{
    float factor = block_factor(wide, x, block, scale);
    if (factor == 0.0f) {
        memset(q, 0, (size_t)block * (wide ? 2 : 1));
        return;
    }
    for (int64_t i = 0; i < block; i += 16) {
        lanes scaled = lanes_mul(lanes_load(x + i), lanes_set1(factor));
        if (wide)
            lanes_store_int16((int16_t *)q + i, scaled);
        else
            lanes_store_quads((int8_t *)q + i, scaled);
    }
}

static void block_activation(qllm_tier tier, const float *x, int64_t cols, int64_t block, void *q,
                             float *scale, int32_t *sums)
{
    if (tier == QLLM_TIER_INT16) {
        for (int64_t first = 0; first < cols; first += block)
            round_block(true, x + first, block, (int16_t *)q + first, scale++);
        return;
    }
    for (int64_t first = 0; first < cols; first += block) {
        const int8_t *codes = (int8_t *)q + first;
        round_block(false, x + first, block, (int8_t *)q + first, scale++);
        int32_t sum = 0;
        for (int64_t i = 0; i < block; i++)
            sum += codes[i];
        *sums++ = sum;
    }
}

#endif
