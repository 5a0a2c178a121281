/* For tests: streams and graphs that linear layers alone are given to, and a thread's device. */
#include "driver.h"
#include "test_hooks.h"

GPU_EXPORT qllm_status gpu_test_stream(gpu_stream *out, qllm_error *error)
{
    gpu_device *device;
    qllm_status status = gpu_test_device(&device, error);
    return status == QLLM_OK ? gpu_stream_create(out, error) : status;
}

GPU_EXPORT qllm_status gpu_test_stream_wait(gpu_stream stream, qllm_error *error)
{
    return gpu_stream_wait(stream, error);
}

GPU_EXPORT void gpu_test_stream_destroy(gpu_stream stream)
{
    gpu_stream_destroy(stream);
}

GPU_EXPORT qllm_status gpu_test_graph_begin(gpu_stream stream, qllm_error *error)
{
    return gpu_check(gpu_graph_begin(stream), "a graph", error);
}

GPU_EXPORT qllm_status gpu_test_graph_end(gpu_stream stream, gpu_graph *out, qllm_error *error)
{
    return gpu_check(gpu_graph_end(stream, out), "a graph", error);
}

GPU_EXPORT qllm_status gpu_test_graph_run(gpu_graph graph, gpu_stream stream, qllm_error *error)
{
    return gpu_check(gpu_graph_run(graph, stream), "a graph", error);
}

GPU_EXPORT void gpu_test_graph_destroy(gpu_graph graph)
{
    gpu_graph_destroy(graph);
}

/* The calling thread's current device; it becomes `next` unless that is negative. */
GPU_EXPORT qllm_status gpu_test_current(int64_t next, int *out, qllm_error *error)
{
    qllm_gpu_error code = gpu_driver_current(out);
    if (code == 0 && next >= 0)
        code = gpu_driver_use(static_cast<int>(next));
    return gpu_check(code, "choosing the device", error);
}
