/* Kernels that are wrong on purpose, one way each, for the tests of the emulation: on a GPU they
 * would hang, read what is not there, or work by luck.  Never part of a library that is shipped. */
#include "test_hooks.h"

#define PLANTED(name, threads, shared_bytes, ...)                                                \
    return gpu_test_finish(GPU_LAUNCH(name, 1, threads, shared_bytes, NULL, __VA_ARGS__), error)

GPU_KERNEL void reverse_without_barrier(const float *in, float *out)
{
    GPU_SHARED(float, values);
    values[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

GPU_EXPORT qllm_status planted_no_barrier(const float *in, float *out, qllm_error *error)
{
    PLANTED(reverse_without_barrier, 64, 64 * sizeof(float), in, out);
}

GPU_KERNEL void shuffle_under_a_branch(const float *in, float *out)
{
    float v = in[threadIdx.x];
    if (threadIdx.x < 16)
        v += gpu_shfl_xor(GPU_FULL_WARP, v, 1);
    else
        v -= gpu_shfl_xor(GPU_FULL_WARP, v, 1);
    out[threadIdx.x] = v;
}

GPU_EXPORT qllm_status planted_divergence(const float *in, float *out, qllm_error *error)
{
    PLANTED(shuffle_under_a_branch, 64, 0, in, out);
}

GPU_KERNEL void shuffle_after_an_exit(const float *in, float *out, int n)
{
    int i = threadIdx.x;
    if (i >= n)
        return;
    out[i] = gpu_shfl_down(GPU_FULL_WARP, in[i], 1);
}

GPU_EXPORT qllm_status planted_exit(const float *in, float *out, qllm_error *error)
{
    PLANTED(shuffle_after_an_exit, 64, 0, in, out, 40);
}

GPU_KERNEL void shuffle_of_others(const float *in, float *out)
{
    out[threadIdx.x] = gpu_shfl(0xffffu, in[threadIdx.x], 0);
}

GPU_EXPORT qllm_status planted_wrong_mask(const float *in, float *out, qllm_error *error)
{
    PLANTED(shuffle_of_others, 64, 0, in, out);
}

GPU_KERNEL void shuffle_beside_a_barrier(const float *in, float *out)
{
    if (threadIdx.x < 16)
        gpu_sync_block();
    out[threadIdx.x] = gpu_shfl(GPU_FULL_WARP, in[threadIdx.x], 0);
}

GPU_EXPORT qllm_status planted_shuffle_beside_barrier(const float *in, float *out,
                                                      qllm_error *error)
{
    PLANTED(shuffle_beside_a_barrier, 64, 0, in, out);
}

GPU_KERNEL void two_barriers(const float *in, float *out)
{
    if (threadIdx.x < 32)
        gpu_sync_block();
    else
        gpu_sync_block();
    out[threadIdx.x] = in[threadIdx.x];
}

GPU_EXPORT qllm_status planted_two_barriers(const float *in, float *out, qllm_error *error)
{
    PLANTED(two_barriers, 64, 0, in, out);
}

GPU_KERNEL void write_behind(const float *in, float *out)
{
    out[threadIdx.x + 1] = in[threadIdx.x];
}

GPU_EXPORT qllm_status planted_behind_memory(const float *in, float *out, qllm_error *error)
{
    PLANTED(write_behind, 64, 0, in, out);
}

GPU_KERNEL void read_behind_shared(const float *in, float *out)
{
    GPU_SHARED(float, values);
    values[threadIdx.x] = in[threadIdx.x];
    gpu_sync_block();
    out[threadIdx.x] = values[threadIdx.x + 1];
}

GPU_EXPORT qllm_status planted_behind_shared(const float *in, float *out, qllm_error *error)
{
    PLANTED(read_behind_shared, 64, 64 * sizeof(float), in, out);
}

GPU_KERNEL void behind_an_array(const float *in, float *out)
{
    float two[2] = {in[0], in[1]};
    out[threadIdx.x] = two[threadIdx.x % 3];
}

GPU_EXPORT qllm_status planted_behind_array(const float *in, float *out, qllm_error *error)
{
    PLANTED(behind_an_array, 64, 0, in, out);
}

GPU_KERNEL void copy_without_wait(const float *in, float *out)
{
    GPU_SHARED(float, values);
    if (threadIdx.x < 16)
        gpu_copy_async16(values + threadIdx.x * 4, in + threadIdx.x * 4);
    gpu_copy_async_commit();
    gpu_sync_block();
    out[threadIdx.x] = values[threadIdx.x];
}

GPU_EXPORT qllm_status planted_no_wait(const float *in, float *out, qllm_error *error)
{
    PLANTED(copy_without_wait, 64, 64 * sizeof(float), in, out);
}

GPU_KERNEL void copy_waits_for_too_few(const float *in, float *out)
{
    GPU_SHARED(float, values);
    for (int half = 0; half < 2; half++) {
        int first = half * 32 + static_cast<int>(threadIdx.x) * 4;
        if (threadIdx.x < 8)
            gpu_copy_async16(values + first, in + first);
        gpu_copy_async_commit();
    }
    gpu_copy_async_wait<1>();
    gpu_sync_block();
    out[threadIdx.x] = values[threadIdx.x];
}

GPU_EXPORT qllm_status planted_waits_for_too_few(const float *in, float *out, qllm_error *error)
{
    PLANTED(copy_waits_for_too_few, 64, 64 * sizeof(float), in, out);
}

GPU_KERNEL void add_to_nothing(const float *in, float *out)
{
    GPU_SHARED(float, sums);
    sums[threadIdx.x] += in[threadIdx.x];
    out[threadIdx.x] = sums[threadIdx.x];
}

GPU_EXPORT qllm_status planted_not_set(const float *in, float *out, qllm_error *error)
{
    PLANTED(add_to_nothing, 64, 64 * sizeof(float), in, out);
}

GPU_KERNEL void load_across(const float *in, float *out)
{
    uint4 words = gpu_load(reinterpret_cast<const uint4 *>(in + threadIdx.x));
    out[threadIdx.x] = gpu_float_from_bits(words.x);
}

GPU_EXPORT qllm_status planted_misaligned(const float *in, float *out, qllm_error *error)
{
    PLANTED(load_across, 32, 0, in, out);
}

GPU_KERNEL void copy_values(const float *in, float *out)
{
    out[threadIdx.x] = in[threadIdx.x];
}

GPU_EXPORT qllm_status planted_never_waits(const float *in, float *out, qllm_error *error)
{
    return gpu_test_finish(GPU_LAUNCH_DEPENDENT(copy_values, 1, 64, 0, NULL, in, out), error);
}

GPU_EXPORT qllm_status planted_host_pointer(const float *in, float *out, qllm_error *error)
{
    float here[64] = {0};
    (void)in;
    PLANTED(copy_values, 64, 0, here, out);
}

/* The host reads what only kernels may. */
GPU_EXPORT qllm_status planted_host_reads(const float *in, float *out, qllm_error *error)
{
    float first = *static_cast<const volatile float *>(in);
    return gpu_fill(out, first > 0, sizeof first, NULL, error);
}

/* A copy that runs past the end of an array. */
GPU_EXPORT qllm_status planted_long_copy(const float *in, float *out, qllm_error *error)
{
    return gpu_copy_within(out, in, 65 * sizeof(float), NULL, error);
}

/* Waiting, and memory of the host that only it can read, while a graph is recorded. */
GPU_EXPORT qllm_status planted_recording(float *out, bool waits, qllm_error *error)
{
    float here = 1;
    gpu_stream stream = NULL;
    gpu_graph graph = NULL;
    qllm_status status = gpu_stream_create(&stream, error);
    if (status == QLLM_OK)
        status = gpu_check(gpu_graph_begin(stream), "beginning", error);
    if (status == QLLM_OK)
        status = waits ? gpu_stream_wait(stream, error)
                       : gpu_copy_in(out, &here, sizeof here, stream, error);
    gpu_graph_end(stream, &graph);
    gpu_graph_destroy(graph);
    gpu_stream_destroy(stream);
    return status;
}
