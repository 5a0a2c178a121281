/* The host's side of a device: memory, copies, streams, graphs; over CUDA (driver.cu) or over its
 * emulation (emulate/driver.cc).
 *
 * A qllm_gpu_error of 0 is success; gpu_check turns any other into a status with a sentence:
 *     status = gpu_check(gpu_copy_in(weight, bytes, n, stream), "copying a weight", error);
 * Copies and kernels of one stream run one after the other, while the host goes on. */
#ifndef QLLM_KERNELS_RUNTIME_H
#define QLLM_KERNELS_RUNTIME_H

#include <stdbool.h>
#include <stdint.h>

#include "gpu.h"

extern "C" {
#include "core/status.h"
}

/* A C function that the library offers to whoever loads it. */
#define GPU_EXPORT extern "C" __attribute__((visibility("default")))

/* The name under which the backend is registered. */
#if defined(__CUDACC__)
#define GPU_BACKEND_NAME "cuda"
#else
#define GPU_BACKEND_NAME "emulated"
#endif

/* What memory is held for. */
enum gpu_memory { GPU_WEIGHTS, GPU_EMBEDDING, GPU_KV_CACHE, GPU_SCRATCH, GPU_MEMORY_CLASSES };

/* A device, and how much of its memory this owner holds.  Stays where it is while it holds any. */
typedef struct gpu_device {
    int index;
    char name[96];
    int multiprocessors;
    int major, minor;       /* compute capability; 9.0 when emulated */
    int64_t memory_bytes;   /* of the device */
    int64_t shared_bytes;   /* largest dynamic shared memory of a block */
    int64_t held[GPU_MEMORY_CLASSES];
} gpu_device;

/* Opens device `index` and makes it current for the calling thread.  QLLM_UNSUPPORTED when there is
 * no driver, no device, or one older than compute capability 8.0; QLLM_VALUE for a wrong index. */
qllm_status gpu_device_open(int index, gpu_device *out, qllm_error *error);

/* Makes the device current for the calling thread: at each entry from outside. */
qllm_status gpu_device_use(const gpu_device *device, qllm_error *error);

/* Memory of the device, aligned to 256 bytes, contents not set; counted in device->held[memory].
 * 0 bytes give a pointer too.  `what` names the thing for the sentence of QLLM_MEMORY, which says
 * what was needed and what was free.  On failure *out is NULL. */
qllm_status gpu_alloc(gpu_device *device, int64_t bytes, void **out, int memory, const char *what,
                      qllm_error *error);

/* Frees what gpu_alloc gave, from any thread, once the device is done with it; NULL is allowed. */
void gpu_free(void *memory);

/* Memory of the host that copies read and write while the host goes on; contents not set. */
qllm_status gpu_alloc_host(int64_t bytes, void **out, const char *what, qllm_error *error);
void gpu_free_host(void *memory);

/* Copies of bytes >= 0.  Host memory that is not from gpu_alloc_host may be used again on return;
 * memory from there only after gpu_stream_wait.  Only the latter can be captured in a graph. */
qllm_gpu_error gpu_copy_in(void *device, const void *host, int64_t bytes, gpu_stream stream);
qllm_gpu_error gpu_copy_out(void *host, const void *device, int64_t bytes, gpu_stream stream);
qllm_gpu_error gpu_copy_within(void *to, const void *from, int64_t bytes, gpu_stream stream);
qllm_gpu_error gpu_fill(void *device, int byte, int64_t bytes, gpu_stream stream);

qllm_status gpu_stream_create(gpu_stream *out, qllm_error *error);
void gpu_stream_destroy(gpu_stream stream); /* NULL is allowed */

/* Until all that was given to the stream is done; the error of what failed on the way. */
qllm_gpu_error gpu_stream_wait(gpu_stream stream);

/* A graph: what a stream is given between begin and end is recorded, with its arguments as they
 * are, instead of done; gpu_graph_run does it, in a stream, as often as wanted. */
typedef struct CUgraphExec_st *gpu_graph;
bool gpu_graphs_available(void);
qllm_gpu_error gpu_graph_begin(gpu_stream stream);
qllm_gpu_error gpu_graph_end(gpu_stream stream, gpu_graph *out); /* on failure *out is NULL */
qllm_gpu_error gpu_graph_run(gpu_graph graph, gpu_stream stream);
void gpu_graph_destroy(gpu_graph graph); /* NULL is allowed */

/* QLLM_OK for 0; else `what` ("the step's kernels") and the driver's words in a sentence, as
 * QLLM_MEMORY when memory was missing and QLLM_INTERNAL otherwise. */
qllm_status gpu_check(qllm_gpu_error code, const char *what, qllm_error *error);

/* The same calls with a status and a sentence. */
inline qllm_status gpu_copy_in(void *device, const void *host, int64_t bytes, gpu_stream stream,
                               qllm_error *error)
{
    return gpu_check(gpu_copy_in(device, host, bytes, stream), "a copy to the device", error);
}

inline qllm_status gpu_copy_out(void *host, const void *device, int64_t bytes, gpu_stream stream,
                                qllm_error *error)
{
    return gpu_check(gpu_copy_out(host, device, bytes, stream), "a copy from the device", error);
}

inline qllm_status gpu_copy_within(void *to, const void *from, int64_t bytes, gpu_stream stream,
                                   qllm_error *error)
{
    return gpu_check(gpu_copy_within(to, from, bytes, stream), "a copy within the device", error);
}

inline qllm_status gpu_fill(void *device, int byte, int64_t bytes, gpu_stream stream,
                            qllm_error *error)
{
    return gpu_check(gpu_fill(device, byte, bytes, stream), "filling memory", error);
}

inline qllm_status gpu_stream_wait(gpu_stream stream, qllm_error *error)
{
    return gpu_check(gpu_stream_wait(stream), "work given to the device", error);
}

#endif
