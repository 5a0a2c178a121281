/* The emulated driver: streams that do their work at once, or with QLLM_EMULATE_STREAMS=late only
 * when they are waited for, as a busy GPU would; graphs that keep their work for later.
 * QLLM_EMULATE_HOST_MEMORY=1 lets kernels have any memory of the host, as some GPUs can. */
#include <mutex>
#include <set>
#include <vector>

#include "device.h"

using work = std::function<qllm_gpu_error()>;

struct CUgraphExec_st {
    std::vector<work> works;
};

struct CUstream_st {
    std::mutex mutex;
    std::vector<work> late;
    gpu_graph recording;
};

static std::mutex streams_mutex;

static std::set<gpu_stream> &streams()
{
    static auto *all = new std::set<gpu_stream>; /* lives as long as the process */
    return *all;
}

qllm_gpu_error gpu_emulate_submit(gpu_stream stream, work w)
{
    if (stream != NULL && stream->recording != NULL) {
        stream->recording->works.push_back(std::move(w));
        return 0;
    }
    if (stream != NULL && emulated_option("QLLM_EMULATE_STREAMS", "late")) {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->late.push_back(std::move(w));
        return 0;
    }
    return w();
}

qllm_gpu_error gpu_stream_wait(gpu_stream stream)
{
    if (stream == NULL)
        return 0;
    if (stream->recording != NULL)
        return emulated_error("a stream that records a graph cannot be waited for");
    std::vector<work> works;
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        works.swap(stream->late);
    }
    for (const work &w : works) {
        qllm_gpu_error code = w();
        if (code != 0)
            return code;
    }
    return 0;
}

void gpu_driver_version(char *out, int64_t capacity)
{
    qllm_format_text(out, static_cast<size_t>(capacity), "emulated");
}

void emulated_finish_streams()
{
    std::lock_guard<std::mutex> lock(streams_mutex);
    for (gpu_stream stream : streams())
        if (stream->recording == NULL)
            gpu_stream_wait(stream);
}

qllm_gpu_error gpu_driver_stream(gpu_stream *out)
{
    *out = new CUstream_st();
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams().insert(*out);
    return 0;
}

void gpu_stream_destroy(gpu_stream stream)
{
    if (stream == NULL)
        return;
    gpu_stream_wait(stream);
    std::lock_guard<std::mutex> lock(streams_mutex);
    streams().erase(stream);
    delete stream;
}

/* ---------------------------------------------------------------------------------- graphs */

bool gpu_graphs_available(void)
{
    return !emulated_option("QLLM_EMULATE_GRAPHS", "0");
}

qllm_gpu_error gpu_graph_begin(gpu_stream stream)
{
    if (stream == NULL || stream->recording != NULL)
        return emulated_error("a graph is recorded from a stream of its own, one at a time");
    stream->recording = new CUgraphExec_st();
    return 0;
}

qllm_gpu_error gpu_graph_end(gpu_stream stream, gpu_graph *out)
{
    *out = stream->recording;
    stream->recording = NULL;
    return *out != NULL ? 0 : emulated_error("no graph was begun");
}

qllm_gpu_error gpu_graph_run(gpu_graph graph, gpu_stream stream)
{
    return gpu_emulate_submit(stream, [graph] {
        emulated_memory_open open;
        for (const work &w : graph->works) {
            qllm_gpu_error code = w();
            if (code != 0)
                return code;
        }
        return 0;
    });
}

void gpu_graph_destroy(gpu_graph graph)
{
    emulated_finish_streams();
    delete graph;
}

/* ---------------------------------------------------------------------------------- copies */

static qllm_gpu_error check(const void *device, int64_t bytes, const char *what)
{
    if (emulated_on_device(device, bytes))
        return 0;
    return emulated_error("%s of %lld bytes: not inside one allocation of the device", what,
                          static_cast<long long>(bytes));
}

static work copy(void *to, const void *from, int64_t bytes)
{
    return [=] {
        emulated_memory_open open;
        memmove(to, from, static_cast<size_t>(bytes));
        return 0;
    };
}

/* Host memory that a GPU cannot read by itself is read, or written, before the call returns. */
static qllm_gpu_error refuse_recording(const void *host, int64_t bytes, gpu_stream stream)
{
    if (stream == NULL || stream->recording == NULL || emulated_pinned(host, bytes))
        return 0;
    return emulated_error("a graph copies from and to memory of gpu_alloc_host alone");
}

qllm_gpu_error gpu_copy_in(void *device, const void *host, int64_t bytes, gpu_stream stream)
{
    if (bytes == 0)
        return 0;
    qllm_gpu_error code = check(device, bytes, "a copy to the device");
    if (code == 0)
        code = refuse_recording(host, bytes, stream);
    if (code != 0)
        return code;
    if (emulated_pinned(host, bytes))
        return gpu_emulate_submit(stream, copy(device, host, bytes));
    const char *first = static_cast<const char *>(host);
    std::vector<char> staged(first, first + bytes);
    return gpu_emulate_submit(stream, [device, staged = std::move(staged)] {
        emulated_memory_open open;
        memcpy(device, staged.data(), staged.size());
        return 0;
    });
}

qllm_gpu_error gpu_copy_out(void *host, const void *device, int64_t bytes, gpu_stream stream)
{
    if (bytes == 0)
        return 0;
    qllm_gpu_error code = check(device, bytes, "a copy from the device");
    if (code == 0)
        code = refuse_recording(host, bytes, stream);
    if (code == 0)
        code = gpu_emulate_submit(stream, copy(host, device, bytes));
    return code != 0 || emulated_pinned(host, bytes) ? code : gpu_stream_wait(stream);
}

qllm_gpu_error gpu_copy_within(void *to, const void *from, int64_t bytes, gpu_stream stream)
{
    if (bytes == 0)
        return 0;
    qllm_gpu_error code = check(to, bytes, "a copy within the device");
    if (code == 0)
        code = check(from, bytes, "a copy within the device");
    return code != 0 ? code : gpu_emulate_submit(stream, copy(to, from, bytes));
}

qllm_gpu_error gpu_fill(void *device, int byte, int64_t bytes, gpu_stream stream)
{
    if (bytes == 0)
        return 0;
    qllm_gpu_error code = check(device, bytes, "filling");
    return code != 0 ? code : gpu_emulate_submit(stream, [=] {
        emulated_memory_open open;
        memset(device, byte, static_cast<size_t>(bytes));
        return 0;
    });
}

qllm_gpu_error gpu_emulate_argument(const char *kernel, int index, const void *pointer)
{
    if (pointer == NULL || emulated_on_device(pointer, 0) || emulated_pinned(pointer, 0) ||
        emulated_option("QLLM_EMULATE_HOST_MEMORY", "1"))
        return 0;
    return emulated_error("kernel %s: argument %d points to no memory of the device", kernel,
                          index);
}

/* ---------------------------------------------------------------------------------- the device */

qllm_gpu_error gpu_driver_count(int *count)
{
    const char *set = getenv("QLLM_EMULATE_DEVICES");
    *count = set != NULL ? static_cast<int>(strtol(set, NULL, 10)) : 1;
    return 0;
}

static thread_local int current_device;

qllm_gpu_error gpu_driver_use(int index)
{
    current_device = index;
    return 0;
}

qllm_gpu_error gpu_driver_current(int *index)
{
    *index = current_device;
    return 0;
}

qllm_gpu_error gpu_driver_wait()
{
    emulated_finish_streams();
    return 0;
}


qllm_gpu_error gpu_driver_describe(int index, gpu_device *out)
{
    out->index = index;
    if (index == 0)
        qllm_format_text(out->name, sizeof out->name, "emulated GPU");
    else
        qllm_format_text(out->name, sizeof out->name, "emulated GPU %d", index);
    out->multiprocessors = 4;
    out->major = 9;
    out->minor = 0;
    out->memory_bytes = emulated_capacity();
    out->shared_bytes = EMULATED_SHARED_BYTES;
    return 0;
}

const char *gpu_driver_text(qllm_gpu_error code)
{
    return code == EMULATED_FAILURE ? emulated_message()
           : code == EMULATED_OUT_OF_MEMORY ? "out of memory" : "no error";
}

bool gpu_driver_lacks_memory(qllm_gpu_error code)
{
    return code == EMULATED_OUT_OF_MEMORY;
}

bool gpu_driver_is_absent(qllm_gpu_error)
{
    return false;
}
