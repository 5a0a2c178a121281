/* For tests: weights of a device and linear layers over them, by plain C functions.  Memory comes
 * from test_hooks.cu. */
#include "skinny.h"

GPU_EXPORT qllm_status gpu_test_device(gpu_device **out, qllm_error *error); /* test_hooks.cu */

/* Nothing in a result depends on it. */
GPU_EXPORT void gpu_test_multiprocessors(gpu_device *device, int n)
{
    device->multiprocessors = n;
}

GPU_EXPORT qllm_status gpu_test_weight_set(gpu_device *device, const qllm_qweight *weight,
                                           bool tiled, gpu_weight *out, qllm_error *error)
{
    return gpu_weight_set(device, out, weight, tiled, GPU_WEIGHTS, NULL, error);
}

GPU_EXPORT qllm_status gpu_test_weight_load(gpu_device *device, const qllm_tensor *values,
                                            qllm_format format, int64_t blocksize, const char *name,
                                            bool tiled, gpu_weight *out, qllm_error *error)
{
    return gpu_weight_load(device, out, values, format, blocksize, name, tiled, GPU_WEIGHTS, NULL,
                           error);
}

GPU_EXPORT qllm_status gpu_test_weight_get(gpu_device *device, const gpu_weight *weight,
                                           qllm_qweight *out, qllm_error *error)
{
    return gpu_weight_get(device, weight, out, NULL, error);
}

GPU_EXPORT void gpu_test_weight_clear(gpu_weight *weight)
{
    gpu_weight_clear(weight);
}

/* Of what gpu_test_weight_get gave. */
GPU_EXPORT void gpu_test_weight_release(qllm_qweight *weight)
{
    qllm_qweight_clear(weight);
}

GPU_EXPORT bool gpu_test_weight_tiles(qllm_format format, int64_t rows, int64_t cols,
                                      int64_t blocksize)
{
    return gpu_weight_tiles(format, rows, cols, blocksize);
}

GPU_EXPORT int64_t gpu_test_linear_scratch(int64_t rows, int64_t cols)
{
    return gpu_linear_scratch(rows, cols);
}

GPU_EXPORT bool gpu_test_linear_fits(const gpu_weight *const *weights, int n,
                                     const gpu_linear_output *output)
{
    return gpu_linear_fits(weights, n, output);
}

GPU_EXPORT qllm_status gpu_test_linear(gpu_device *device, const gpu_weight *const *weights, int n,
                                       const gpu_linear_input *input,
                                       const gpu_linear_output *output, qllm_error *error)
{
    qllm_status status = gpu_linear(device, weights, n, input, output, NULL, error);
    return status != QLLM_OK ? status : gpu_check(gpu_stream_wait(NULL), "a linear layer", error);
}
