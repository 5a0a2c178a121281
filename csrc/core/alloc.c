#if defined(__linux__)
#define _DEFAULT_SOURCE /* madvise */
#endif
#define _POSIX_C_SOURCE 200809L /* posix_memalign */
#include "core/alloc.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/checked.h"

enum { HUGE_PAGE = 2 << 20 };

static _Atomic int64_t fail_at = 0;

void qllm_alloc_fail_at(int64_t n)
{
    atomic_store(&fail_at, n);
}

static int injected_failure(void)
{
    if (atomic_load(&fail_at) <= 0)
        return 0;
    return atomic_fetch_sub(&fail_at, 1) == 1;
}

static void *aligned(int64_t alignment, int64_t bytes)
{
    void *memory = NULL;
    if (injected_failure() || posix_memalign(&memory, (size_t)alignment, (size_t)bytes) != 0)
        return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (alignment >= HUGE_PAGE) /* a wish: without huge pages the memory serves as well */
        madvise(memory, (size_t)bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

static qllm_status allocate(void **out, int64_t count, int64_t size, bool large, bool zeroed,
                            const char *what, qllm_error *error)
{
    int64_t bytes;
    *out = NULL;
    if (!qllm_checked_mul(count, size, &bytes) ||
        !qllm_checked_round_up(bytes > 0 ? bytes : 1, QLLM_ALIGNMENT, &bytes) ||
        (uint64_t)bytes > SIZE_MAX)
        return qllm_fail(error, QLLM_MEMORY,
                         "%s: %" PRId64 " elements of %" PRId64 " bytes are more than can be "
                         "addressed", what, count, size);
    void *memory = aligned(large && bytes >= QLLM_LARGE_BYTES ? HUGE_PAGE : QLLM_ALIGNMENT, bytes);
    if (memory == NULL)
        return qllm_fail(error, QLLM_MEMORY, "%s: could not allocate %" PRId64 " bytes; "
                         "use a smaller model, batch or format", what, bytes);
    if (zeroed)
        memset(memory, 0, (size_t)bytes);
    *out = memory;
    return QLLM_OK;
}

qllm_status qllm_alloc(void **out, int64_t count, int64_t size, const char *what,
                       qllm_error *error)
{
    return allocate(out, count, size, false, true, what, error);
}

qllm_status qllm_alloc_large(void **out, int64_t count, int64_t size, const char *what,
                             qllm_error *error)
{
    return allocate(out, count, size, true, false, what, error);
}

qllm_status qllm_alloc_scratch(void **out, int64_t count, int64_t size, const char *what,
                               qllm_error *error)
{
    return allocate(out, count, size, false, false, what, error);
}

void qllm_free(void *memory)
{
    free(memory);
}
