#include "core/alloc.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/checked.h"

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

qllm_status qllm_alloc(void **out, int64_t count, int64_t size, const char *what,
                       qllm_error *error)
{
    int64_t bytes;
    *out = NULL;
    if (!qllm_checked_mul(count, size, &bytes) ||
        !qllm_checked_round_up(bytes > 0 ? bytes : 1, QLLM_ALIGNMENT, &bytes) ||
        (uint64_t)bytes > SIZE_MAX)
        return qllm_fail(error, QLLM_MEMORY,
                         "%s: %" PRId64 " elements of %" PRId64 " bytes are more than can be "
                         "addressed", what, count, size);
    void *memory = injected_failure() ? NULL : aligned_alloc(QLLM_ALIGNMENT, (size_t)bytes);
    if (memory == NULL)
        return qllm_fail(error, QLLM_MEMORY, "%s: could not allocate %" PRId64 " bytes; "
                         "use a smaller model, batch or format", what, bytes);
    memset(memory, 0, (size_t)bytes);
    *out = memory;
    return QLLM_OK;
}

void qllm_free(void *memory)
{
    free(memory);
}
