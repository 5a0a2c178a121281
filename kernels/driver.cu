/* The CUDA runtime behind driver.h and runtime.h.  Each function clears the error that it returns,
 * so that the next call does not find it. */
#include "driver.h"

#if defined(__CUDACC__)

static qllm_gpu_error result(cudaError_t code)
{
    if (code != cudaSuccess)
        cudaGetLastError();
    return code;
}

bool gpu_overlaps_launches(void)
{
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess && major >= 9;
}

qllm_gpu_error gpu_driver_count(int *count)
{
    *count = 0;
    return result(cudaGetDeviceCount(count));
}

qllm_gpu_error gpu_driver_use(int index)
{
    return result(cudaSetDevice(index));
}

qllm_gpu_error gpu_driver_current(int *index)
{
    return result(cudaGetDevice(index));
}

qllm_gpu_error gpu_driver_wait()
{
    return result(cudaDeviceSynchronize());
}

qllm_gpu_error gpu_driver_describe(int index, gpu_device *out)
{
    cudaDeviceProp properties;
    cudaError_t code = cudaGetDeviceProperties(&properties, index);
    if (code != cudaSuccess)
        return result(code);
    out->index = index;
    qllm_format_text(out->name, sizeof out->name, "%s", properties.name);
    out->multiprocessors = properties.multiProcessorCount;
    out->major = properties.major;
    out->minor = properties.minor;
    out->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    out->shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
    return 0;
}

qllm_gpu_error gpu_driver_memory(int64_t *free_bytes)
{
    size_t unused = 0, total = 0;
    cudaError_t code = cudaMemGetInfo(&unused, &total);
    *free_bytes = static_cast<int64_t>(unused);
    return result(code);
}

void gpu_driver_version(char *out, int64_t capacity)
{
    int version = 0; /* 1000 major + 10 minor */
    result(cudaDriverGetVersion(&version));
    qllm_format_text(out, static_cast<size_t>(capacity), "CUDA %d.%d", version / 1000,
                     version % 1000 / 10);
}

qllm_gpu_error gpu_driver_alloc(int64_t bytes, void **out)
{
    return result(cudaMalloc(out, static_cast<size_t>(bytes)));
}

void gpu_driver_free(void *memory)
{
    result(cudaFree(memory));
}

qllm_gpu_error gpu_driver_alloc_host(int64_t bytes, void **out)
{
    return result(cudaMallocHost(out, static_cast<size_t>(bytes)));
}

void gpu_free_host(void *memory)
{
    result(cudaFreeHost(memory));
}

const char *gpu_driver_text(qllm_gpu_error code)
{
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

bool gpu_driver_lacks_memory(qllm_gpu_error code)
{
    return code == cudaErrorMemoryAllocation;
}

bool gpu_driver_is_absent(qllm_gpu_error code)
{
    switch (code) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
    case cudaErrorStubLibrary:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoKernelImageForDevice: return true;
    default: return false;
    }
}

static qllm_gpu_error copy(void *to, const void *from, int64_t bytes, cudaMemcpyKind kind,
                           gpu_stream stream)
{
    return bytes == 0 ? 0 : result(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind,
                                                   stream));
}

qllm_gpu_error gpu_copy_in(void *device, const void *host, int64_t bytes, gpu_stream stream)
{
    return copy(device, host, bytes, cudaMemcpyHostToDevice, stream);
}

qllm_gpu_error gpu_copy_out(void *host, const void *device, int64_t bytes, gpu_stream stream)
{
    return copy(host, device, bytes, cudaMemcpyDeviceToHost, stream);
}

qllm_gpu_error gpu_copy_within(void *to, const void *from, int64_t bytes, gpu_stream stream)
{
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

qllm_gpu_error gpu_fill(void *device, int byte, int64_t bytes, gpu_stream stream)
{
    return bytes == 0 ? 0 : result(cudaMemsetAsync(device, byte, static_cast<size_t>(bytes),
                                                   stream));
}

qllm_gpu_error gpu_driver_stream(gpu_stream *out)
{
    return result(cudaStreamCreateWithFlags(out, cudaStreamNonBlocking));
}

void gpu_stream_destroy(gpu_stream stream)
{
    if (stream != NULL)
        result(cudaStreamDestroy(stream));
}

qllm_gpu_error gpu_stream_wait(gpu_stream stream)
{
    return result(cudaStreamSynchronize(stream));
}

bool gpu_graphs_available(void)
{
    return true;
}

qllm_gpu_error gpu_graph_begin(gpu_stream stream)
{
    return result(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
}

qllm_gpu_error gpu_graph_end(gpu_stream stream, gpu_graph *out)
{
    *out = NULL;
    cudaGraph_t graph = NULL;
    cudaError_t code = cudaStreamEndCapture(stream, &graph);
    if (code == cudaSuccess)
        code = cudaGraphInstantiate(out, graph, 0);
    if (graph != NULL)
        cudaGraphDestroy(graph);
    return result(code);
}

qllm_gpu_error gpu_graph_run(gpu_graph graph, gpu_stream stream)
{
    return result(cudaGraphLaunch(graph, stream));
}

void gpu_graph_destroy(gpu_graph graph)
{
    if (graph != NULL)
        result(cudaGraphExecDestroy(graph));
}

#endif
