/* Norms, rotation, attention and elementwise work of compute="exact" (cpu/cpu_ops.h). */
#include "exact.h"

extern "C" {
#include "core/elementary.h"
}

namespace {

enum {
    LANES = 16,       /* of a lane sum */
    STAGED = 2048,    /* values of a lane sum in shared memory at a time; a multiple of LANES */
    MOST_THREADS = 256,
    IN_FLIGHT = 16    /* loads of a chain that are under way together */
};

/* Threads for n values. */
int threads_for(int64_t n)
{
    return n < MOST_THREADS ? static_cast<int>((n + GPU_WARP - 1) / GPU_WARP * GPU_WARP)
                            : static_cast<int>(MOST_THREADS);
}

/* ------------------------------------------------------------------------------------ sums */

struct lane_memory {
    float values[STAGED];
    float lanes[LANES];
};

/* The fold of cpu_ops.h: + 8, + 4, + 2, + 1. */
GPU_DEVICE inline float fold(const float *lanes)
{
    float sum[LANES];
    GPU_UNROLL
    for (int i = 0; i < LANES; i++)
        sum[i] = lanes[i];
    GPU_UNROLL
    for (int i = 0; i < 8; i++)
        sum[i] += sum[i + 8];
    GPU_UNROLL
    for (int i = 0; i < 4; i++)
        sum[i] += sum[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* The lane sum of value(0) .. value(n - 1), for every thread of the block, which all call. */
template <class Value>
GPU_DEVICE float lane_sum(lane_memory *memory, int64_t n, Value value)
{
    float partial = 0.0f;
    for (int64_t first = 0; first < n; first += STAGED) {
        int count = n - first < STAGED ? static_cast<int>(n - first) : static_cast<int>(STAGED);
        for (int i = static_cast<int>(threadIdx.x); i < count; i += blockDim.x)
            memory->values[i] = value(first + i);
        gpu_sync_block();
        if (threadIdx.x < LANES)
            for (int i = static_cast<int>(threadIdx.x); i < count; i += LANES)
                partial += memory->values[i];
        gpu_sync_block();
    }
    if (threadIdx.x < LANES)
        memory->lanes[threadIdx.x] = partial;
    gpu_sync_block();
    return fold(memory->lanes); /* next written behind other barriers */
}

/* 1 / sqrt(lane sum of (x - mean)^2 / n + eps) */
GPU_DEVICE inline float inverse_deviation(lane_memory *memory, const float *x, int64_t n,
                                          float mean, float eps)
{
    float squares = lane_sum(memory, n, [x, mean](int64_t i) {
        float d = x[i] - mean;
        return d * d;
    });
    return 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
}

/* sum + a[0] b[0] + a[1] b[stride] + ...: n steps of one fma chain. */
GPU_DEVICE inline float chain(const float *a, const float *b, int64_t stride, int n, float sum)
{
    int i = 0;
    for (; i + IN_FLIGHT <= n; i += IN_FLIGHT) {
        float loaded[IN_FLIGHT];
        GPU_UNROLL
        for (int j = 0; j < IN_FLIGHT; j++)
            loaded[j] = gpu_load(b + (i + j) * stride);
        GPU_UNROLL
        for (int j = 0; j < IN_FLIGHT; j++)
            sum = gpu_fma(a[i + j], loaded[j], sum);
    }
    GPU_NO_UNROLL
    for (; i < n; i++)
        sum = gpu_fma(a[i], gpu_load(b + i * stride), sum);
    return sum;
}

/* ------------------------------------------------------------------------------------ rows */

GPU_KERNEL void embed_row(gpu_weight weight, const int32_t *tokens, float *y)
{
    int64_t first = gpu_load(tokens + blockIdx.x) * weight.cols;
    const uint16_t *halves = reinterpret_cast<const uint16_t *>(weight.data) + first;
    const float *floats = reinterpret_cast<const float *>(weight.data) + first;
    for (int64_t i = threadIdx.x; i < weight.cols; i += blockDim.x)
        y[blockIdx.x * weight.cols + i] =
            weight.format == QLLM_FORMAT_F32   ? gpu_load(floats + i)
            : weight.format == QLLM_FORMAT_F16 ? qllm_f16_to_float(gpu_load(halves + i))
                                               : qllm_bf16_to_float(gpu_load(halves + i));
}

GPU_KERNEL void norm_row(gpu_exact_norm norm, const float *x, const int32_t *row_of, float *y)
{
    GPU_SHARED(lane_memory, memory);
    int64_t from = row_of != NULL ? gpu_load(row_of + blockIdx.x) : blockIdx.x, n = norm.n;
    float mean = 0.0f;
    x += from * n;
    y += blockIdx.x * n;
    if (norm.kind == QLLM_NORM_LAYER)
        mean = lane_sum(memory, n, [x](int64_t i) { return x[i]; }) / static_cast<float>(n);
    float scale = inverse_deviation(memory, x, n, mean, norm.eps);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        float w = gpu_load(norm.weight + i);
        if (norm.kind == QLLM_NORM_RMS)
            y[i] = w * (x[i] * scale);
        else {
            float value = (x[i] - mean) * scale;
            y[i] = norm.bias != NULL ? gpu_fma(value, w, gpu_load(norm.bias + i)) : value * w;
        }
    }
}

template <qllm_activation KIND>
GPU_KERNEL void activate(const float *gate, const float *up, int64_t n, float *y)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    float value = KIND == QLLM_ACT_SILU   ? qllm_siluf(gate[i])
                  : KIND == QLLM_ACT_GELU ? qllm_geluf(gate[i])
                                          : qllm_gelu_tanhf(gate[i]);
    y[i] = up != NULL ? value * up[i] : value;
}

GPU_KERNEL void add_values(const float *a, int64_t n, float *x)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n)
        x[i] += a[i];
}

int blocks_for(int64_t n)
{
    return static_cast<int>((n + MOST_THREADS - 1) / MOST_THREADS);
}

/* ----------------------------------------------------------------------------------- heads */

/* Keys of the page of `position` for a key-value head, or NULL where the row has no such page;
 * values stand GPU_PAGE * head_dim behind. */
GPU_DEVICE inline float *page_of(const gpu_exact_heads &heads, int64_t row, int64_t position,
                                 int kv_head)
{
    int32_t page = gpu_load(heads.page_index + row * heads.max_pages + position / GPU_PAGE);
    if (page < 0)
        return NULL;
    return static_cast<float *>(heads.page_base[page]) + heads.page_offset +
           static_cast<int64_t>(kv_head) * 2 * GPU_PAGE * heads.head_dim;
}

/* One head of a row: RMS norm with `weight` (NULL: none) and rotation, into put(i, value). */
template <class Put>
GPU_DEVICE inline void prepare_head(const gpu_exact_heads &heads, lane_memory *memory,
                                    const float *x, const float *weight, int64_t position, Put put)
{
    float scale = 1.0f;
    if (weight != NULL)
        scale = inverse_deviation(memory, x, heads.head_dim, 0.0f, heads.eps);
    auto normed = [&](int i) {
        return weight != NULL ? gpu_load(weight + i) * (x[i] * scale) : x[i];
    };
    for (int i = static_cast<int>(threadIdx.x); i < heads.half; i += blockDim.x) {
        float a = normed(i), b = normed(heads.half + i);
        float c = gpu_load(heads.cos + position * heads.half + i);
        float s = gpu_load(heads.sin + position * heads.half + i);
        put(i, gpu_fma(a, c, -(b * s)));
        put(heads.half + i, gpu_fma(b, c, a * s));
    }
    for (int i = 2 * heads.half + static_cast<int>(threadIdx.x); i < heads.head_dim;
         i += blockDim.x)
        put(i, normed(i));
}

/* Block x: query head x, or key-value head x - heads; block y: the row. */
GPU_KERNEL void place_head(gpu_exact_heads heads, float *qkv)
{
    GPU_SHARED(lane_memory, memory);
    int64_t row = blockIdx.y, position = gpu_load(heads.positions + row);
    int head = static_cast<int>(blockIdx.x), group = heads.heads / heads.kv_heads;
    qkv += row * heads.stride;
    if (head < heads.heads) {
        float *q = qkv + head / group * heads.q_group + head % group * heads.head_dim;
        prepare_head(heads, memory, q, heads.q_norm, position,
                     [q](int i, float value) { q[i] = value; });
        return;
    }
    head -= heads.heads;
    float *keys = page_of(heads, row, position, head);
    if (keys == NULL)
        return;
    const float *v = qkv + heads.v + head * heads.kv_group;
    float *values = keys + (GPU_PAGE + position % GPU_PAGE) * heads.head_dim;
    keys += position % GPU_PAGE;
    prepare_head(heads, memory, qkv + heads.k + head * heads.kv_group, heads.k_norm, position,
                 [keys](int i, float value) { keys[i * GPU_PAGE] = value; });
    for (int i = static_cast<int>(threadIdx.x); i < heads.head_dim; i += blockDim.x)
        values[i] = v[i];
}

/* ------------------------------------------------------------------------------- attention */

struct attention_memory {
    float weights[MOST_THREADS]; /* of a round of positions, one a thread */
    float lanes[LANES];
};

/* One query head and the positions that it sees. */
struct query {
    const float *q;
    const float *bias; /* by position, or NULL */
    int64_t row;
    int kv_head, begin, end;
};

GPU_DEVICE inline float score_of(const gpu_exact_heads &heads, const query &at, int position)
{
    const float *keys = page_of(heads, at.row, position, at.kv_head);
    float dot = chain(at.q, keys + position % GPU_PAGE, GPU_PAGE, heads.head_dim, 0.0f);
    return at.bias != NULL ? gpu_fma(dot, heads.scale, gpu_load(at.bias + position))
                           : dot * heads.scale;
}

/* The largest score, for every thread.  NaN is passed over. */
GPU_DEVICE inline float largest_score(const gpu_exact_heads &heads, const query &at,
                                      attention_memory *memory)
{
    float largest = -INFINITY;
    for (int j = at.begin + static_cast<int>(threadIdx.x); j < at.end; j += blockDim.x) {
        float score = score_of(heads, at, j);
        largest = score > largest ? score : largest;
    }
    memory->weights[threadIdx.x] = largest;
    gpu_sync_block();
    if (threadIdx.x < LANES) {
        for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(blockDim.x); i += LANES)
            largest = memory->weights[i] > largest ? memory->weights[i] : largest;
        memory->lanes[threadIdx.x] = largest;
    }
    gpu_sync_block();
    for (int i = 0; i < LANES; i++)
        largest = memory->lanes[i] > largest ? memory->lanes[i] : largest;
    return largest;
}

/* Continues the chain of element d of the output over positions [first, last), whose weights are
 * there from `first` on. */
GPU_DEVICE inline float sum_values(const gpu_exact_heads &heads, const query &at,
                                   const float *weights, int first, int last, int d, float sum)
{
    for (int j = first; j < last;) {
        int end = (j / GPU_PAGE + 1) * GPU_PAGE;
        end = end < last ? end : last;
        const float *values = page_of(heads, at.row, j, at.kv_head) +
                              (GPU_PAGE + j % GPU_PAGE) * heads.head_dim;
        sum = chain(weights + (j - first), values + d, heads.head_dim, end - j, sum);
        j = end;
    }
    return sum;
}

/* Block x: a query head; block y: a row.  Scores are formed twice, first for their maximum, so that
 * no memory depends on the number of positions. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(MOST_THREADS, 2)
attend(gpu_exact_heads heads, const float *qkv, float *out)
{
    GPU_SHARED(attention_memory, memory);
    int head = static_cast<int>(blockIdx.x), group = heads.heads / heads.kv_heads;
    int round = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    query at = {NULL, NULL, blockIdx.y, head / group, 0, 0};
    at.end = gpu_load(heads.positions + at.row) + 1;
    at.q = qkv + at.row * heads.stride + at.kv_head * heads.q_group +
           head % group * heads.head_dim;
    at.bias = heads.bias != NULL ? heads.bias + head * heads.bias_stride : NULL;
    at.begin = heads.window > 0 && at.end > heads.window
                   ? static_cast<int>(at.end - heads.window) : 0;
    out += (at.row * heads.heads + head) * heads.head_dim;
    float largest = largest_score(heads, at, memory), partial = 0.0f;
    for (int first = at.begin; first < at.end; first += round) {
        int last = first + round < at.end ? first + round : at.end, j = first + thread;
        if (j < last)
            memory->weights[thread] = qllm_expf(score_of(heads, at, j) - largest);
        gpu_sync_block();
        if (thread < LANES)
            for (int i = thread; i < last - first; i += LANES) /* round % LANES == 0 */
                partial += memory->weights[i];
        for (int d = thread; d < heads.head_dim; d += round)
            out[d] = sum_values(heads, at, memory->weights, first, last, d,
                                first == at.begin ? 0.0f : out[d]);
        gpu_sync_block();
    }
    if (thread < LANES)
        memory->lanes[thread] = partial;
    gpu_sync_block();
    float inverse = 1.0f / fold(memory->lanes);
    for (int d = thread; d < heads.head_dim; d += round)
        out[d] *= inverse;
}

} // namespace

qllm_gpu_error gpu_exact_rows_of(const gpu_weight *weight, const int32_t *tokens, int rows,
                                 float *y, gpu_stream stream)
{
    if (rows == 0)
        return 0;
    return GPU_LAUNCH(embed_row, rows, threads_for(weight->cols), 0, stream, *weight, tokens, y);
}

qllm_gpu_error gpu_exact_norm_rows(const gpu_exact_norm *norm, const float *x,
                                   const int32_t *row_of, int rows, float *y, gpu_stream stream)
{
    if (rows == 0)
        return 0;
    return GPU_LAUNCH(norm_row, rows, threads_for(norm->n), sizeof(lane_memory), stream, *norm, x,
                      row_of, y);
}

qllm_gpu_error gpu_exact_activate(qllm_activation kind, const float *gate, const float *up,
                                  int64_t n, float *y, gpu_stream stream)
{
    if (n == 0)
        return 0;
    switch (kind) {
    case QLLM_ACT_SILU:
        return GPU_LAUNCH(activate<QLLM_ACT_SILU>, blocks_for(n), MOST_THREADS, 0, stream, gate,
                          up, n, y);
    case QLLM_ACT_GELU:
        return GPU_LAUNCH(activate<QLLM_ACT_GELU>, blocks_for(n), MOST_THREADS, 0, stream, gate,
                          up, n, y);
    default:
        return GPU_LAUNCH(activate<QLLM_ACT_GELU_TANH>, blocks_for(n), MOST_THREADS, 0, stream,
                          gate, up, n, y);
    }
}

qllm_gpu_error gpu_exact_add(const float *a, int64_t n, float *x, gpu_stream stream)
{
    if (n == 0)
        return 0;
    return GPU_LAUNCH(add_values, blocks_for(n), MOST_THREADS, 0, stream, a, n, x);
}

qllm_gpu_error gpu_exact_place(const gpu_exact_heads *heads, float *qkv, int rows,
                               gpu_stream stream)
{
    if (rows == 0)
        return 0;
    dim3 grid(static_cast<unsigned>(heads->heads + heads->kv_heads), static_cast<unsigned>(rows));
    return GPU_LAUNCH(place_head, grid, threads_for(heads->head_dim), sizeof(lane_memory), stream,
                      *heads, qkv);
}

qllm_gpu_error gpu_exact_attend(const gpu_exact_heads *heads, const float *qkv, int rows,
                                int positions_end, float *out, gpu_stream stream)
{
    if (rows == 0)
        return 0;
    dim3 grid(static_cast<unsigned>(heads->heads), static_cast<unsigned>(rows));
    return GPU_LAUNCH(attend, grid, threads_for(positions_end), sizeof(attention_memory), stream,
                      *heads, qkv, out);
}
