/* For tests: memory of a device, and the primitives of gpu.h one by one.  The arrays are device
 * memory (gpu_test_alloc), n is a multiple of the block's threads.  Libraries that are shipped hold
 * no test_hooks*.cu. */
#include "test_hooks.h"

/* The device that tests use; it is not closed. */
static gpu_device test_device;

qllm_status gpu_test_finish(qllm_gpu_error code, qllm_error *error)
{
    qllm_gpu_error waited = gpu_stream_wait(NULL);
    return gpu_check(code != 0 ? code : waited, "a test", error);
}

GPU_EXPORT qllm_status gpu_test_device(gpu_device **out, qllm_error *error)
{
    *out = &test_device;
    return test_device.multiprocessors > 0 ? QLLM_OK : gpu_device_open(0, &test_device, error);
}

GPU_EXPORT qllm_status gpu_test_open(int64_t index, qllm_error *error)
{
    gpu_device other;
    return gpu_device_open(static_cast<int>(index), &other, error);
}

GPU_EXPORT qllm_status gpu_test_alloc(int64_t bytes, void **out, qllm_error *error)
{
    gpu_device *device;
    qllm_status status = gpu_test_device(&device, error);
    return status != QLLM_OK ? status
                             : gpu_alloc(device, bytes, out, GPU_SCRATCH, "an array of a test",
                                         error);
}

GPU_EXPORT void gpu_test_free(void *memory)
{
    gpu_free(memory);
}

GPU_EXPORT int64_t gpu_test_held(int64_t memory)
{
    return test_device.held[memory];
}

GPU_EXPORT qllm_status gpu_test_copy_in(void *device, const void *host, int64_t bytes,
                                        qllm_error *error)
{
    return gpu_test_finish(gpu_copy_in(device, host, bytes, NULL), error);
}

GPU_EXPORT qllm_status gpu_test_copy_out(void *host, const void *device, int64_t bytes,
                                         qllm_error *error)
{
    return gpu_test_finish(gpu_copy_out(host, device, bytes, NULL), error);
}

/* ------------------------------------------------------------------------------ between lanes */

/* out (6, n): shfl from `lanes`, xor 5, down 3, ballot of odd values, any and all of v < limit. */
GPU_KERNEL void shuffles(const uint32_t *v, const int32_t *lanes, uint32_t limit, uint32_t *out,
                         int64_t n)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    out[i] = gpu_shfl(GPU_FULL_WARP, v[i], lanes[i]);
    out[n + i] = gpu_shfl_xor(GPU_FULL_WARP, v[i], 5);
    out[2 * n + i] = gpu_shfl_down(GPU_FULL_WARP, v[i], 3);
    out[3 * n + i] = gpu_ballot(GPU_FULL_WARP, v[i] & 1);
    out[4 * n + i] = gpu_any(GPU_FULL_WARP, v[i] < limit);
    out[5 * n + i] = gpu_all(GPU_FULL_WARP, v[i] < limit);
}

GPU_EXPORT qllm_status gpu_test_shuffles(const uint32_t *v, const int32_t *lanes, int64_t limit,
                                         uint32_t *out, int64_t n, qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(shuffles, static_cast<int>(n / 64), 64, 0, NULL, v, lanes,
                                      static_cast<uint32_t>(limit), out, n), error);
}

/* out (n): sums of each 8 lanes by shuffles of float64, all lanes of a warp but the last 8. */
GPU_KERNEL void sum_eights(const double *v, double *out)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    constexpr unsigned FIRST_24 = 0x00ffffffu;
    double sum = v[i];
    if (threadIdx.x % GPU_WARP < 24)
        for (int m = 1; m < 8; m *= 2)
            sum += gpu_shfl_xor(FIRST_24, sum, m);
    gpu_sync_warp();
    out[i] = sum;
}

GPU_EXPORT qllm_status gpu_test_sum_eights(const double *v, double *out, int64_t n,
                                           qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(sum_eights, static_cast<int>(n / 64), 64, 0, NULL, v, out),
                           error);
}

/* ---------------------------------------------------------------------------- matrix products */

/* Row-major a (16, K), b (K, 8), d (16, 8); Words of a register come from one row or column. */
template <class Word, class Sum, int K>
GPU_DEVICE void load_fragments(const Word *a, const Word *b, const Sum *d, uint32_t fa[4],
                               uint32_t fb[2], Sum fd[4])
{
    constexpr int N = 4 / sizeof(Word);
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    for (int r = 0; r < 4; r++) {
        memcpy(&fa[r], a + (g + r % 2 * 8) * K + r / 2 * (K / 2) + t * N, 4);
        fd[r] = d[(g + r / 2 * 8) * 8 + t * 2 + r % 2];
    }
    for (int r = 0; r < 2; r++) {
        Word words[N];
        for (int j = 0; j < N; j++)
            words[j] = b[(r * (K / 2) + t * N + j) * 8 + g];
        memcpy(&fb[r], words, 4);
    }
}

template <class Sum>
GPU_DEVICE void store_fragment(const Sum fd[4], Sum *d)
{
    for (int r = 0; r < 4; r++)
        d[(threadIdx.x / 4 + r / 2 * 8) * 8 + threadIdx.x % 4 * 2 + r % 2] = fd[r];
}

GPU_KERNEL void mma_bf16(const uint16_t *a, const uint16_t *b, float *d)
{
    uint32_t fa[4], fb[2];
    float fd[4];
    load_fragments<uint16_t, float, 16>(a, b, d, fa, fb, fd);
    gpu_mma_bf16(fd, fa, fb);
    store_fragment(fd, d);
}

GPU_KERNEL void mma_s8(const int8_t *a, const int8_t *b, int32_t *d)
{
    uint32_t fa[4], fb[2];
    int32_t fd[4];
    load_fragments<int8_t, int32_t, 32>(a, b, d, fa, fb, fd);
    gpu_mma_s8(fd, fa, fb);
    store_fragment(fd, d);
}

GPU_EXPORT qllm_status gpu_test_mma_bf16(const uint16_t *a, const uint16_t *b, float *d,
                                         qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(mma_bf16, 1, GPU_WARP, 0, NULL, a, b, d), error);
}

GPU_EXPORT qllm_status gpu_test_mma_s8(const int8_t *a, const int8_t *b, int32_t *d,
                                       qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(mma_s8, 1, GPU_WARP, 0, NULL, a, b, d), error);
}

/* in (4, 8, 8) values of 16 bits; out (2, 32, 4): each lane's registers, plain and transposed. */
GPU_KERNEL void load_matrices(const uint4 *in, uint32_t *out)
{
    GPU_SHARED(uint4, rows);
    rows[threadIdx.x] = in[threadIdx.x];
    gpu_sync_block();
    uint32_t r[4];
    gpu_load_matrices(r, &rows[threadIdx.x]);
    for (int m = 0; m < 4; m++)
        out[threadIdx.x * 4 + m] = r[m];
    gpu_load_matrices_transposed(r, &rows[threadIdx.x]);
    for (int m = 0; m < 4; m++)
        out[128 + threadIdx.x * 4 + m] = r[m];
}

GPU_EXPORT qllm_status gpu_test_load_matrices(const uint4 *in, uint32_t *out, qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(load_matrices, 1, GPU_WARP, GPU_WARP * sizeof(uint4), NULL,
                                      in, out), error);
}

/* ------------------------------------------------------------------------------------ memory */

/* Each thread sums its words of in (turns, threads) of uint4, through three buffers in turn. */
GPU_KERNEL void sum_through_ring(const uint4 *in, uint32_t *out, int turns)
{
    GPU_SHARED(uint4, ring);
    uint32_t sum = 0;
    for (int turn = 0; turn < turns + 2; turn++) {
        if (turn < turns)
            gpu_copy_async16(&ring[turn % 3 * blockDim.x + threadIdx.x],
                             &in[turn * blockDim.x + threadIdx.x]);
        gpu_copy_async_commit();
        gpu_copy_async_wait<2>();
        if (turn >= 2) {
            uint4 words = ring[(turn - 2) % 3 * blockDim.x + threadIdx.x];
            sum += words.x + 2 * words.y + 3 * words.z + 4 * words.w;
        }
    }
    out[threadIdx.x] = sum;
}

GPU_EXPORT qllm_status gpu_test_ring(const uint4 *in, uint32_t *out, int64_t turns,
                                     qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(sum_through_ring, 1, 64, 3 * 64 * sizeof(uint4), NULL, in,
                                      out, static_cast<int>(turns)), error);
}

/* Each block reverses its 256 values; the shared memory is as large as asked for. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(256, 1) reverse_blocks(const float *in, float *out)
{
    GPU_SHARED(float, values);
    int64_t first = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x;
    values[threadIdx.x] = gpu_load(&in[first + threadIdx.x]);
    gpu_sync_block();
    out[first + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

GPU_EXPORT qllm_status gpu_test_reverse(const float *in, float *out, int64_t columns, int64_t rows,
                                        int64_t shared, int64_t threads, qllm_error *error)
{
    dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows));
    return gpu_test_finish(GPU_LAUNCH(reverse_blocks, grid, static_cast<int>(threads),
                                      static_cast<size_t>(shared), NULL, in, out), error);
}

/* out (4): the sum, largest, smallest and disjunction of v (n). */
GPU_KERNEL void gather_atomics(const uint32_t *v, uint32_t *out)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    gpu_atomic_add(&out[0], v[i]);
    gpu_atomic_max(&out[1], v[i]);
    gpu_atomic_min(&out[2], v[i]);
    gpu_atomic_or(&out[3], v[i]);
}

GPU_EXPORT qllm_status gpu_test_atomics(const uint32_t *v, uint32_t *out, int64_t n,
                                        qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(gather_atomics, static_cast<int>(n / 64), 64, 0, NULL, v,
                                      out), error);
}

/* ---------------------------------------------------------------------------------- arithmetic */

/* out (5, n): bf16 of x, back as bits, x and y as a pair, bytes by selector, a sum of products. */
GPU_KERNEL void convert(const float *x, const float *y, const uint16_t *half, uint32_t *out,
                        int64_t n)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t a = gpu_bits_from_float(x[i]), b = gpu_bits_from_float(y[i]);
    out[i] = gpu_float_to_bf16(x[i]);
    out[n + i] = gpu_pack_bf16(x[i], y[i]);
    out[2 * n + i] = gpu_bits_from_float(gpu_half_to_float(half[i]));
    out[3 * n + i] = gpu_byte_perm(a, b, 0x7214);
    out[4 * n + i] = static_cast<uint32_t>(
        gpu_dot4(static_cast<int>(a), static_cast<int>(b), gpu_popcount(a)));
}

GPU_EXPORT qllm_status gpu_test_convert(const float *x, const float *y, const uint16_t *half,
                                        uint32_t *out, int64_t n, qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH(convert, static_cast<int>(n / 64), 64, 0, NULL, x, y, half,
                                      out, n), error);
}

/* --------------------------------------------------------------------------- streams and graphs */

/* y[i] = y[i] * 2 + *add, after what the stream did before. */
GPU_KERNEL void double_and_add(float *y, const float *add)
{
    gpu_let_next_start();
    gpu_wait_for_previous();
    y[threadIdx.x] = gpu_fma(y[threadIdx.x], 2.0f, *add);
}

/* y (32) and add (1) on the device.  Records a copy of the next of `values` (runs, on the host) to
 * `add` and two kernels, and runs the graph for each value; without graphs the same by hand.  The
 * value is put into place before each run and read by the copy inside.  steps: how often a kernel
 * ran with y's first element as result (runs). */
GPU_EXPORT qllm_status gpu_test_graph(float *y, float *add, const float *values, int64_t runs,
                                      float *results, bool *recorded, qllm_error *error)
{
    gpu_stream stream = NULL;
    gpu_graph graph = NULL;
    void *pinned = NULL;
    qllm_status status = gpu_stream_create(&stream, error);
    if (status == QLLM_OK)
        status = gpu_alloc_host(2 * sizeof(float), &pinned, "a pair", error);
    float *pair = static_cast<float *>(pinned);
    *recorded = gpu_graphs_available();
    for (int64_t i = *recorded ? -1 : 0; i < runs && status == QLLM_OK; i++) {
        qllm_gpu_error code = 0;
        if (i >= 0)
            pair[0] = values[i];
        if (i < 0)
            code = gpu_graph_begin(stream);
        if (i >= 0 && *recorded) {
            code = gpu_graph_run(graph, stream);
        } else if (code == 0) {
            code = gpu_copy_in(add, pair, sizeof(float), stream);
            for (int k = 0; k < 2 && code == 0; k++)
                code = GPU_LAUNCH_DEPENDENT(double_and_add, 1, GPU_WARP, 0, stream, y, add);
            if (code == 0)
                code = gpu_copy_out(pair + 1, y, sizeof(float), stream);
        }
        if (i < 0)
            code = code != 0 ? code : gpu_graph_end(stream, &graph);
        else if (code == 0)
            code = gpu_stream_wait(stream);
        if (i >= 0)
            results[i] = pair[1];
        status = gpu_check(code, "a graph", error);
    }
    gpu_graph_destroy(graph);
    gpu_free_host(pinned);
    gpu_stream_destroy(stream);
    return status;
}

/* Launches once; *before and *after: y's first element as copied out, before and after waiting. */
GPU_EXPORT qllm_status gpu_test_late(float *y, float *add, float *before, float *after,
                                     qllm_error *error)
{
    gpu_stream stream = NULL;
    void *pinned = NULL;
    qllm_status status = gpu_stream_create(&stream, error);
    if (status == QLLM_OK)
        status = gpu_alloc_host(sizeof(float), &pinned, "a value", error);
    if (status == QLLM_OK) {
        float *value = static_cast<float *>(pinned);
        *value = -1;
        qllm_gpu_error code = GPU_LAUNCH(double_and_add, 1, GPU_WARP, 0, stream, y, add);
        if (code == 0)
            code = gpu_copy_out(value, y, sizeof(float), stream);
        *before = *value;
        status = gpu_check(code, "a launch", error);
        if (status == QLLM_OK)
            status = gpu_stream_wait(stream, error);
        *after = *value;
    }
    gpu_free_host(pinned);
    gpu_stream_destroy(stream);
    return status;
}
