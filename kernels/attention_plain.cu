/* Attention without tensor cores, for heads that these cannot take: attention.h has the sums. */
#include "attention_strip.h"

namespace {

enum { PLAIN_THREADS = 128 };

typedef struct plain_memory {
    float e[PLAIN_THREADS];
    float largest[PLAIN_THREADS / GPU_WARP];
} plain_memory;

/* The score of position j for a query, or -infinity. */
GPU_DEVICE inline float plain_score(const gpu_attention &a, const float *q, const uint16_t *keys,
                                    attention_span seen, int head, int j)
{
    float score = 0.0f;
    if (j < seen.begin || j >= seen.end)
        return gpu_float_from_bits(0xff800000u);
    for (int d = 0; d < a.head_dim; d++)
        score = gpu_fma(q[d] * a.scale,
                        gpu_bf16_to_float(keys[j % GPU_PAGE * (int64_t)a.head_dim + d]), score);
    return a.bias == NULL ? score : score + a.bias[head * a.bias_stride + j];
}

/* Keys of the page that holds position j of a row, for a key-value head; values lie behind them. */
GPU_DEVICE inline const uint16_t *plain_keys(const gpu_attention &a, int row, int kv_head, int j)
{
    int32_t page = a.page_index[(int64_t)row * a.max_pages + j / GPU_PAGE];
    return (const uint16_t *)a.page_base[page] + a.page_offset +
           (int64_t)kv_head * 2 * GPU_PAGE * a.head_dim;
}

/* Scores of PLAIN_THREADS positions from `first` on to e_j in shared memory; their sum. */
GPU_DEVICE inline attention_sum plain_softmax(const gpu_attention &a, const float *q, int row,
                                              int head, attention_span seen, int first,
                                              plain_memory *s)
{
    int j = first + (int)threadIdx.x, there = j < seen.end ? j : first;
    const uint16_t *keys = plain_keys(a, row, head / (a.heads / a.kv_heads), there);
    float score = plain_score(a, q, keys, seen, head, j);
    attention_sum sum = {score, 0.0f};
    for (int m = 1; m < GPU_WARP; m *= 2)
        sum.m = fmaxf(sum.m, gpu_shfl_xor(GPU_FULL_WARP, sum.m, m));
    gpu_sync_block();
    if (threadIdx.x % GPU_WARP == 0)
        s->largest[threadIdx.x / GPU_WARP] = sum.m;
    gpu_sync_block();
    for (int i = 0; i < PLAIN_THREADS / GPU_WARP; i++)
        sum.m = fmaxf(sum.m, s->largest[i]);
    const float none = gpu_float_from_bits(0xff800000u);
    s->e[threadIdx.x] = score == none ? 0.0f : qllm_expf(score - (sum.m == none ? 0.0f : sum.m));
    gpu_sync_block();
    for (int i = 0; i < PLAIN_THREADS; i++)
        sum.l += s->e[i];
    return sum;
}

/* A block for each row and query head; the output gathers the sums. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(PLAIN_THREADS, 1) attend_plain(const gpu_attention a)
{
    GPU_SHARED(plain_memory, s);
    gpu_let_next_start();
    gpu_wait_for_previous();
    int row = blockIdx.x / a.heads, head = blockIdx.x % a.heads, group = a.heads / a.kv_heads;
    attention_query at = {0, row, head};
    attention_span seen = attention_span_of(a, row);
    attention_sum sum = {0.0f, 0.0f};
    float *out = attention_out(a, at);
    const float *q = a.q + row * a.q_stride + head / group * a.q_group +
                     (int64_t)(head % group) * a.head_dim;
    for (int first = seen.begin / PLAIN_THREADS * PLAIN_THREADS; first < seen.end;
         first += PLAIN_THREADS) {
        attention_factors f =
            attention_merge(&sum, plain_softmax(a, q, row, head, seen, first, s));
        int begin = first < seen.begin ? seen.begin : first;
        int end = first + PLAIN_THREADS < seen.end ? first + PLAIN_THREADS : seen.end;
        for (int d = threadIdx.x; d < a.head_dim; d += PLAIN_THREADS) {
            float o = 0.0f;
            for (int j = begin; j < end; j++) {
                const uint16_t *values = plain_keys(a, row, head / group, j) +
                                         (int64_t)(GPU_PAGE + j % GPU_PAGE) * a.head_dim;
                o = gpu_fma(s->e[j - first], gpu_bf16_to_float(values[d]), o);
            }
            o = attention_apply(f, f.keep == 0.0f ? 0.0f : out[d], o);
            out[d] = end == seen.end ? o / sum.l : o;
        }
    }
}

} // namespace

qllm_gpu_error attention_launch_plain(const gpu_attention *a, gpu_stream stream)
{
    return GPU_LAUNCH_DEPENDENT(attend_plain, a->rows * a->heads, PLAIN_THREADS,
                                sizeof(plain_memory), stream, *a);
}
