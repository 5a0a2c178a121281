/* The processors that this process may use, and where its threads run.  A logical processor is what
 * the system schedules on; those that share a physical core share its arithmetic units, so that a
 * second one adds little to a kernel that keeps them busy. */
#ifndef QLLM_CPU_PROCESSORS_H
#define QLLM_CPU_PROCESSORS_H

#include <pthread.h>
#include <stdint.h>

typedef struct qllm_processors {
    int logical; /* in the affinity mask of the calling thread; at least 1 */
    int cores;   /* physical cores that these belong to; at least 1 */
    int quota;   /* processors' worth of time that the control groups allow, rounded up; 0: all */
} qllm_processors;

void qllm_processors_get(qllm_processors *out);

/* The same with "/proc" and "/sys" looked for below `root`, and nothing remembered. */
void qllm_processors_read(const char *root, qllm_processors *out);

/* The most threads that can run at once, and the best number for arithmetic: one per core. */
int qllm_processors_usable(const qllm_processors *processors);
int qllm_processors_default(const qllm_processors *processors);

/* For tests: take the machine for one of n cores and leave threads where the system puts them;
 * 0 = the real machine.  Process-wide, for pools that are created from now on. */
void qllm_processors_pretend(int n);

/* An affinity mask; count 0 where the system has none, or while tests pretend. */
typedef struct qllm_affinity {
    int count;
    uint64_t bits[16];
} qllm_affinity;

/* The calling thread's mask and physical core (-1: unknown). */
void qllm_affinity_get(qllm_affinity *out);
int qllm_processors_core(void);

/* Lets `thread` run on every processor of the mask but those of one core; where that leaves none,
 * on every one. */
void qllm_affinity_keep_off(pthread_t thread, const qllm_affinity *mask, int core);

#endif
