/* The sums of attention.h inside a strip, by one warp for up to 16 queries at once, and how parts of
 * a sum are merged.
 *
 * Queries are the rows of the A operand, and keys then values the columns of B, both straight from
 * their pages: lane 4 g + t reads 8 of the 32 elements 32 c .. of key g, which are the B operands of
 * two products once the elements are renumbered for queries alike; and 8 of the 64 elements 64 b ..
 * of the values of four positions, which the byte permutation pairs up. */
#ifndef QLLM_KERNELS_ATTENTION_STRIP_H
#define QLLM_KERNELS_ATTENTION_STRIP_H

#include "attention.h"

extern "C" {
#include "core/elementary.h"
}

enum { ATTENTION_QUERIES = 16 };

/* Positions [begin, end) that a row sees; none: begin = end = 0. */
typedef struct attention_span {
    int begin, end;
} attention_span;

GPU_DEVICE inline attention_span attention_span_of(const gpu_attention &a, int row)
{
    attention_span s = {0, 0};
    if (row >= a.rows || a.page_index[(int64_t)row * a.max_pages] < 0)
        return s;
    s.end = a.positions[row] + 1;
    s.begin = a.window > 0 && s.end > a.window ? s.end - a.window : 0;
    return s;
}

/* Up to 16 queries that go together: the query heads of one key-value head, for consecutive rows,
 * numbered row by row; of those the ones from `first` on.  group: query heads of a key-value head. */
typedef struct attention_tile {
    int row, rows, kv_head, first, queries;
    gpu_divisor group;
} attention_tile;

typedef struct attention_query {
    int place, row, head; /* place: row - tile.row */
} attention_query;

GPU_DEVICE inline attention_query attention_query_of(const attention_tile &tile, int query)
{
    int index = tile.first + query;
    int place = gpu_quotient(index, tile.group);
    attention_query q = {place, tile.row + place,
                         (tile.kv_head - place) * tile.group.by + index};
    return q;
}

GPU_DEVICE inline float *attention_out(const gpu_attention &a, const attention_query &q)
{
    return a.out + q.row * a.out_stride + (int64_t)q.head * a.head_dim;
}

/* What is left of a pair of floats beyond their bf16 values. */
GPU_DEVICE inline uint32_t attention_rest(float low, float high, uint32_t pair)
{
    return gpu_pack_bf16(low - gpu_float_from_bits(pair << 16),
                         high - gpu_float_from_bits(pair & 0xffff0000u));
}

GPU_DEVICE inline float4 attention_load_query(const gpu_attention &a, const attention_tile &tile,
                                              int query, int d)
{
    float4 none = {0.0f, 0.0f, 0.0f, 0.0f};
    if (query >= tile.queries || d >= a.head_dim)
        return none;
    attention_query at = attention_query_of(tile, query);
    const float *q = a.q + at.row * a.q_stride + tile.kv_head * a.q_group +
                     (int64_t)(at.head - tile.kv_head * tile.group.by) * a.head_dim + d;
    float4 v = *(const float4 *)(const void *)q;
    v.x *= a.scale, v.y *= a.scale, v.z *= a.scale, v.w *= a.scale;
    return v;
}

/* The A operands of a tile: for each 16 elements their leading and their trailing bf16 values, 32
 * lanes each.  By `threads` threads. */
template <int HD>
GPU_DEVICE inline void attention_fill_queries(const gpu_attention &a, const attention_tile &tile,
                                              uint4 *queries, int thread, int threads)
{
    for (int i = thread; i < HD / 16 * GPU_WARP; i += threads) {
        int lane = i % GPU_WARP, step = i / GPU_WARP;
        int d = step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
        float4 g = attention_load_query(a, tile, lane / 4, d);
        float4 h = attention_load_query(a, tile, lane / 4 + 8, d);
        uint4 lead = {gpu_pack_bf16(g.x, g.y), gpu_pack_bf16(h.x, h.y), gpu_pack_bf16(g.z, g.w),
                      gpu_pack_bf16(h.z, h.w)};
        uint4 rest = {attention_rest(g.x, g.y, lead.x), attention_rest(h.x, h.y, lead.y),
                      attention_rest(g.z, g.w, lead.z), attention_rest(h.z, h.w, lead.w)};
        queries[step * 2 * GPU_WARP + lane] = lead;
        queries[(step * 2 + 1) * GPU_WARP + lane] = rest;
    }
}

/* ------------------------------------------------------------------------- merging of parts */

typedef struct attention_sum {
    float m, l; /* l = 0: of nothing */
} attention_sum;

typedef struct attention_factors {
    float keep, take; /* of what is there, of what is merged into it */
} attention_factors;

GPU_DEVICE inline attention_factors attention_merge(attention_sum *sum, attention_sum part)
{
    attention_factors f = {1.0f, 0.0f};
    if (part.l == 0.0f)
        return f;
    if (sum->l == 0.0f) {
        *sum = part;
        f.keep = 0.0f, f.take = 1.0f;
        return f;
    }
    float m = part.m > sum->m ? part.m : sum->m;
    f.keep = qllm_expf(sum->m - m);
    f.take = qllm_expf(part.m - m);
    sum->m = m;
    sum->l = gpu_fma(part.l, f.take, sum->l * f.keep);
    return f;
}

/* A factor of 0 leaves out its value, which may have no meaning. */
GPU_DEVICE inline float attention_apply(attention_factors f, float sum, float part)
{
    if (f.take == 0.0f)
        return sum;
    return f.keep == 0.0f ? part * f.take : gpu_fma(part, f.take, sum * f.keep);
}

/* ---------------------------------------------------------------------------------- a strip */

/* Elements of a head whose sums a warp holds at a time. */
GPU_BOTH inline constexpr int attention_width(int head_dim)
{
    return head_dim < 128 ? head_dim : 128;
}

/* Of queries g and g + 8 of lane 4 g + t, for the elements `first` + 0 .. WIDTH - 1 of a head:
 * o[8 b + i][2 h + e] is element 64 b + 16 t + 8 e + i of query g + 8 h. */
template <int WIDTH>
struct attention_part {
    attention_sum sum[2];
    int first;
    float o[WIDTH / 8][4];
};

/* Where a strip lies, and what the lane's two queries see of it. */
typedef struct attention_strip {
    const uint16_t *keys, *values; /* of its first position */
    int first, limit;              /* first position; positions that are stored and seen: 1 .. 32 */
    attention_span seen[2];
    const float *bias[2];          /* of position 0, or NULL */
} attention_strip;

GPU_DEVICE inline uint4 attention_load(const uint16_t *values, bool there)
{
    uint4 zero = {0, 0, 0, 0};
    return there ? *(const uint4 *)(const void *)values : zero;
}

template <int HD>
struct attention_loads {
    enum {
        CHUNKS = attention_width(HD) / 32,
        BLOCKS = attention_width(HD) / 64,
        EARLY = HD > 128 ? 0 : HD > 64 ? 1 : 2 /* halves of the values asked for before softmax */
    };
    uint4 key[CHUNKS][4];      /* 32 elements each; keys 8 j + g */
    uint4 value[2][BLOCKS][4]; /* 64 elements each; positions 16 k + 2 t + {0, 1, 8, 9} */
};

template <int HD>
GPU_DEVICE inline void attention_load_keys(int head_dim, const attention_strip &s, int chunk,
                                           attention_loads<HD> *loads)
{
    int lane = threadIdx.x % GPU_WARP, g = lane / 4, t = lane % 4;
GPU_UNROLL
    for (int c = 0; c < attention_loads<HD>::CHUNKS; c++)
GPU_UNROLL
        for (int j = 0; j < 4; j++) {
            int key = 8 * j + g, d = (chunk + c) * 32 + 8 * t;
            loads->key[c][j] = attention_load(s.keys + (int64_t)key * head_dim + d,
                                              key < s.limit && d < head_dim);
        }
}

template <int HD>
GPU_DEVICE inline void attention_load_values(int head_dim, const attention_strip &s, int k,
                                             int first, attention_loads<HD> *loads)
{
    int lane = threadIdx.x % GPU_WARP, g = lane / 4, t = lane % 4;
GPU_UNROLL
    for (int b = 0; b < attention_loads<HD>::BLOCKS; b++)
GPU_UNROLL
        for (int i = 0; i < 4; i++) {
            int position = 16 * k + 2 * t + i % 2 + i / 2 * 8, d = first + 64 * b + 8 * g;
            loads->value[k][b][i] = attention_load(s.values + (int64_t)position * head_dim + d,
                                                   position < s.limit && d < head_dim);
        }
}

/* score[j] += queries x keys 8 j .. 8 j + 7, over the chunks that are loaded. */
template <int HD>
GPU_DEVICE inline void attention_add_scores(int head_dim, const attention_strip &s, int chunk,
                                            const uint4 *queries, const attention_loads<HD> &loads,
                                            float (*score)[4])
{
    int lane = threadIdx.x % GPU_WARP;
GPU_UNROLL
    for (int c = 0; c < attention_loads<HD>::CHUNKS; c++)
        if ((chunk + c) * 32 < head_dim)
GPU_UNROLL
            for (int half = 0; half < 2; half++) {
                const uint4 *at = queries + ((chunk + c) * 2 + half) * 2 * GPU_WARP + lane;
                uint4 v = at[0], w = at[GPU_WARP];
                uint32_t lead[4] = {v.x, v.y, v.z, v.w}, rest[4] = {w.x, w.y, w.z, w.w};
GPU_UNROLL
                for (int j = 0; j < 4; j++)
                    if (8 * j < s.limit) {
                        const uint4 &key = loads.key[c][j];
                        uint32_t b[2] = {half == 0 ? key.x : key.z, half == 0 ? key.y : key.w};
                        gpu_mma_bf16(score[j], lead, b);
                        gpu_mma_bf16(score[j], rest, b);
                    }
            }
}

/* Scores become e_j; positions that a query does not see 0. */
GPU_DEVICE inline void attention_softmax(const attention_strip &s, float (*score)[4],
                                         attention_sum sum[2])
{
    const float none = gpu_float_from_bits(0xff800000u);
    int t = threadIdx.x % 4;
GPU_UNROLL
    for (int h = 0; h < 2; h++) {
        float m = none, l = 0.0f;
GPU_UNROLL
        for (int i = 0; i < 8; i++) {
            int j = s.first + i / 2 * 8 + 2 * t + i % 2;
            float *at = &score[i / 2][2 * h + i % 2];
            if (j < s.seen[h].begin || j >= s.seen[h].end)
                *at = none;
            else if (s.bias[h] != NULL)
                *at += gpu_load(s.bias[h] + j);
            m = fmaxf(m, *at);
        }
        m = fmaxf(m, gpu_shfl_xor(GPU_FULL_WARP, m, 1));
        m = fmaxf(m, gpu_shfl_xor(GPU_FULL_WARP, m, 2));
        float from = m == none ? 0.0f : m;
GPU_UNROLL
        for (int i = 0; i < 8; i++) {
            float *at = &score[i / 2][2 * h + i % 2];
            *at = *at == none ? 0.0f : qllm_expf(*at - from);
            l += *at;
        }
        l += gpu_shfl_xor(GPU_FULL_WARP, l, 1);
        l += gpu_shfl_xor(GPU_FULL_WARP, l, 2);
        sum[h].m = m, sum[h].l = l;
    }
}

/* The A operands of the weights of positions 16 k .. 16 k + 15. */
GPU_DEVICE inline void attention_weights(const float (*e)[4], uint32_t lead[4], uint32_t rest[4])
{
GPU_UNROLL
    for (int i = 0; i < 4; i++) {
        float low = e[i / 2][i % 2 * 2], high = e[i / 2][i % 2 * 2 + 1];
        lead[i] = gpu_pack_bf16(low, high);
        rest[i] = attention_rest(low, high, lead[i]);
    }
}

/* o += weights x values, for 64 elements. */
GPU_DEVICE inline void attention_add_values(const uint32_t lead[4], const uint32_t rest[4],
                                            const uint4 value[4], float (*o)[4])
{
    uint32_t words[4][4];
GPU_UNROLL
    for (int i = 0; i < 4; i++) {
        words[i][0] = value[i].x, words[i][1] = value[i].y;
        words[i][2] = value[i].z, words[i][3] = value[i].w;
    }
GPU_UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t half = i % 2 == 0 ? 0x5410u : 0x7632u;
        uint32_t pair[2] = {gpu_byte_perm(words[0][i / 2], words[1][i / 2], half),
                            gpu_byte_perm(words[2][i / 2], words[3][i / 2], half)};
        gpu_mma_bf16(o[i], lead, pair);
        gpu_mma_bf16(o[i], rest, pair);
    }
}

/* Scores and weights e of a strip; what `loads` asks for early is on its way afterwards. */
template <int HD>
GPU_DEVICE inline void attention_scores(int head_dim, const attention_strip &s,
                                        const uint4 *queries, attention_loads<HD> *loads,
                                        float (*e)[4], attention_sum sum[2])
{
    enum { CHUNKS = attention_loads<HD>::CHUNKS };
GPU_UNROLL
    for (int i = 0; i < 16; i++)
        e[i / 4][i % 4] = 0.0f;
GPU_NO_UNROLL
    for (int chunk = 0; chunk < HD / 32; chunk += CHUNKS) {
        attention_load_keys<HD>(head_dim, s, chunk, loads);
        attention_add_scores<HD>(head_dim, s, chunk, queries, *loads, e);
    }
GPU_UNROLL
    for (int k = 0; k < attention_loads<HD>::EARLY; k++)
        attention_load_values<HD>(head_dim, s, k, 0, loads);
    attention_softmax(s, e, sum);
}

/* o = e x values, for the elements from `first` on. */
template <int HD>
GPU_DEVICE inline void attention_outputs(int head_dim, const attention_strip &s,
                                         const float (*e)[4], attention_loads<HD> *loads, int first,
                                         float (*o)[4])
{
GPU_UNROLL
    for (int i = 0; i < attention_width(HD) / 2; i++)
        o[i / 4][i % 4] = 0.0f;
GPU_UNROLL
    for (int k = 0; k < 2; k++)
        if (16 * k < s.limit) {
            uint32_t lead[4], rest[4];
            if (k >= attention_loads<HD>::EARLY)
                attention_load_values<HD>(head_dim, s, k, first, loads);
            attention_weights(e + 2 * k, lead, rest);
GPU_UNROLL
            for (int b = 0; b < attention_loads<HD>::BLOCKS; b++)
                if (first + 64 * b < head_dim)
                    attention_add_values(lead, rest, loads->value[k][b], o + 8 * b);
        }
}

/* All lanes of a warp: use(part) for each width of elements, ascending. */
template <int HD, class Use>
GPU_DEVICE inline void attention_strip_sums(int head_dim, const attention_strip &s,
                                            const uint4 *queries, const Use &use)
{
    enum { WIDTH = attention_width(HD) };
    attention_part<WIDTH> part;
    attention_loads<HD> loads;
    float e[4][4];
    attention_scores<HD>(head_dim, s, queries, &loads, e, part.sum);
GPU_NO_UNROLL
    for (int first = 0; first < HD; first += WIDTH) {
        attention_outputs<HD>(head_dim, s, e, &loads, first, part.o);
        part.first = first;
        use(part);
    }
}

/* Form PLAIN (attention_plain.cu); launches. */
qllm_gpu_error attention_launch_plain(const gpu_attention *attention, gpu_stream stream);

#endif
