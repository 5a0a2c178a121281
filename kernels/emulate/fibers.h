/* The machine behind gpu_host.h: fibers, warps, and the worker that runs one block at a time on one
 * thread of the processor. */
#ifndef QLLM_KERNELS_EMULATE_FIBERS_H
#define QLLM_KERNELS_EMULATE_FIBERS_H

#include <vector>

#include "runtime.h"

/* The stack switch is x86-64 assembly on Linux; ucontext elsewhere is some ten times slower. */
#if !(defined(__x86_64__) && defined(__linux__)) && !defined(QLLM_EMULATE_UCONTEXT)
#define QLLM_EMULATE_UCONTEXT
#endif
#if defined(QLLM_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif

enum { MAX_BLOCK_THREADS = 1024, MAX_WARPS = MAX_BLOCK_THREADS / GPU_WARP };

struct fiber {
#if defined(QLLM_EMULATE_UCONTEXT)
    ucontext_t context;
#else
    void *stack_pointer;
#endif
    char *stack; /* NULL: the thread's own */
};

struct pending_copy {
    void *to;
    const void *from;
    int group;
};

struct lane {
    fiber fiber_;
    int index; /* threadIdx.x */
    const gpu_arrival *arrival; /* while it waits */
    uint64_t result;
    std::vector<pending_copy> copies;
    int group; /* of the copies that are issued now */
};

/* Sets of lanes; who is in none of them has ended. */
struct warp {
    lane *lanes;
    unsigned ready, at_warp, at_block;
};

struct worker {
    lane lanes[MAX_BLOCK_THREADS];
    warp warps[MAX_WARPS];
    fiber scheduler;
    lane *running;
    const gpu_emulated_kernel *kernel;
    unsigned char *shared;
    bool reversed;
    bool waited_for_previous;
    bool failed;
    char message[QLLM_ERROR_CAPACITY];
};

extern __thread worker *gpu_worker; /* of the block that this thread runs now */

inline warp *warp_of(worker *w, const lane *l)
{
    return &w->warps[l->index / GPU_WARP];
}

inline unsigned bit_of(const lane *l)
{
    return 1u << l->index % GPU_WARP;
}

/* Workers outlive launches, since their stacks cost more than a block. */
worker *worker_take();
void worker_give(worker *w);

/* Runs the block; false with a sentence in w->message.  w->kernel and w->shared are set. */
bool worker_run(worker *w, gpu_index block);

/* All lanes of the mask have come: their results.  warp_ops.cc */
void warp_perform(const warp *p, const gpu_arrival &arrival);

#endif
