/* The emulated device's memory: one stretch of addresses, handed out first fit, filled with 0xFF,
 * closed to the host.  QLLM_EMULATE_MEMORY=bytes says how much there is. */
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
static const bool GUARDED = false;
#else
static const bool GUARDED = true;
#endif

constexpr int64_t ALIGNMENT = 256, ADDRESSES = INT64_C(64) << 30, DEFAULT_BYTES = INT64_C(8) << 30;

static std::mutex mutex;
static char *base;     /* of the stretch, when GUARDED */
static int64_t extent; /* of what was ever handed out */
static int64_t held;   /* bytes handed out now */
static int open_count;
static int64_t fail_at; /* the n-th allocation from now fails; 0: none */

using ranges = std::map<char *, int64_t>;

static ranges &blocks()
{
    static auto *all = new ranges; /* lives as long as the process */
    return *all;
}

static ranges &pinned()
{
    static auto *all = new ranges;
    return *all;
}

static int64_t rounded(int64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int64_t capacity()
{
    const char *set = getenv("QLLM_EMULATE_MEMORY");
    return set != NULL ? strtoll(set, NULL, 10) : DEFAULT_BYTES;
}

static void protect(void)
{
    if (base != NULL && extent > 0)
        mprotect(base, static_cast<size_t>(extent), open_count > 0 ? PROT_READ | PROT_WRITE
                                                                  : PROT_NONE);
}

emulated_memory_open::emulated_memory_open()
{
    std::lock_guard<std::mutex> lock(mutex);
    if (open_count++ == 0)
        protect();
}

emulated_memory_open::~emulated_memory_open()
{
    std::lock_guard<std::mutex> lock(mutex);
    if (--open_count == 0)
        protect();
}

/* First fit; NULL when the stretch is used up or cannot be had.  Under the mutex. */
static char *place(int64_t bytes)
{
    if (base == NULL) {
        void *memory = mmap(NULL, ADDRESSES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                            -1, 0);
        if (memory == MAP_FAILED)
            return NULL;
        base = static_cast<char *>(memory);
    }
    char *at = base;
    for (const auto &[start, size] : blocks()) {
        if (start - at >= bytes)
            break;
        at = start + rounded(size);
    }
    if (at + bytes > base + ADDRESSES)
        return NULL;
    if (at + bytes - base > extent) {
        extent = (at + bytes - base + 0xffff) / 0x10000 * 0x10000;
        protect();
    }
    return at;
}

qllm_gpu_error gpu_driver_alloc(int64_t bytes, void **out)
{
    *out = NULL;
    emulated_memory_open open;
    std::lock_guard<std::mutex> lock(mutex);
    if (fail_at > 0 && --fail_at == 0)
        return EMULATED_OUT_OF_MEMORY;
    if (bytes > capacity() - held)
        return EMULATED_OUT_OF_MEMORY;
    if (GUARDED)
        *out = place(rounded(bytes));
    else if (posix_memalign(out, ALIGNMENT, static_cast<size_t>(bytes)) != 0)
        *out = NULL;
    if (*out == NULL)
        return EMULATED_OUT_OF_MEMORY;
    memset(*out, 0xff, static_cast<size_t>(bytes));
    blocks()[static_cast<char *>(*out)] = bytes;
    held += bytes;
    return 0;
}

void gpu_driver_free(void *memory)
{
    emulated_finish_streams();
    std::lock_guard<std::mutex> lock(mutex);
    auto found = blocks().find(static_cast<char *>(memory));
    if (found == blocks().end())
        return;
    int64_t bytes = found->second;
    held -= bytes;
    blocks().erase(found);
    if (!GUARDED) {
        free(memory);
        return;
    }
    /* whole pages back to the system */
    uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + 0xfff) & ~uintptr_t{0xfff};
    uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + rounded(bytes)) & ~uintptr_t{0xfff};
    if (end > first + (1 << 20))
        madvise(reinterpret_cast<void *>(first), end - first, MADV_DONTNEED);
}

qllm_gpu_error gpu_driver_memory(int64_t *free_bytes)
{
    std::lock_guard<std::mutex> lock(mutex);
    *free_bytes = capacity() > held ? capacity() - held : 0;
    return 0;
}

int64_t emulated_capacity()
{
    return capacity();
}

qllm_gpu_error gpu_driver_alloc_host(int64_t bytes, void **out)
{
    *out = NULL;
    std::lock_guard<std::mutex> lock(mutex);
    if (fail_at > 0 && --fail_at == 0)
        return EMULATED_OUT_OF_MEMORY;
    if (posix_memalign(out, ALIGNMENT, static_cast<size_t>(bytes)) != 0) {
        *out = NULL;
        return EMULATED_OUT_OF_MEMORY;
    }
    memset(*out, 0xff, static_cast<size_t>(bytes));
    pinned()[static_cast<char *>(*out)] = bytes;
    return 0;
}

void gpu_free_host(void *memory)
{
    if (memory == NULL)
        return;
    emulated_finish_streams();
    std::lock_guard<std::mutex> lock(mutex);
    pinned().erase(static_cast<char *>(memory));
    free(memory);
}

static bool inside(const ranges &all, const void *pointer, int64_t bytes)
{
    std::lock_guard<std::mutex> lock(mutex);
    char *at = static_cast<char *>(const_cast<void *>(pointer));
    auto after = all.upper_bound(at);
    if (after == all.begin())
        return false;
    const auto &[start, size] = *--after;
    return at + bytes <= start + size;
}

bool emulated_on_device(const void *pointer, int64_t bytes)
{
    return inside(blocks(), pointer, bytes);
}

bool emulated_pinned(const void *pointer, int64_t bytes)
{
    return inside(pinned(), pointer, bytes);
}

/* For tests: let the n-th allocation from now fail (1 = the next), 0 = never. */
GPU_EXPORT void gpu_emulated_fail_at(int64_t n)
{
    std::lock_guard<std::mutex> lock(mutex);
    fail_at = n;
}
