/* What a device can do at best: what speeds are measured against. */
#include <chrono>

#include "decoder.h"

namespace {

enum { THREADS = 512, EDGE_THREADS = 128, LOADS = 8, EDGES = 200, TRIES = 5, PASSES = 4 };

/* Reads n 16-byte words once; the exclusive or of what each thread has read goes out. */
GPU_KERNEL void GPU_KERNEL_BOUNDS(THREADS, 2) read_all(const uint4 *from, int64_t n, unsigned *out)
{
    int64_t threads = (int64_t)gridDim.x * blockDim.x;
    int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t i = first;
    unsigned all = 0;
    for (; i + (LOADS - 1) * threads < n; i += LOADS * threads) {
        uint4 words[LOADS];
GPU_UNROLL
        for (int j = 0; j < LOADS; j++)
            words[j] = gpu_load_stream(from + i + j * threads);
GPU_UNROLL
        for (int j = 0; j < LOADS; j++)
            all ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
    }
    for (; i < n; i += threads) {
        uint4 word = gpu_load_stream(from + i);
        all ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    out[first] = all;
}

GPU_KERNEL void nothing(int)
{
    gpu_wait_for_previous();
    gpu_let_next_start();
}

/* What a measurement works on. */
struct probe {
    gpu_device device;
    gpu_stream stream;
    int64_t bytes;       /* of each of the two halves; a multiple of 16 */
    void *from, *to;     /* device */
    void *found;         /* device: a word a thread */
    int blocks;
};

double now()
{
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

qllm_gpu_error read_once(probe *p)
{
    return GPU_LAUNCH(read_all, p->blocks, THREADS, 0, p->stream, (const uint4 *)p->from,
                      p->bytes / 16, (unsigned *)p->found);
}

qllm_gpu_error copy_once(probe *p)
{
    return gpu_copy_within(p->to, p->from, p->bytes, p->stream);
}

/* The least seconds of one call, of PASSES in a row. */
qllm_gpu_error time_calls(probe *p, qllm_gpu_error (*once)(probe *), double *seconds)
{
    qllm_gpu_error code = once(p);
    if (code == 0)
        code = gpu_stream_wait(p->stream);
    *seconds = INFINITY;
    for (int attempt = 0; code == 0 && attempt < TRIES; attempt++) {
        double start = now();
        for (int i = 0; code == 0 && i < PASSES; i++)
            code = once(p);
        if (code == 0)
            code = gpu_stream_wait(p->stream);
        *seconds = fmin(*seconds, (now() - start) / PASSES);
    }
    return code;
}

qllm_gpu_error launch_edges(probe *p, bool dependent)
{
    qllm_gpu_error code = 0;
    int blocks = p->device.multiprocessors;
    for (int i = 0; code == 0 && i < EDGES; i++)
        code = dependent ? GPU_LAUNCH_DEPENDENT(nothing, blocks, EDGE_THREADS, 0, p->stream, i)
                         : GPU_LAUNCH(nothing, blocks, EDGE_THREADS, 0, p->stream, i);
    return code;
}

/* Seconds from one kernel of a graph to the next, when they do nothing. */
qllm_gpu_error time_edge(probe *p, bool dependent, double *seconds)
{
    gpu_graph graph = NULL;
    qllm_gpu_error code = gpu_graph_begin(p->stream);
    if (code == 0) {
        code = launch_edges(p, dependent);
        qllm_gpu_error ended = gpu_graph_end(p->stream, &graph);
        code = code == 0 ? ended : code;
    }
    *seconds = INFINITY;
    for (int attempt = -1; code == 0 && attempt < TRIES; attempt++) { /* the first one warms up */
        double start = now();
        code = gpu_graph_run(graph, p->stream);
        if (code == 0)
            code = gpu_stream_wait(p->stream);
        if (attempt >= 0)
            *seconds = fmin(*seconds, (now() - start) / EDGES);
    }
    gpu_graph_destroy(graph);
    return code;
}

qllm_status open_probe(probe *p, int index, int64_t bytes, qllm_error *error)
{
    *p = {};
    p->bytes = bytes / 16 * 16;
    qllm_status status = gpu_device_open(index, &p->device, error);
    p->blocks = 4 * p->device.multiprocessors;
    if (status == QLLM_OK)
        status = gpu_stream_create(&p->stream, error);
    if (status == QLLM_OK)
        status = gpu_alloc(&p->device, p->bytes, &p->from, GPU_SCRATCH, "measuring", error);
    if (status == QLLM_OK)
        status = gpu_alloc(&p->device, p->bytes, &p->to, GPU_SCRATCH, "measuring", error);
    if (status == QLLM_OK)
        status = gpu_alloc(&p->device, (int64_t)p->blocks * THREADS * 4, &p->found, GPU_SCRATCH,
                           "measuring", error);
    if (status == QLLM_OK)
        status = gpu_check(gpu_fill(p->from, 0x5a, p->bytes, p->stream), "measuring", error);
    return status;
}

void close_probe(probe *p)
{
    gpu_free(p->from);
    gpu_free(p->to);
    gpu_free(p->found);
    gpu_stream_destroy(p->stream);
}

} // namespace

qllm_status gpu_limits(int index, int64_t bytes, qllm_device_limits *out, qllm_error *error)
{
    probe p;
    double read = INFINITY, copied = INFINITY;
    *out = {};
    if (bytes < 16)
        return qllm_fail(error, QLLM_VALUE, "nbytes: expected at least 16, found %lld",
                         (long long)bytes);
    qllm_status status = open_probe(&p, index, bytes, error);
    if (status == QLLM_OK) {
        qllm_gpu_error code = time_calls(&p, read_once, &read);
        if (code == 0)
            code = time_calls(&p, copy_once, &copied);
        if (code == 0 && gpu_graphs_available())
            code = time_edge(&p, false, &out->edge_seconds);
        if (code == 0 && gpu_graphs_available())
            code = time_edge(&p, true, &out->dependent_edge_seconds);
        status = gpu_check(code, "measuring the device", error);
        out->read_bytes_per_second = (double)p.bytes / read;
        out->copy_bytes_per_second = 2 * (double)p.bytes / copied;
    }
    close_probe(&p);
    return status;
}
