#include "logit_stats.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "block_ops.h"
#include "decoder.h"

extern "C" {
#include "core/exp.h"
}

enum {
    SORT_THREADS = 512,
    SORT_WARPS = SORT_THREADS / GPU_WARP,
    DIGIT_BITS = 8,
    BUCKETS = 1 << DIGIT_BITS,
    DIGITS = 64 / DIGIT_BITS,
    SUM_THREADS = 128,
    SUM_HALVES = SUM_THREADS / QLLM_LANES
};

struct exp2_powers {
    uint64_t bits[16];
};

/* What the sort finds out about a row. */
struct pair_row {
    qllm_pair_tops tops;
    int64_t count;            /* tokens that either row can draw */
    int64_t ref_bad, test_bad; /* the first token that is NaN or +inf, or -1 */
    float ref_bad_logit, test_bad_logit;
};

struct pair_args {
    const float *ref, *test; /* (rows, vocab) */
    int64_t rows, vocab, room; /* room: places of a sorted row */
    const int64_t *targets;  /* (rows), -1: none */
    uint64_t *keys[2];       /* (rows, vocab) each */
    int32_t *ids[2];
    float *sorted_ref, *sorted_test; /* (rows, room), laid out as qllm_pair says */
    pair_row *found;         /* (rows) */
};

struct sum_args {
    const float *sorted_ref, *sorted_test;
    const pair_row *found;
    int64_t rows, room, n_temperatures;
    const double *factors;   /* (n_temperatures) of weights; 0: temperature 0, which has no sums */
    qllm_pair_totals *totals; /* (rows, n_temperatures) */
    exp2_powers powers;
};

/* ------------------------------------------------------------------------------------ the sort */

struct sort_room {
    gpu_block_room block;
    uint32_t counts[DIGITS][BUCKETS];  /* of all items; then where the next one of a bucket goes */
    uint32_t turn[SORT_WARPS][BUCKETS]; /* the same for those of one turn, warp by warp */
};

static GPU_DEVICE void find_top(gpu_block_room *room, const float *logits, int64_t vocab,
                                double *max, int64_t *argmax, int64_t *bad)
{
    float top = -INFINITY;
    int64_t at = INT64_MAX, wrong = INT64_MAX;
    for (int64_t i = threadIdx.x; i < vocab; i += SORT_THREADS) {
        float value = logits[i];
        if (!(value < INFINITY) && wrong == INT64_MAX)
            wrong = i;
        if (value > top) {
            top = value;
            at = i;
        }
    }
    float largest = gpu_block_choose(room, top, gpu_larger());
    *argmax = gpu_block_choose(room, top == largest ? at : INT64_MAX, gpu_smaller());
    wrong = gpu_block_choose(room, wrong, gpu_smaller());
    *bad = wrong == INT64_MAX ? -1 : wrong;
    *max = largest;
}

/* Writes down the tokens that either row can draw, in the order of their ids, and counts their
 * digits. */
static GPU_DEVICE void write_items(sort_room *room, const float *ref, const float *test,
                                   int64_t vocab, uint64_t *keys, int32_t *ids, pair_row *found)
{
    double ref_alone = -INFINITY, test_alone = -INFINITY;
    int64_t count = 0;
    for (int i = threadIdx.x; i < DIGITS * BUCKETS; i += SORT_THREADS)
        room->counts[i / BUCKETS][i % BUCKETS] = 0;
    gpu_sync_block();
    for (int64_t start = 0; start < vocab; start += SORT_THREADS) {
        int64_t i = start + threadIdx.x;
        uint64_t total;
        float a = i < vocab ? ref[i] : -INFINITY, b = i < vocab ? test[i] : -INFINITY;
        bool there = a > -INFINITY || b > -INFINITY;
        int64_t to = count + (int64_t)gpu_block_sum_before(&room->block, there, &total);
        count += (int64_t)total;
        if (!there)
            continue;
        keys[to] = qllm_descending_key((double)b - (double)a);
        ids[to] = (int32_t)i;
        for (int d = 0; d < DIGITS; d++)
            gpu_atomic_add(&room->counts[d][(keys[to] >> d * DIGIT_BITS) % BUCKETS], 1u);
        if (b == -INFINITY)
            ref_alone = fmax(ref_alone, a - found->tops.ref_max);
        if (a == -INFINITY)
            test_alone = fmax(test_alone, b - found->tops.test_max);
    }
    found->tops.ref_alone = gpu_block_choose(&room->block, ref_alone, gpu_larger());
    found->tops.test_alone = gpu_block_choose(&room->block, test_alone, gpu_larger());
    found->count = count;
}

/* Counts of a digit to the place of each bucket's first item.  Whether the items differ in it. */
static GPU_DEVICE bool place_buckets(sort_room *room, uint32_t *counts, int64_t count)
{
    int mine = threadIdx.x % BUCKETS;
    uint64_t total, size = threadIdx.x < BUCKETS ? counts[mine] : 0;
    int64_t largest = gpu_block_choose(&room->block, (int64_t)size, gpu_larger());
    uint64_t first = gpu_block_sum_before(&room->block, size, &total);
    if (threadIdx.x < BUCKETS)
        counts[mine] = (uint32_t)first;
    gpu_sync_block();
    return largest < count;
}

/* The lanes of a warp that are there and have this lane's digit. */
static GPU_DEVICE unsigned same_digit(bool there, unsigned digit)
{
    unsigned same = gpu_ballot(GPU_FULL_WARP, there);
    for (int bit = 0; bit < DIGIT_BITS; bit++) {
        unsigned ones = gpu_ballot(GPU_FULL_WARP, (digit >> bit & 1) != 0);
        same &= digit >> bit & 1 ? ones : ~ones;
    }
    return same;
}

/* One pass of a radix sort that keeps the order of equals: in turns of a block's threads, where an
 * item goes behind those of its bucket in earlier turns, warps and lanes. */
static GPU_DEVICE void sort_digit(sort_room *room, int digit, int64_t count, const uint64_t *keys,
                                  const int32_t *ids, uint64_t *to_keys, int32_t *to_ids)
{
    uint32_t *places = room->counts[digit], *turn = room->turn[gpu_warp()];
    for (int64_t start = 0; start < count; start += SORT_THREADS) {
        int64_t i = start + threadIdx.x;
        bool there = i < count;
        uint64_t key = there ? keys[i] : 0;
        unsigned bucket = (unsigned)(key >> digit * DIGIT_BITS) % BUCKETS;
        unsigned same = same_digit(there, bucket), before = same & ((1u << gpu_lane()) - 1);
        for (int b = gpu_lane(); b < BUCKETS; b += GPU_WARP)
            turn[b] = 0;
        gpu_sync_warp(GPU_FULL_WARP);
        if (there && before == 0)
            turn[bucket] = (uint32_t)gpu_popcount(same);
        gpu_sync_block();
        if (threadIdx.x < BUCKETS) {
            uint32_t place = places[threadIdx.x];
            for (int w = 0; w < SORT_WARPS; w++) {
                uint32_t size = room->turn[w][threadIdx.x];
                room->turn[w][threadIdx.x] = place;
                place += size;
            }
            places[threadIdx.x] = place;
        }
        gpu_sync_block();
        if (there) {
            uint32_t to = turn[bucket] + (uint32_t)gpu_popcount(before);
            to_keys[to] = key;
            to_ids[to] = ids[i];
        }
        gpu_sync_warp(GPU_FULL_WARP);
    }
    gpu_sync_block();
}

/* Places behind the last token are -inf in both rows. */
static GPU_DEVICE void lay_out_sorted(const float *ref, const float *test, int64_t count,
                                      const int32_t *ids, float *to_ref, float *to_test)
{
    int64_t groups = (count + QLLM_LANES - 1) / QLLM_LANES;
    for (int64_t to = threadIdx.x; to < groups * QLLM_LANES; to += SORT_THREADS) {
        int64_t from = to % QLLM_LANES * groups + to / QLLM_LANES;
        bool there = from < count;
        to_ref[to] = there ? ref[ids[from]] : -INFINITY;
        to_test[to] = there ? test[ids[from]] : -INFINITY;
    }
}

static GPU_DEVICE void write_found(const pair_args *a, const float *ref, const float *test,
                                   int64_t row, pair_row *found)
{
    qllm_pair_tops *tops = &found->tops;
    int64_t target = a->targets[row];
    found->ref_bad_logit = found->ref_bad < 0 ? 0 : ref[found->ref_bad];
    found->test_bad_logit = found->test_bad < 0 ? 0 : test[found->test_bad];
    tops->target = target;
    tops->target_ref = target < 0 ? 0 : (double)ref[target] - tops->ref_max;
    tops->target_test = target < 0 ? 0 : (double)test[target] - tops->test_max;
    tops->test_pick = found->count > 0 ? ref[tops->test_argmax] : 0;
    a->found[row] = *found;
}

/* A block for each pair of rows. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(SORT_THREADS, 2) sort_pairs(pair_args a)
{
    GPU_SHARED(sort_room, room);
    int64_t row = blockIdx.x;
    const float *ref = a.ref + row * a.vocab, *test = a.test + row * a.vocab;
    pair_row found = {};
    qllm_pair_tops *tops = &found.tops;
    find_top(&room->block, ref, a.vocab, &tops->ref_max, &tops->ref_argmax, &found.ref_bad);
    find_top(&room->block, test, a.vocab, &tops->test_max, &tops->test_argmax, &found.test_bad);
    bool good = found.ref_bad < 0 && found.test_bad < 0 && tops->ref_max > -INFINITY &&
                tops->test_max > -INFINITY;
    int from = 0;
    if (good)
        write_items(room, ref, test, a.vocab, a.keys[0] + row * a.vocab, a.ids[0] + row * a.vocab,
                    &found);
    gpu_sync_block();
    for (int digit = 0; good && digit < DIGITS; digit++) {
        if (!place_buckets(room, room->counts[digit], found.count))
            continue;
        sort_digit(room, digit, found.count, a.keys[from] + row * a.vocab,
                   a.ids[from] + row * a.vocab, a.keys[1 - from] + row * a.vocab,
                   a.ids[1 - from] + row * a.vocab);
        from = 1 - from;
    }
    lay_out_sorted(ref, test, found.count, a.ids[from] + row * a.vocab, a.sorted_ref + row * a.room,
                   a.sorted_test + row * a.room);
    if (threadIdx.x == 0)
        write_found(&a, ref, test, row, &found);
}

/* ------------------------------------------------------------------------------------ the sums */

/* The share of the weight that the lanes before this one hold, of the 16 of its half warp. */
static GPU_DEVICE double share_above(double sum, double total)
{
    int lane = gpu_lane() % QLLM_LANES, first = gpu_lane() - lane;
    double before = 0;
    for (int j = 0; j < QLLM_LANES - 1; j++) {
        double other = gpu_shfl(GPU_FULL_WARP, sum, first + j);
        before += j < lane ? other : 0;
    }
    return before * (1 / total);
}

/* Half a warp for each pair of rows at each temperature. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(SUM_THREADS, 4) sum_pairs(sum_args a)
{
    GPU_SHARED(exp2_powers, powers);
    if (threadIdx.x < 16)
        powers->bits[threadIdx.x] = a.powers.bits[threadIdx.x];
    gpu_sync_block();
    int64_t job = (int64_t)blockIdx.x * SUM_HALVES + threadIdx.x / QLLM_LANES;
    bool there = job < a.rows * a.n_temperatures;
    int64_t row = there ? job / a.n_temperatures : 0;
    double factor = there ? a.factors[job % a.n_temperatures] : 0;
    const pair_row *found = a.found + row;
    const float *ref = a.sorted_ref + row * a.room, *test = a.sorted_test + row * a.room;
    int64_t end = factor > 0 ? (found->count + QLLM_LANES - 1) / QLLM_LANES * QLLM_LANES : 0;
    qllm_pair pair = {};
    pair.ref_max = found->tops.ref_max;
    pair.test_max = found->tops.test_max;
    double p = 0, q = 0;
    for (int64_t i = threadIdx.x % QLLM_LANES; i < end; i += QLLM_LANES) {
        p += qllm_weight_by(powers->bits, ref[i], pair.ref_max, factor);
        q += qllm_weight_by(powers->bits, test[i], pair.test_max, factor);
    }
    qllm_pair_totals totals = {};
    totals.p = gpu_half_warp_sum(p);
    totals.q = gpu_half_warp_sum(q);
    pair.p_scale = 1 / totals.p;
    pair.q_scale = 1 / totals.q;
    qllm_pair_lane lane = {};
    lane.p_above = share_above(p, totals.p);
    lane.q_above = share_above(q, totals.q);
    for (int64_t i = threadIdx.x % QLLM_LANES; i < end; i += QLLM_LANES)
        qllm_pair_add(&pair, ref[i], test[i],
                      qllm_weight_by(powers->bits, ref[i], pair.ref_max, factor),
                      qllm_weight_by(powers->bits, test[i], pair.test_max, factor), &lane);
    totals.kl = gpu_half_warp_sum(lane.kl);
    totals.kl_reverse = gpu_half_warp_sum(lane.kl_reverse);
    totals.mean_a = gpu_half_warp_sum(lane.mean_a);
    totals.mean_b = gpu_half_warp_sum(lane.mean_b);
    totals.tv = gpu_half_warp_sum(lane.tv);
    totals.disagreement = gpu_half_warp_sum(lane.disagreement);
    if (there && threadIdx.x % QLLM_LANES == 0)
        a.totals[job] = totals;
}

/* --------------------------------------------------------------------------------- on the host */

/* A call, and where the parts of a stretch of rows lie.  What the host writes is first, then what
 * it reads, of which it has copies. */
struct stats_call {
    int64_t vocab, n_temperatures, room;
    int64_t stretch;                /* rows at once, at most */
    int64_t targets, found, totals; /* offsets; the factors are first */
    int64_t ref, test, keys[2], ids[2], sorted_ref, sorted_test, bytes;
    const double *temperatures;
};

static int64_t take(int64_t *bytes, int64_t count, size_t size)
{
    int64_t at = *bytes;
    *bytes = (at + count * (int64_t)size + 255) / 256 * 256;
    return at;
}

/* Offsets for so many rows. */
static void lay_out(stats_call *c, int64_t rows)
{
    int64_t bytes = 0, tokens = rows * c->vocab, places = rows * c->room;
    c->stretch = rows;
    take(&bytes, c->n_temperatures, sizeof(double));
    c->targets = take(&bytes, rows, sizeof(int64_t));
    c->found = take(&bytes, rows, sizeof(pair_row));
    c->totals = take(&bytes, rows * c->n_temperatures, sizeof(qllm_pair_totals));
    c->ref = take(&bytes, tokens, sizeof(float));
    c->test = take(&bytes, tokens, sizeof(float));
    for (int i = 0; i < 2; i++) {
        c->keys[i] = take(&bytes, tokens, sizeof(uint64_t));
        c->ids[i] = take(&bytes, tokens, sizeof(int32_t));
    }
    c->sorted_ref = take(&bytes, places, sizeof(float));
    c->sorted_test = take(&bytes, places, sizeof(float));
    c->bytes = bytes;
}

/* As many rows at once as fit into the bytes; at least one. */
static stats_call plan(int64_t rows, int64_t vocab, const double *temperatures,
                       int64_t n_temperatures, int64_t most_bytes)
{
    stats_call c = {};
    c.vocab = vocab;
    c.n_temperatures = n_temperatures;
    c.temperatures = temperatures;
    c.room = (vocab + QLLM_LANES - 1) / QLLM_LANES * QLLM_LANES;
    lay_out(&c, 1);
    int64_t fit = most_bytes / c.bytes;
    lay_out(&c, fit < 1 ? 1 : fit < rows ? fit : rows);
    return c;
}

static qllm_gpu_error launch(const stats_call *c, uint8_t *memory, int64_t rows, gpu_stream stream)
{
    pair_args pairs = {};
    sum_args sums = {};
    pairs.ref = (const float *)(const void *)(memory + c->ref);
    pairs.test = (const float *)(const void *)(memory + c->test);
    pairs.rows = sums.rows = rows;
    pairs.vocab = c->vocab;
    pairs.room = sums.room = c->room;
    pairs.targets = (const int64_t *)(const void *)(memory + c->targets);
    for (int i = 0; i < 2; i++) {
        pairs.keys[i] = (uint64_t *)(void *)(memory + c->keys[i]);
        pairs.ids[i] = (int32_t *)(void *)(memory + c->ids[i]);
    }
    sums.sorted_ref = pairs.sorted_ref = (float *)(void *)(memory + c->sorted_ref);
    sums.sorted_test = pairs.sorted_test = (float *)(void *)(memory + c->sorted_test);
    sums.found = pairs.found = (pair_row *)(void *)(memory + c->found);
    sums.n_temperatures = c->n_temperatures;
    sums.factors = (const double *)(const void *)memory;
    sums.totals = (qllm_pair_totals *)(void *)(memory + c->totals);
    memcpy(sums.powers.bits, qllm_exp2_table, sizeof sums.powers.bits);
    int64_t jobs = rows * c->n_temperatures;
    qllm_gpu_error code = GPU_LAUNCH(sort_pairs, (int)rows, SORT_THREADS, sizeof(sort_room), stream,
                                     pairs);
    if (code == 0)
        code = GPU_LAUNCH(sum_pairs, (int)((jobs + SUM_HALVES - 1) / SUM_HALVES), SUM_THREADS,
                          sizeof(exp2_powers), stream, sums);
    return code;
}

/* Uploads, computes, and reads back `rows` rows. */
static qllm_status compute(const stats_call *c, gpu_sampler *sampler, gpu_stream stream,
                           const float *ref, const float *test, int64_t rows,
                           const int64_t *targets, qllm_error *error)
{
    uint8_t *memory = (uint8_t *)sampler->memory, *host = (uint8_t *)sampler->host;
    double *factors = (double *)(void *)host;
    int64_t *wanted = (int64_t *)(void *)(host + c->targets);
    for (int64_t t = 0; t < c->n_temperatures; t++)
        factors[t] = c->temperatures[t] > 0
            ? qllm_weight_factor(qllm_inverse_temperature(c->temperatures[t])) : 0;
    for (int64_t i = 0; i < rows; i++) /* those outside the vocabulary are refused afterwards */
        wanted[i] = targets != NULL && targets[i] >= 0 && targets[i] < c->vocab ? targets[i] : -1;
    int64_t bytes = rows * c->vocab * (int64_t)sizeof(float);
    qllm_gpu_error code = gpu_copy_in(memory, host, c->found, stream);
    if (code == 0)
        code = gpu_copy_in(memory + c->ref, ref, bytes, stream);
    if (code == 0)
        code = gpu_copy_in(memory + c->test, test, bytes, stream);
    if (code == 0)
        code = launch(c, memory, rows, stream);
    if (code == 0)
        code = gpu_copy_out(host + c->found, memory + c->found, c->ref - c->found, stream);
    if (code == 0)
        code = gpu_stream_wait(stream);
    return gpu_check(code, "logit_stats", error);
}

/* The errors of one row of logits, as the host finds them. */
static qllm_status check_row(const pair_row *found, int64_t vocab, qllm_error *error)
{
    if (found->ref_bad >= 0)
        return qllm_refuse_logit("ref", found->ref_bad_logit, found->ref_bad, vocab, error);
    if (found->tops.ref_max == -INFINITY)
        return qllm_refuse_no_logit("ref", vocab, error);
    if (found->test_bad >= 0)
        return qllm_refuse_logit("test", found->test_bad_logit, found->test_bad, vocab, error);
    if (found->tops.test_max == -INFINITY)
        return qllm_refuse_no_logit("test", vocab, error);
    return QLLM_OK;
}

/* Finishes row `row` of the call, which is row `i` of its stretch. */
static void finish_row(const stats_call *c, const uint8_t *host, int64_t i, int64_t row,
                       const qllm_logit_stats *out, uint8_t *same_top)
{
    const pair_row *found = (const pair_row *)(const void *)(host + c->found) + i;
    const qllm_pair_totals *totals = (const qllm_pair_totals *)(const void *)(host + c->totals);
    int64_t start = row * c->n_temperatures;
    const qllm_logit_stats at = {out->kl + start, out->kl_reverse + start, out->tv + start,
                                 out->disagreement + start, out->entropy_ref + start,
                                 out->entropy_test + start, out->max_ref + start,
                                 out->delta_p + start, out->cross + start,
                                 out->log_z_ref + start};
    same_top[row] = found->tops.ref_argmax == found->tops.test_argmax;
    for (int64_t t = 0; t < c->n_temperatures; t++)
        qllm_logit_stats_finish(&found->tops, totals + i * c->n_temperatures + t,
                                c->temperatures[t], &at, t);
}

qllm_status gpu_sampler_stats(gpu_sampler *sampler, gpu_stream stream, const float *ref,
                              const float *test, int64_t rows, int64_t vocab,
                              const double *temperatures, int64_t n_temperatures,
                              const int64_t *targets, const qllm_logit_stats *out,
                              uint8_t *same_top, int64_t *failed, qllm_error *error)
{
    *failed = -1;
    qllm_status status = qllm_logit_stats_check(vocab, temperatures, n_temperatures, -1, error);
    if (status != QLLM_OK || rows == 0) {
        *failed = status == QLLM_OK ? -1 : 0;
        return status;
    }
    stats_call c = plan(rows, vocab, temperatures, n_temperatures,
                        gpu_sampler_most(sampler));
    status = gpu_sampler_reserve(sampler, c.bytes, c.ref, error);
    for (int64_t done = 0; status == QLLM_OK && done < rows; done += c.stretch) {
        int64_t n = rows - done < c.stretch ? rows - done : c.stretch;
        status = compute(&c, sampler, stream, ref + done * vocab, test + done * vocab, n,
                         targets == NULL ? NULL : targets + done, error);
        const uint8_t *host = (const uint8_t *)sampler->host;
        for (int64_t i = 0; status == QLLM_OK && i < n; i++) {
            if (targets != NULL)
                status = qllm_logit_stats_check(vocab, temperatures, n_temperatures,
                                                targets[done + i], error);
            if (status == QLLM_OK)
                status = check_row((const pair_row *)(const void *)(host + c.found) + i, vocab,
                                   error);
            if (status == QLLM_OK)
                finish_row(&c, host, i, done + i, out, same_top);
            else
                *failed = done + i;
        }
    }
    return status;
}

qllm_status gpu_logit_stats(qllm_decoder *decoder, const float *ref, const float *test,
                            int64_t rows, const double *temperatures, int64_t n_temperatures,
                            const int64_t *targets, const qllm_logit_stats *out,
                            uint8_t *same_top, qllm_error *error)
{
    int64_t failed = -1;
    qllm_status status = gpu_sampler_stats(&decoder->sampler, decoder->stream, ref, test, rows,
                                           decoder->config.vocab, temperatures, n_temperatures,
                                           targets, out, same_top, &failed, error);
    return failed < 0 || status == QLLM_OK ? status : gpu_sampler_refuse(failed, status, error);
}
