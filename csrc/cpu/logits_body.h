/* The functions of core/logit_ops.h, written once on top of sixteen float lanes and eight double
 * lanes.  Included by logits_<set>.c after lanes_<set>.h and dlanes_<set>.h.  What each function
 * computes, and in which order, stands in core/logit_ops.h and core/exp.h. */
#ifndef QLLM_CPU_LOGITS_BODY_H
#define QLLM_CPU_LOGITS_BODY_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "core/exp.h"
#include "core/logit_ops.h"
#include "core/rng.h"

/* Sixteen values with the first n of `values`, -inf behind. */
QLLM_INLINE void fill_rest(const float *values, int64_t n, float rest[16])
{
    lanes_store(rest, lanes_set1(-INFINITY));
    memcpy(rest, values, (size_t)n * sizeof *rest);
}

static bool scan_rest(const float *logits, int64_t n, float *top)
{
    bool good = true;
    *top = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        *top = logits[i] > *top ? logits[i] : *top;
        good &= logits[i] < INFINITY;
    }
    return good;
}

static bool scan(const float *logits, int64_t n, float *tops, float *max)
{
    uint32_t bad = 0;
    float all = -INFINITY;
    int64_t i = 0;
    for (; i + QLLM_TILE <= n; i += QLLM_TILE) {
        lanes top = lanes_set1(-INFINITY);
        LANES_UNROLL
        for (int j = 0; j < QLLM_TILE; j += 16) {
            lanes x = lanes_load(logits + i + j);
            bad |= lanes_not_below(x, INFINITY);
            top = lanes_max(x, top);
        }
        tops[i / QLLM_TILE] = lanes_max_all(top);
        all = tops[i / QLLM_TILE] > all ? tops[i / QLLM_TILE] : all;
    }
    bool good = bad == 0;
    if (i < n) {
        good &= scan_rest(logits + i, n - i, &tops[i / QLLM_TILE]);
        all = tops[i / QLLM_TILE] > all ? tops[i / QLLM_TILE] : all;
    }
    *max = all;
    return good;
}

QLLM_INLINE dlanes dlanes_exp2(dlanes_table table, dlanes z)
{
    const dlanes lowest = dlanes_set1(QLLM_EXP2_LOWEST), shift = dlanes_set1(QLLM_EXP2_SHIFT);
    dlanes t = dlanes_add(z, shift);
    dlanes f = dlanes_sub(z, dlanes_sub(t, shift)), f2 = dlanes_mul(f, f);
    dlanes high = dlanes_fma(dlanes_set1(QLLM_EXP2_C5), f, dlanes_set1(QLLM_EXP2_C4));
    dlanes middle = dlanes_fma(dlanes_set1(QLLM_EXP2_C3), f, dlanes_set1(QLLM_EXP2_C2));
    dlanes low = dlanes_fma(dlanes_set1(QLLM_EXP2_C1), f, dlanes_set1(QLLM_EXP2_C0));
    dlanes q = dlanes_fma(f2, dlanes_fma(f2, high, middle), low);
    dlanes s = dlanes_power(table, t);
    return dlanes_keep(z, lowest, dlanes_fma(s, dlanes_mul(f, q), s));
}

static void weights(const float *logits, int64_t n, double max, double factor, double *out,
                    double sums[QLLM_LANES])
{
    const dlanes_table table = dlanes_table_load(qllm_exp2_table);
    const dlanes top = dlanes_set1(max), scale = dlanes_set1(factor);
    dlanes sum[2] = {dlanes_set1(0.0), dlanes_set1(0.0)};
    for (int64_t i = 0; i < n; i += 16) {
        float rest[16];
        const float *x = logits + i;
        bool whole = n - i >= 16;
        if (!whole) {
            fill_rest(x, n - i, rest);
            x = rest;
        }
        dlanes w[2];
        LANES_UNROLL
        for (int h = 0; h < 2; h++) {
            dlanes d = dlanes_sub(dlanes_load_float(x + 8 * h), top);
            w[h] = dlanes_exp2(table, dlanes_mul(d, scale));
            sum[h] = dlanes_add(sum[h], w[h]);
        }
        if (out != NULL && whole) {
            dlanes_store(out + i, w[0]);
            dlanes_store(out + i + 8, w[1]);
        } else if (out != NULL) {
            double last[16];
            dlanes_store(last, w[0]);
            dlanes_store(last + 8, w[1]);
            memcpy(out + i, last, (size_t)(n - i) * sizeof *out);
        }
    }
    dlanes_store(sums, sum[0]);
    dlanes_store(sums + 8, sum[1]);
}

static int64_t count(const float *values, int64_t n, float bound)
{
    int64_t found = 0, i = 0;
    for (; i + 16 <= n; i += 16)
        found += __builtin_popcount(lanes_not_below(lanes_load(values + i), bound));
    for (; i < n; i++)
        found += values[i] >= bound;
    return found;
}

static void mass(const float *values, const double *weights, int64_t n, float bound,
                 double sums[QLLM_LANES])
{
    const dlanes limit = dlanes_set1((double)bound);
    dlanes low = dlanes_set1(0.0), high = low;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        low = dlanes_add(low, dlanes_keep(dlanes_load_float(values + i), limit,
                                          dlanes_load(weights + i)));
        high = dlanes_add(high, dlanes_keep(dlanes_load_float(values + i + 8), limit,
                                            dlanes_load(weights + i + 8)));
    }
    dlanes_store(sums, low);
    dlanes_store(sums + 8, high);
    for (int j = 0; i < n; i++, j++)
        sums[j] += values[i] >= bound ? weights[i] : 0.0;
}

static int64_t pick(const float *logits, int64_t n, const float *tops, float bound, int32_t *ids,
                      float *values)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 16) {
        if (tops[i / QLLM_TILE] < bound) {
            i = (i / QLLM_TILE + 1) * QLLM_TILE - 16;
            continue;
        }
        int64_t width = n - i < 16 ? n - i : 16;
        lanes x = lanes_load_n(logits + i, width);
        uint32_t mask = lanes_not_below(x, bound) & ((1u << width) - 1u);
        for (; mask != 0; mask &= mask - 1) {
            int64_t id = i + __builtin_ctz(mask);
            ids[found] = (int32_t)id;
            values[found++] = logits[id];
        }
    }
    return found;
}

/* The noise words of a tile, as qllm_noise_blocks of core/rng.h, 8 blocks in one register. */
static void noise_words(const qllm_race *race, uint32_t block, uint32_t words[QLLM_TILE])
{
    enum { N = QLANES_SIDE_BY_SIDE };
    const qlanes multiplier[2] = {qlanes_set1(QLLM_PHILOX_M0), qlanes_set1(QLLM_PHILOX_M1)};
    const qlanes weyl[2] = {qlanes_set1(QLLM_PHILOX_W0), qlanes_set1(QLLM_PHILOX_W1)};
    for (uint32_t done = 0; done < QLLM_NOISE_BLOCKS; done += 8 * N) {
        /* only the low halves count; what comes into the high ones on the way is never read */
        qlanes key[2] = {qlanes_set1(race->seed), qlanes_set1(race->seed >> 32)}, c[N][4];
        LANES_UNROLL
        for (int h = 0; h < N; h++) {
            c[h][0] = qlanes_count(block + done + 8u * (uint32_t)h);
            c[h][1] = qlanes_set1(race->step);
            c[h][2] = qlanes_set1(race->prompt);
            c[h][3] = qlanes_set1(race->prompt >> 32);
        }
        for (int round = 0; round < QLLM_PHILOX_ROUNDS; round++) {
            LANES_UNROLL
            for (int h = 0; h < N; h++) {
                qlanes a = qlanes_mul(multiplier[0], c[h][0]);
                qlanes b = qlanes_mul(multiplier[1], c[h][2]);
                c[h][0] = qlanes_xor3(qlanes_high(b), c[h][1], key[0]);
                c[h][2] = qlanes_xor3(qlanes_high(a), c[h][3], key[1]);
                c[h][1] = b;
                c[h][3] = a;
            }
            key[0] = qlanes_add(key[0], weyl[0]);
            key[1] = qlanes_add(key[1], weyl[1]);
        }
        LANES_UNROLL
        for (int h = 0; h < N; h++)
            qlanes_store_words(words + 4 * (done + 8u * (uint32_t)h), c[h]);
    }
}

/* An upper bound of the noise of 16 words in float32.  With rest = ~word and h = rest / 2,
 * noise <= -log((rest + 0.5) / 2^32) <= ln 2 (31 - log2 h), and the bits of a float, read as an
 * integer, are 2^23 times at most its log2 + 127: ln 2 (158 - bits / 2^23).  The last term covers
 * the roundings of this and of the score. */
QLLM_INLINE lanes noise_bound(const uint32_t words[16])
{
    uint32_t half[16];
    for (int i = 0; i < 16; i++)
        half[i] = ~words[i] >> 1;
    lanes log2 = lanes_from_int(lanes_bits(lanes_from_int(ilanes_load(half))));
    return lanes_fma(log2, lanes_set1(-0x1.62e43p-1f * 0x1p-23f),
                     lanes_set1(158 * 0x1.62e43p-1f + 2e-3f));
}

static uint64_t contenders(const qllm_race *race, const float *logits, int64_t n, uint32_t tile,
                           uint32_t words[QLLM_TILE])
{
    uint64_t found = 0;
    /* where float32 may not hold the scores, none is judged */
    bool sure = fabs(race->max) < 1e30 && race->inverse < 1e30 && race->inverse > 1e-30;
    noise_words(race, tile * QLLM_NOISE_BLOCKS, words);
    const lanes max = lanes_set1((float)race->max), scale = lanes_set1((float)race->inverse);
    for (int64_t i = 0; i < n; i += 16) {
        lanes x = lanes_load_n(logits + i, n - i < 16 ? n - i : 16);
        uint32_t mask = lanes_not_below(x, race->cut);
        if (sure) {
            lanes score = lanes_mul(lanes_sub(x, max), scale);
            mask &= lanes_not_below(lanes_add(score, noise_bound(words + i)), (float)race->best);
        }
        found |= (uint64_t)mask << i;
    }
    return n < QLLM_TILE ? found & ((UINT64_C(1) << n) - 1) : found;
}

/* Lanes h .. h + 7 of every group. */
QLLM_INLINE void pair_sums_of(const qllm_pair *pair, int h, qllm_pair_sums *out)
{
    const dlanes lowest = dlanes_set1(-(double)FLT_MAX), least = dlanes_set1(DBL_MIN);
    const dlanes ref_max = dlanes_set1(pair->ref_max), test_max = dlanes_set1(pair->test_max);
    const dlanes p_scale = dlanes_set1(pair->p_scale), q_scale = dlanes_set1(pair->q_scale);
    dlanes above_p = dlanes_load(pair->p_above + h), above_q = dlanes_load(pair->q_above + h);
    dlanes kl = dlanes_set1(0.0), kl_reverse = kl, mean_a = kl, mean_b = kl, tv = kl, differ = kl;
    for (int64_t i = h; i < pair->groups * QLLM_LANES; i += QLLM_LANES) {
        dlanes a = dlanes_sub(dlanes_max(dlanes_load_float(pair->ref + i), lowest), ref_max);
        dlanes b = dlanes_sub(dlanes_max(dlanes_load_float(pair->test + i), lowest), test_max);
        dlanes p = dlanes_mul(dlanes_load(pair->p + i), p_scale);
        dlanes q = dlanes_mul(dlanes_load(pair->q + i), q_scale);
        kl = dlanes_fma(p, dlanes_sub(a, b), kl);
        kl_reverse = dlanes_fma(q, dlanes_sub(b, a), kl_reverse);
        mean_a = dlanes_fma(p, a, mean_a);
        mean_b = dlanes_fma(q, b, mean_b);
        tv = dlanes_add(tv, dlanes_abs(dlanes_sub(p, q)));
        /* two products and a difference, not an fma: exactly 0 for equal rows */
        dlanes f = dlanes_sub(dlanes_mul(above_q, p), dlanes_mul(above_p, q));
        dlanes part = dlanes_mul(p, dlanes_div(f, dlanes_add(q, f)));
        differ = dlanes_add(differ, dlanes_keep(f, least, part));
        above_p = dlanes_add(above_p, p);
        above_q = dlanes_add(above_q, q);
    }
    dlanes_store(out->kl + h, kl);
    dlanes_store(out->kl_reverse + h, kl_reverse);
    dlanes_store(out->mean_a + h, mean_a);
    dlanes_store(out->mean_b + h, mean_b);
    dlanes_store(out->tv + h, tv);
    dlanes_store(out->disagreement + h, differ);
}

static void pair_sums(const qllm_pair *pair, qllm_pair_sums *out)
{
    pair_sums_of(pair, 0, out);
    pair_sums_of(pair, 8, out);
}

#endif
