/* The one place that allocates.  Memory is aligned to 64 bytes (a cache line, a zmm register). */
#ifndef QLLM_CORE_ALLOC_H
#define QLLM_CORE_ALLOC_H

#include <stdint.h>

#include "core/status.h"

enum { QLLM_ALIGNMENT = 64 };

/* Allocates count * size bytes, zeroed, into *out.  A count of 0 gives a valid pointer to no
 * elements.  `what` names the thing for the error sentence ("the packed weight").  On failure
 * *out is NULL. */
qllm_status qllm_alloc(void **out, int64_t count, int64_t size, const char *what,
                       qllm_error *error);

/* The same for weights and other large memory, but with contents that are not set, so that the
 * threads which fill the memory are the first to touch it.  From QLLM_LARGE_BYTES on it is aligned
 * to 2 MiB and, where the system offers it, on huge pages, which makes streaming through it some 5
 * to 10 % faster. */
enum { QLLM_LARGE_BYTES = 2 << 20 };
qllm_status qllm_alloc_large(void **out, int64_t count, int64_t size, const char *what,
                             qllm_error *error);

/* The same with contents that are not set: for memory that is written before it is read, and of
 * which a call may use little. */
qllm_status qllm_alloc_scratch(void **out, int64_t count, int64_t size, const char *what,
                               qllm_error *error);

/* Frees what the functions above gave; NULL is allowed. */
void qllm_free(void *memory);

/* For tests: let the n-th allocation from now fail (1 = the next), 0 = never.  Process-wide. */
void qllm_alloc_fail_at(int64_t n);

#endif
