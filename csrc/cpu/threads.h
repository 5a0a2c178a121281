/* A small pool of threads.  Each has its part of the work and then helps the others; the caller
 * works too, does alone what nobody came for, and waits only for threads in the middle of a chunk:
 * on a busy machine a thread that gets no processor holds up nobody.  A pool of one thread starts
 * none.  Workers stay off the core of the caller.  Safe to use after fork (a child starts its own
 * threads at first use), next to other libraries' pools, and by several Python threads at once, on
 * one pool or on several: their jobs share the processors. */
#ifndef QLLM_CPU_THREADS_H
#define QLLM_CPU_THREADS_H

#include <stdint.h>

#include "core/status.h"

typedef struct qllm_threads qllm_threads;

/* The most threads that this process can have running, by affinity mask and control group, and how
 * many it has unless told otherwise: one per physical core of these.  At least 1. */
int qllm_threads_available(void);
int qllm_threads_default(void);

/* n threads in all, the caller included; 0 means QLLM_THREADS from the environment or, without it,
 * the default.  More than available is clamped. */
qllm_status qllm_threads_create(int n, qllm_threads **out, qllm_error *error);

/* The threads of another library in this process, by functions of its OpenMP. */
typedef struct qllm_team {
    /* GOMP_parallel of GNU's OpenMP: calls body(data) in each of `threads` threads, the caller one
     * of them, and returns when all have; flags 0 */
    void (*parallel)(void (*body)(void *data), void *data, unsigned threads, unsigned flags);
    int (*max_threads)(void); /* omp_get_max_threads: how many that library would take now */
    int (*thread_num)(void);  /* omp_get_thread_num: within body, from 0 */
} qllm_team;

/* A pool of n >= 1 threads that has none of its own: its jobs run in those of the team, which are
 * all called each time, as the other library calls them, since a team of another size would be made
 * anew.  Two pools of which each spins for its next job hold each other up, where the jobs of two
 * libraries alternate.  In a child of fork, where the team is gone, the caller works alone. */
qllm_status qllm_threads_create_in(const qllm_team *team, int n, qllm_threads **out,
                                   qllm_error *error);
const qllm_team *qllm_threads_team(const qllm_threads *threads); /* NULL: it has its own */

/* The number of threads that qllm_threads_create(n) would have. */
qllm_status qllm_threads_resolve(int n, int *count, qllm_error *error);

void qllm_threads_destroy(qllm_threads *threads);
int qllm_threads_count(const qllm_threads *threads);

/* Calls work(context, begin, end, thread) so that [0, n) is covered once, and returns when all is
 * done.  [0, n) falls into one contiguous part per thread and each part into a few chunks, one call
 * each; a chunk may be done by any thread (0 .. count - 1, never two at a time with one number).
 * `work` must give results that do not depend on the split. */
void qllm_threads_run(qllm_threads *threads, int64_t n,
                      void (*work)(void *context, int64_t begin, int64_t end, int thread),
                      void *context);

#endif
