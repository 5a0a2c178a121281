#include "sampler.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "block_ops.h"
#include "decoder.h"

extern "C" {
#include "core/exp.h"
#include "core/rng.h"
}

enum {
    THREADS = 512,
    HALVES = THREADS / QLLM_LANES,  /* half warps, each with the lanes of one sum */
    CHUNK = 2 * THREADS,            /* values weighed between two barriers */
    RUN = 4,                        /* tokens of a noise block, and of a thread that picks */
    MAX_BLOCKS = 256                /* at once, each with memory for a row */
};

/* The powers of core/exp.h, which kernels copy to shared memory. */
struct exp2_table {
    uint64_t bits[16];
};

struct draw_room {
    exp2_table table;
    gpu_block_room block;
    double weights[2][CHUNK];
};

struct row_tools {
    draw_room *room;
};

#define SAMPLER_FUNCTION static GPU_DEVICE GPU_NO_INLINE
#include "core/sampler_body.h"

/* A draw as the device reads it. */
struct draw_job {
    qllm_sampling sampling;
    double inverse, factor; /* of the temperature */
    int64_t row;
    int64_t history, n_history; /* a stretch of the histories */
    uint32_t step;
    bool round_bf16, weigh_raw;
};

/* What it gives back. */
struct draw_result {
    int64_t token;
    int64_t bad;            /* the first token whose logit is NaN or +inf, or -1 */
    float bad_logit;
    float logit, raw_logit; /* of the token, penalized and as it was given */
    double max, total;      /* of the race: the largest logit, the sum of the weights */
    double raw_max, raw_total;
};

struct draw_args {
    const float *logits;
    int64_t vocab, n;
    const draw_job *jobs;
    const int32_t *histories;
    draw_result *results;
    uint8_t *rows;    /* memory of the blocks, row_bytes each */
    int64_t row_bytes;
    bool copies, lists; /* whether it has room for a changed row, and for kept tokens */
    double raw_factor;
    exp2_table table;
};

/* ------------------------------------------------------------- the functions of sampler_body.h */

static GPU_DEVICE double weigh(const row_tools *tools, const float *logits, int64_t n, double max,
                               double factor, double *weights)
{
    draw_room *room = tools->room;
    double sum = 0;
    float next[2];
    for (int j = 0; j < 2; j++)
        next[j] = threadIdx.x + j * THREADS < n ? logits[threadIdx.x + j * THREADS] : -INFINITY;
    for (int64_t start = 0, turn = 0; start < n; start += CHUNK, turn ^= 1) {
        double *chunk = room->weights[turn];
        for (int j = 0; j < 2; j++) {
            int64_t i = start + threadIdx.x + j * THREADS, then = i + CHUNK;
            double weight = i < n ? qllm_weight_by(room->table.bits, next[j], max, factor) : 0;
            chunk[threadIdx.x + j * THREADS] = weight;
            if (weights != NULL && i < n)
                weights[i] = weight;
            next[j] = then < n ? logits[then] : -INFINITY;
        }
        gpu_sync_block(); /* the other half of the room is free: its sums are in */
        if (threadIdx.x < QLLM_LANES)
            for (int k = threadIdx.x; k < CHUNK; k += QLLM_LANES)
                sum += chunk[k];
    }
    if (threadIdx.x < GPU_WARP)
        sum = gpu_half_warp_sum(sum);
    gpu_sync_block();
    if (threadIdx.x == 0)
        room->weights[0][0] = sum;
    gpu_sync_block();
    sum = room->weights[0][0];
    gpu_sync_block();
    return sum;
}

static GPU_DEVICE double weight_of(const row *r, float value)
{
    return qllm_weight_by(r->tools->room->table.bits, value, r->max, r->factor);
}

/* Each half warp looks at all values by itself, so that none waits for another. */
static GPU_DEVICE double reached(const goal *g, float bound)
{
    double sum = 0;
    for (int64_t i = threadIdx.x % QLLM_LANES; i < g->n; i += QLLM_LANES)
        if (g->values[i] >= bound)
            sum += g->weights == NULL ? 1 : g->weights[i];
    return gpu_half_warp_sum(sum);
}

static GPU_DEVICE double mass_of(const row *r, const kept *k)
{
    goal all = {r->tools, k->values, k->weights, k->count, 0};
    return reached(&all, -FLT_MAX);
}

/* As many bounds at once as there are half warps.  What is reached falls as the bound rises, so the
 * result is that of a bisection. */
static GPU_DEVICE float find_cut(const goal *g, float low, float high)
{
    uint64_t below = qllm_order_key(low), above = qllm_order_key(high);
    while (below < above) {
        uint64_t step = (above - below + HALVES - 1) / HALVES;
        int mine = (int)threadIdx.x / QLLM_LANES + 1, best;
        uint64_t key = below + mine * step;
        key = key < above ? key : above;
        bool enough = reached(g, qllm_key_value((uint32_t)key)) >= g->target;
        best = gpu_block_choose(&g->tools->room->block, enough ? mine : 0, gpu_larger());
        uint64_t first = below + best * step, end = first + step - 1;
        below = first < above ? first : above;
        above = best < HALVES && end < above ? end : above;
    }
    return qllm_key_value((uint32_t)below);
}

static GPU_DEVICE int64_t pick(const row *r, kept *k, float bound)
{
    int64_t count = 0;
    for (int64_t start = 0; start < r->vocab; start += THREADS * RUN) {
        int64_t first = start + threadIdx.x * RUN, end = first + RUN;
        uint64_t total, mine = 0;
        float values[RUN];
        end = end < r->vocab ? end : r->vocab;
        bool look = first < end && r->tops[first / QLLM_TILE] >= bound;
        for (int j = 0; j < RUN; j++) {
            values[j] = look && first + j < end ? r->logits[first + j] : -INFINITY;
            mine += values[j] >= bound;
        }
        int64_t to = count + (int64_t)gpu_block_sum_before(&r->tools->room->block, mine, &total);
        for (int j = 0; j < RUN; j++)
            if (values[j] >= bound) {
                k->ids[to] = (int32_t)(first + j);
                k->values[to++] = values[j];
            }
        count += (int64_t)total;
    }
    gpu_sync_block();
    return count;
}

static GPU_DEVICE void keep_from(const row *r, kept *k, float cut, int64_t ties)
{
    int64_t count = 0, seen = 0, last = -1; /* seen: ties so far */
    for (int64_t start = 0; start < k->count; start += THREADS) {
        int64_t i = start + threadIdx.x;
        bool there = i < k->count;
        float value = there ? k->values[i] : -INFINITY;
        int32_t id = there ? k->ids[i] : 0;
        double weight = there && k->weighed ? k->weights[i] : 0;
        uint64_t total, is_tie = value == cut, is_above = value > cut;
        uint64_t before = gpu_block_sum_before(&r->tools->room->block, is_tie << 32 | is_above,
                                               &total);
        int64_t tie = seen + (int64_t)(before >> 32), end = seen + (int64_t)(total >> 32);
        int64_t kept_before = (seen < ties ? seen : ties);
        if (is_above || (is_tie && tie < ties)) {
            int64_t to = count + (int64_t)(before & UINT32_MAX) + (tie < ties ? tie : ties) -
                         kept_before;
            last = is_tie ? id : last;
            k->ids[to] = id;
            k->values[to] = value;
            if (k->weighed)
                k->weights[to] = weight;
        }
        count += (int64_t)(total & UINT32_MAX) + (end < ties ? end : ties) - kept_before;
        seen = end;
    }
    last = gpu_block_choose(&r->tools->room->block, last, gpu_larger());
    k->last = last < 0 ? k->last : last;
    k->cut = cut;
    k->count = count;
}

static GPU_DEVICE float lowest(const row *r, const kept *k, double weight, float from)
{
    for (int64_t i = threadIdx.x; i < k->count; i += THREADS)
        if (k->weights[i] >= weight && k->values[i] < from)
            from = k->values[i];
    return gpu_block_choose(&r->tools->room->block, from, gpu_smaller());
}

/* ------------------------------------------------------------------------------------- a draw */

/* Finds the tops of the tiles, with 8 tokens a thread, and the largest of all; returns the first
 * token that is NaN or +inf, or -1. */
static GPU_DEVICE int64_t scan(row *r)
{
    enum { EACH = 8, SHARE = QLLM_TILE / EACH };
    float max = -INFINITY;
    int64_t bad = INT64_MAX, padded = qllm_tiles(r->vocab) * QLLM_TILE;
    for (int64_t start = 0; start < padded; start += THREADS * EACH) {
        int64_t first = start + threadIdx.x * EACH;
        float top = -INFINITY, values[EACH];
        for (int j = 0; j < EACH; j++)
            values[j] = first + j < r->vocab ? r->logits[first + j] : -INFINITY;
        for (int j = EACH - 1; j >= 0; j--) {
            top = values[j] > top ? values[j] : top;
            if (!(values[j] < INFINITY) && first + j < bad)
                bad = first + j;
        }
        for (int distance = SHARE / 2; distance > 0; distance /= 2) {
            float other = gpu_shfl_xor(GPU_FULL_WARP, top, distance);
            top = other > top ? other : top;
        }
        if (threadIdx.x % SHARE == 0 && first < padded)
            r->tops[first / QLLM_TILE] = top;
        max = top > max ? top : max;
    }
    r->max = gpu_block_choose(&r->tools->room->block, max, gpu_larger());
    bad = gpu_block_choose(&r->tools->room->block, bad, gpu_smaller());
    return bad == INT64_MAX ? -1 : bad;
}

/* The lowest id among the largest logits. */
static GPU_DEVICE int64_t argmax(const row *r)
{
    gpu_block_room *room = &r->tools->room->block;
    int64_t tile = INT64_MAX, tiles = qllm_tiles(r->vocab);
    for (int64_t t = threadIdx.x; t < tiles && tile == INT64_MAX; t += THREADS)
        if (r->tops[t] >= r->max)
            tile = t;
    tile = gpu_block_choose(room, tile, gpu_smaller());
    int64_t i = tile * QLLM_TILE + threadIdx.x;
    bool largest = threadIdx.x < QLLM_TILE && i < r->vocab && r->logits[i] >= r->max;
    return gpu_block_choose(room, largest ? i : INT64_MAX, gpu_smaller());
}

static GPU_DEVICE float raw_logit(const draw_args *a, const draw_job *job, int64_t id)
{
    float value = a->logits[job->row * a->vocab + id];
    return job->round_bf16 ? gpu_bf16_to_float(gpu_float_to_bf16(value)) : value;
}

/* Points the row at its logits: rounded and penalized in a copy where that is asked for. */
static GPU_DEVICE void take_logits(const draw_args *a, const draw_job *job, bool penalized, row *r)
{
    r->logits = a->logits + job->row * a->vocab;
    if (!job->round_bf16 && !penalized)
        return;
    for (int64_t i = threadIdx.x; i < a->vocab; i += THREADS)
        r->changed[i] = raw_logit(a, job, i);
    gpu_sync_block();
    for (int64_t h = threadIdx.x; penalized && h < job->n_history; h += THREADS) {
        int64_t id = a->histories[job->history + h];
        r->changed[id] = qllm_penalized(raw_logit(a, job, id), job->sampling.repetition_penalty);
    }
    gpu_sync_block();
    r->logits = r->changed;
}

/* The memory of a block. */
static GPU_DEVICE void carve(const draw_args *a, row *r, kept *k)
{
    uint8_t *memory = a->rows + blockIdx.x * a->row_bytes;
    k->weights = (double *)(void *)memory;
    k->values = (float *)(void *)(memory + (a->lists ? a->vocab * sizeof(double) : 0));
    k->ids = (int32_t *)(void *)(k->values + (a->lists ? a->vocab : 0));
    r->changed = (float *)(void *)(k->ids + (a->lists ? a->vocab : 0));
    r->tops = r->changed + (a->copies ? a->vocab : 0);
}

/* argmax of (logit - max) / temperature + gumbel over the kept tokens: each thread for its blocks
 * of noise, and those that cannot win are left out before any logarithm, as on the host. */
static GPU_DEVICE int64_t race(const row *r, const kept *k, const draw_job *job)
{
    const qllm_sampling *s = &job->sampling;
    int64_t winner = argmax(r);
    double best = qllm_gumbel(s->seed, s->prompt, job->step, (uint32_t)winner);
    for (int64_t block = threadIdx.x; block * RUN < r->vocab; block += THREADS) {
        uint32_t words[RUN];
        float tile_top = r->tops[block * RUN / QLLM_TILE];
        double top = ((double)tile_top - r->max) * r->inverse;
        if (tile_top < k->cut || top + QLLM_GUMBEL_MAX < best)
            continue;
        qllm_noise_block(s->seed, s->prompt, job->step, (uint32_t)block, words);
        for (int64_t j = 0, id = block * RUN; j < RUN && id < r->vocab; j++, id++) {
            float value = r->logits[id];
            double score = ((double)value - r->max) * r->inverse;
            if (value < k->cut || (value == k->cut && id > k->last) ||
                score + qllm_gumbel_bound(words[j]) < best)
                continue;
            score += qllm_gumbel_of(words[j]);
            if (score > best || (score == best && id < winner)) {
                best = score;
                winner = id;
            }
        }
    }
    double first = gpu_block_choose(&r->tools->room->block, best, gpu_larger());
    return gpu_block_choose(&r->tools->room->block, best == first ? winner : INT64_MAX,
                            gpu_smaller());
}

static GPU_DEVICE void draw_token(const draw_args *a, const draw_job *job, row *r, kept *k,
                                  draw_result *result)
{
    take_logits(a, job, job->n_history > 0 && job->sampling.repetition_penalty != 1, r);
    int64_t bad = scan(r), token = 0;
    gpu_sync_block();
    bool good = bad < 0 && r->max > -INFINITY;
    k->total = k->unfiltered = 0;
    if (good && job->sampling.temperature == 0)
        token = argmax(r);
    else if (good) {
        filter(r, &job->sampling, k);
        token = race(r, k, job);
    }
    if (threadIdx.x != 0)
        return;
    result->token = token;
    result->bad = bad;
    result->bad_logit = bad < 0 ? 0 : raw_logit(a, job, bad);
    result->logit = r->logits[token];
    result->raw_logit = raw_logit(a, job, token);
    result->max = r->max;
    result->total = k->total;
    if (!job->weigh_raw) {
        result->raw_max = r->max;
        result->raw_total = k->unfiltered;
    }
}

static GPU_DEVICE void weigh_raw(const draw_args *a, const draw_job *job, row *r,
                                 draw_result *result)
{
    take_logits(a, job, false, r);
    bool good = scan(r) < 0 && r->max > -INFINITY;
    double total = good ? weigh(r->tools, r->logits, a->vocab, r->max, a->raw_factor, NULL) : 0;
    if (threadIdx.x != 0)
        return;
    result->raw_max = r->max;
    result->raw_total = total;
}

/* Two parts of a draw go side by side: the token, and the sum over the logits as they were given
 * that its log-probability needs. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(THREADS, 1) draw_rows(draw_args a)
{
    GPU_SHARED(draw_room, room);
    if (threadIdx.x < 16)
        room->table.bits[threadIdx.x] = a.table.bits[threadIdx.x];
    gpu_sync_block();
    row_tools tools = {room};
    for (int64_t part = blockIdx.x; part < 2 * a.n; part += gridDim.x) {
        const draw_job *job = a.jobs + part / 2;
        row r = {};
        kept k = {};
        carve(&a, &r, &k);
        r.tools = &tools;
        r.vocab = a.vocab;
        r.inverse = job->inverse;
        r.factor = job->factor;
        if (part % 2 == 0)
            draw_token(&a, job, &r, &k, a.results + part / 2);
        else if (job->weigh_raw)
            weigh_raw(&a, job, &r, a.results + part / 2);
        gpu_sync_block();
    }
}

/* --------------------------------------------------------------------------------- on the host */

/* Where the parts of a call lie, on the device and in the host's copy of its beginning. */
struct layout {
    int64_t results, histories, rows; /* offsets; the jobs are first */
    int64_t bytes;
    int64_t row_bytes;
    int blocks;
    bool copies, lists;
};

static bool filters(const qllm_sampling *s)
{
    return s->temperature > 0 && (s->top_k > 0 || s->top_p < 1 || s->min_p > 0);
}

static bool penalizes(const qllm_draw *draw)
{
    return draw->n_history > 0 && draw->sampling.repetition_penalty != 1;
}

static int64_t aligned(int64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static layout lay_out(const qllm_draw *draws, int64_t n, int64_t vocab, int64_t most_bytes)
{
    layout at = {};
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; i++) {
        at.copies |= draws[i].round_bf16 || penalizes(&draws[i]);
        at.lists |= filters(&draws[i].sampling);
        tokens += penalizes(&draws[i]) ? draws[i].n_history : 0;
    }
    at.results = aligned(n * (int64_t)sizeof(draw_job));
    at.histories = aligned(at.results + n * (int64_t)sizeof(draw_result));
    at.rows = aligned(at.histories + tokens * (int64_t)sizeof(int32_t));
    int64_t each = (at.lists ? sizeof(double) + 2 * sizeof(float) : 0) +
                   (at.copies ? sizeof(float) : 0);
    at.row_bytes = aligned(each * vocab + qllm_tiles(vocab) * (int64_t)sizeof(float));
    int64_t fit = most_bytes / at.row_bytes, most = MAX_BLOCKS;
    most = fit < most ? fit : most;
    at.blocks = (int)(most < 1 ? 1 : most < 2 * n ? most : 2 * n);
    at.bytes = at.rows + at.blocks * at.row_bytes;
    return at;
}

/* Writes jobs and histories as the device reads them.  A history with a token outside the
 * vocabulary is left out: its draw is refused afterwards, unless its logits are. */
static void write_jobs(const qllm_draw *draws, int64_t n, int64_t first, int64_t vocab,
                       const layout *at, uint8_t *host)
{
    draw_job *jobs = (draw_job *)(void *)host;
    int32_t *histories = (int32_t *)(void *)(host + at->histories);
    int64_t used = 0;
    for (int64_t i = 0; i < n; i++) {
        const qllm_draw *d = &draws[i];
        draw_job *job = &jobs[i];
        memset(job, 0, sizeof *job);
        job->sampling = d->sampling;
        job->inverse = qllm_inverse_temperature(d->sampling.temperature);
        job->factor = qllm_weight_factor(job->inverse);
        job->row = d->row - first;
        job->step = d->step;
        job->round_bf16 = d->round_bf16;
        job->history = used;
        bool penalized = penalizes(d) &&
                         qllm_history_check(d->history, d->n_history, vocab, NULL) == QLLM_OK;
        job->n_history = penalized ? d->n_history : 0;
        for (int64_t h = 0; h < job->n_history; h++)
            histories[used++] = (int32_t)d->history[h];
        /* at temperature 1, unfiltered, the race has it already */
        bool top_k = d->sampling.top_k > 0 && d->sampling.top_k < vocab;
        bool weighed = d->sampling.temperature == 1 && !top_k && !penalized &&
                       (d->sampling.top_p < 1 || d->sampling.min_p <= 0);
        job->weigh_raw = !weighed;
    }
}

static qllm_status finish(const qllm_draw *draw, const draw_result *r, int64_t vocab,
                          qllm_sampled *out, qllm_error *error)
{
    if (r->bad >= 0)
        return qllm_refuse_logit("logits", r->bad_logit, r->bad, vocab, error);
    if (r->max == -INFINITY)
        return qllm_refuse_no_logit("logits", vocab, error);
    qllm_status status = qllm_history_check(draw->history, draw->n_history, vocab, error);
    if (status != QLLM_OK)
        return status;
    double inverse = qllm_inverse_temperature(draw->sampling.temperature), log_p = 0;
    if (draw->sampling.temperature > 0)
        log_p = qllm_log_share(r->logit, r->max, inverse, r->total);
    out->token = r->token;
    out->logprob = (float)qllm_log_share(r->raw_logit, r->raw_max, 1, r->raw_total);
    out->sampling_logprob = (float)log_p;
    return QLLM_OK;
}

/* What can be refused before anything runs. */
static qllm_status check_draws(const qllm_draw *draws, int64_t n, int64_t first, int64_t rows,
                               int64_t *failed, qllm_error *error)
{
    for (int64_t i = 0; i < n; i++) {
        const qllm_draw *d = &draws[i];
        *failed = i;
        qllm_status status = qllm_sampling_check(&d->sampling, error);
        if (status != QLLM_OK)
            return status;
        if (d->row < first || d->row >= first + rows)
            return qllm_fail(error, QLLM_VALUE, "row: expected %lld to %lld, found %lld",
                             (long long)first, (long long)(first + rows - 1), (long long)d->row);
    }
    *failed = -1;
    return QLLM_OK;
}

static draw_args arguments(const float *logits, int64_t vocab, int64_t n, const layout *at,
                           uint8_t *memory)
{
    draw_args a = {};
    a.logits = logits;
    a.vocab = vocab;
    a.n = n;
    a.jobs = (const draw_job *)(const void *)memory;
    a.histories = (const int32_t *)(const void *)(memory + at->histories);
    a.results = (draw_result *)(void *)(memory + at->results);
    a.rows = memory + at->rows;
    a.row_bytes = at->row_bytes;
    a.copies = at->copies;
    a.lists = at->lists;
    a.raw_factor = qllm_weight_factor(1);
    memcpy(a.table.bits, qllm_exp2_table, sizeof a.table.bits);
    return a;
}

qllm_status gpu_sampler_draw(gpu_sampler *sampler, gpu_stream stream, const float *logits,
                             int64_t first, int64_t rows, int64_t vocab, const qllm_draw *draws,
                             int64_t n, qllm_sampled *out, int64_t *failed, qllm_error *error)
{
    qllm_status status = check_draws(draws, n, first, rows, failed, error);
    if (status != QLLM_OK || n == 0)
        return status;
    layout at = lay_out(draws, n, vocab, gpu_sampler_most(sampler));
    status = gpu_sampler_reserve(sampler, at.bytes, at.rows, error);
    if (status != QLLM_OK)
        return status;
    uint8_t *memory = (uint8_t *)sampler->memory, *host = (uint8_t *)sampler->host;
    draw_result *results = (draw_result *)(void *)(host + at.results);
    write_jobs(draws, n, first, vocab, &at, host);
    qllm_gpu_error code = gpu_copy_in(memory, host, at.rows, stream);
    if (code == 0)
        code = GPU_LAUNCH(draw_rows, at.blocks, THREADS, sizeof(draw_room), stream,
                          arguments(logits, vocab, n, &at, memory));
    if (code == 0)
        code = gpu_copy_out(results, memory + at.results, n * (int64_t)sizeof *results, stream);
    if (code == 0)
        code = gpu_stream_wait(stream);
    status = gpu_check(code, "the sampler", error);
    for (int64_t i = 0; status == QLLM_OK && i < n; i++) {
        status = finish(&draws[i], &results[i], vocab, &out[i], error);
        *failed = status == QLLM_OK ? -1 : i;
    }
    return status;
}

qllm_status gpu_draw(qllm_decoder *decoder, const float *logits, int64_t first, int64_t rows,
                     const qllm_draw *draws, int64_t n_draws, int64_t number, qllm_sampled *out,
                     qllm_error *error)
{
    int64_t failed = -1;
    qllm_status status = gpu_sampler_draw(&decoder->sampler, decoder->stream, logits, first, rows,
                                          decoder->config.vocab, draws, n_draws, out, &failed,
                                          error);
    return failed < 0 || status == QLLM_OK ? status
                                           : gpu_sampler_refuse(number + failed, status, error);
}
