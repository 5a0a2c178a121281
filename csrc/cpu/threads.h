/* A small pool of threads with a static split of the work.  The caller works too: a pool of one
 * thread starts none.  Safe to use after fork (a child starts its own threads at first use), by two
 * Python threads at once (they take turns) and next to other libraries' pools. */
#ifndef QLLM_CPU_THREADS_H
#define QLLM_CPU_THREADS_H

#include <stdint.h>

#include "core/status.h"

typedef struct qllm_threads qllm_threads;

/* Processors this process may use: affinity mask and cgroup quota; at least 1. */
int qllm_threads_available(void);

/* n threads in all, the caller included; 0 means QLLM_THREADS from the environment or, without it,
 * all available ones. More than available is clamped. */
qllm_status qllm_threads_create(int n, qllm_threads **out, qllm_error *error);

/* The number of threads that qllm_threads_create(n) would have. */
qllm_status qllm_threads_resolve(int n, int *count, qllm_error *error);

void qllm_threads_destroy(qllm_threads *threads);
int qllm_threads_count(const qllm_threads *threads);

/* Calls work(context, begin, end, thread) so that [0, n) is covered once, in one contiguous part
 * per thread (thread in 0 .. count - 1), and returns when all parts are done.  `work` must give
 * results that do not depend on the split. */
void qllm_threads_run(qllm_threads *threads, int64_t n,
                      void (*work)(void *context, int64_t begin, int64_t end, int thread),
                      void *context);

#endif
