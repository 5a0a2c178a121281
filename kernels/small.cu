/* Small kernels over rows: small.h. */
#include "small.h"

#include "layout.h"
#include "pages.h"

namespace {

enum { THREADS = 128, WARPS = THREADS / GPU_WARP };

/* A block for each row. */
GPU_KERNEL void embed_tiled(const uint8_t *data, int64_t cols, const int32_t *tokens, float *x)
{
    gpu_let_next_start();
    gpu_wait_for_previous();
    int64_t across = gpu_tiles_across(cols), token = tokens[blockIdx.x];
    for (int64_t c = threadIdx.x; c < cols; c += THREADS) {
        const uint8_t *at = data + gpu_tile_offset(GPU_TILE_BF16, across, token, c);
        x[blockIdx.x * cols + c] =
            gpu_bf16_to_float(gpu_load((const uint16_t *)(const void *)at));
    }
}

enum head_kind { QUERY, KEY, VALUE };

/* Head `index` of a row, in the order in which heads lie there. */
typedef struct head_place {
    head_kind kind;
    int kv_head; /* of a key or value */
} head_place;

GPU_DEVICE inline head_place place_of(const gpu_place &p, int index)
{
    const gpu_heads &h = p.heads;
    int group = h.heads / h.kv_heads;
    if (p.fused) {
        int i = index % (group + 2);
        head_place place = {i < group ? QUERY : i == group ? KEY : VALUE, index / (group + 2)};
        return place;
    }
    int i = index - h.heads;
    head_place place = {i < 0 ? QUERY : i < h.kv_heads ? KEY : VALUE, i % h.kv_heads};
    return place;
}

/* 1 / rms of a head, for all lanes of its warp: lane l adds the squares of elements l, l + 32, ...,
 * lanes are added in a butterfly. */
GPU_DEVICE inline float inverse_rms(const float *x, int n, float eps)
{
    float sum = 0.0f;
    for (int i = threadIdx.x % GPU_WARP; i < n; i += GPU_WARP)
        sum = gpu_fma(x[i], x[i], sum);
    for (int m = GPU_WARP / 2; m > 0; m /= 2)
        sum += gpu_shfl_xor(GPU_FULL_WARP, sum, m);
    return 1.0f / sqrtf(sum / (float)n + eps);
}

GPU_DEVICE inline float normed(const float *x, const float *weight, float inverse, int i)
{
    return weight == NULL ? x[i] : gpu_load(weight + i) * (x[i] * inverse);
}

/* Where the key or value of a row is to be stored, or NULL. */
GPU_DEVICE inline uint16_t *stored_at(const gpu_heads &h, int row, head_place place)
{
    int position = h.positions[row];
    int32_t page = h.page_index[(int64_t)row * h.max_pages + position / GPU_PAGE];
    if (page < 0)
        return NULL;
    int64_t first = (int64_t)place.kv_head * 2 * GPU_PAGE +
                    (place.kind == VALUE ? GPU_PAGE : 0) + position % GPU_PAGE;
    return (uint16_t *)h.page_base[page] + h.page_offset + first * h.head_dim;
}

/* A warp for each head of each row; a lane reads what it writes, and no other does. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(THREADS, 1) place_heads(const gpu_place p, int rows)
{
    gpu_let_next_start();
    gpu_wait_for_previous();
    const gpu_heads &h = p.heads;
    int count = h.heads + 2 * h.kv_heads, lane = threadIdx.x % GPU_WARP;
    int64_t work = (int64_t)blockIdx.x * WARPS + threadIdx.x / GPU_WARP;
    int row = (int)(work / count), index = (int)(work % count);
    if (row >= rows)
        return;
    head_place place = place_of(p, index);
    float *x = p.qkv + row * p.stride + (int64_t)index * h.head_dim;
    const float *weight = place.kind == QUERY ? p.q_norm : place.kind == KEY ? p.k_norm : NULL;
    float inverse = weight == NULL ? 1.0f : inverse_rms(x, h.head_dim, p.eps);
    uint16_t *stored = place.kind == QUERY ? NULL : stored_at(h, row, place);
    if (place.kind != QUERY && stored == NULL)
        return;
    int half = place.kind == VALUE ? 0 : h.half;
    const float *cos = h.cos + (int64_t)h.positions[row] * half;
    const float *sin = h.sin + (int64_t)h.positions[row] * half;
    for (int i = lane; i < h.head_dim - half; i += GPU_WARP) {
        int at = i < half ? i : i + half; /* a pair, or an element behind the rotated ones */
        float first = normed(x, weight, inverse, at), second = 0.0f;
        if (i < half) {
            float old = first, other = normed(x, weight, inverse, i + half);
            float c = gpu_load(cos + i), s = gpu_load(sin + i);
            first = gpu_fma(old, c, -(other * s));
            second = gpu_fma(other, c, old * s);
        }
        if (stored != NULL)
            stored[at] = gpu_float_to_bf16(first);
        else
            x[at] = first;
        if (i < half && stored != NULL)
            stored[at + half] = gpu_float_to_bf16(second);
        else if (i < half)
            x[at + half] = second;
    }
}

} // namespace

qllm_status gpu_embed_tiled(const gpu_weight *embedding, const int32_t *tokens, int rows, float *x,
                            gpu_stream stream, qllm_error *error)
{
    return gpu_check(GPU_LAUNCH_DEPENDENT(embed_tiled, rows, THREADS, 0, stream, embedding->data,
                                          embedding->cols, tokens, x),
                     "the embedding of a step", error);
}

qllm_status gpu_place_heads(const gpu_place *place, int rows, gpu_stream stream,
                            qllm_error *error)
{
    int64_t work = (int64_t)rows * (place->heads.heads + 2 * place->heads.kv_heads);
    int blocks = (int)((work + WARPS - 1) / WARPS);
    return gpu_check(GPU_LAUNCH_DEPENDENT(place_heads, blocks, THREADS, 0, stream, *place, rows),
                     "placing queries and keys", error);
}
