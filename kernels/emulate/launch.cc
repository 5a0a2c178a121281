/* A launch: its limits as on a GPU, its blocks in order, its errors as sentences. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <thread>

#include "device.h"
#include "fibers.h"

static thread_local char last_message[QLLM_ERROR_CAPACITY];

qllm_gpu_error emulated_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_message, sizeof last_message, format, arguments);
    va_end(arguments);
    return EMULATED_FAILURE;
}

const char *emulated_message()
{
    return last_message;
}

bool emulated_option(const char *name, const char *value)
{
    const char *set = getenv(name);
    return set != NULL && strcmp(set, value) == 0;
}

static qllm_gpu_error check(const gpu_emulated_kernel &k)
{
    const dim3 &grid = k.grid;
    if (k.threads < GPU_WARP || k.threads > MAX_BLOCK_THREADS || k.threads % GPU_WARP != 0)
        return emulated_error("kernel %s: %d threads in a block, instead of whole warps up to %d",
                              k.name, k.threads, static_cast<int>(MAX_BLOCK_THREADS));
    if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
        grid.z > 65535)
        return emulated_error("kernel %s: a grid of (%u, %u, %u) blocks", k.name, grid.x, grid.y,
                              grid.z);
    if (k.shared > EMULATED_SHARED_BYTES)
        return emulated_error("kernel %s: %zu bytes of shared memory, of which a block has %d",
                              k.name, k.shared, static_cast<int>(EMULATED_SHARED_BYTES));
    return 0;
}

/* What the threads that run blocks share. */
struct launch {
    const gpu_emulated_kernel &kernel;
    int64_t blocks;
    std::atomic<int64_t> next;
    std::atomic<bool> failed, waited;
    char message[QLLM_ERROR_CAPACITY]; /* of who set `failed` first */
};

static void run_blocks(launch *l)
{
    worker *w = worker_take();
    const gpu_emulated_kernel &k = l->kernel;
    void *shared = NULL;
    if (posix_memalign(&shared, 128, k.shared > 0 ? k.shared : 1) != 0)
        shared = NULL;
    w->kernel = &k;
    w->shared = static_cast<unsigned char *>(shared);
    w->waited_for_previous = false;
    w->reversed = emulated_option("QLLM_EMULATE_ORDER", "reversed");
    for (int64_t turn; !l->failed && (turn = l->next++) < l->blocks;) {
        int64_t i = w->reversed ? l->blocks - 1 - turn : turn;
        int64_t row = i / k.grid.x;
        gpu_index block = {static_cast<unsigned>(i % k.grid.x),
                           static_cast<unsigned>(row % k.grid.y),
                           static_cast<unsigned>(row / k.grid.y)};
        if (!worker_run(w, block) && !l->failed.exchange(true))
            memcpy(l->message, w->message, sizeof l->message);
    }
    if (w->waited_for_previous)
        l->waited = true;
    free(shared);
    worker_give(w);
}

qllm_gpu_error gpu_emulate_run(const gpu_emulated_kernel &kernel)
{
    qllm_gpu_error code = check(kernel);
    if (code != 0)
        return code;
    emulated_memory_open open;
    int64_t blocks = static_cast<int64_t>(kernel.grid.x) * kernel.grid.y * kernel.grid.z;
    launch l = {kernel, blocks, {0}, {false}, {false}, ""};
    const char *set = getenv("QLLM_EMULATE_THREADS");
    const int64_t threads = set != NULL ? strtol(set, NULL, 10) : 1;
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads && i < blocks; i++)
        others.emplace_back(run_blocks, &l);
    run_blocks(&l);
    for (std::thread &other : others)
        other.join();
    if (l.failed)
        return emulated_error("%s", l.message);
    if (kernel.dependent && !l.waited)
        return emulated_error("kernel %s: launched as dependent, but no thread of it calls "
                              "gpu_wait_for_previous", kernel.name);
    return 0;
}
