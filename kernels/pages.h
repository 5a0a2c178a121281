/* Keys and values in device memory: sequences that fork.
 *
 * A page holds GPU_PAGE consecutive positions of one sequence, for all layers: page p of a sequence
 * those from GPU_PAGE * p on.  It is laid out as
 *     [layer][kv_head][keys, GPU_PAGE * head_dim | values (GPU_PAGE, head_dim)]
 * in float32 for compute="exact" and bf16 for "auto"; how keys lie is the business of each.  A sequence is a list of page numbers, and a
 * page is reference-counted: forks share all pages of what they fork from, and who writes into a
 * partly filled page that others hold too gets a copy first.  So a prefix is stored once, sums
 * over the positions of a page never depend on who shares it, and stored keys are never changed.
 *
 * Pages lie in slabs, allocated as they are needed; free pages are used again, and slabs without a
 * page in use are given back when memory is short.
 *
 * Threads: the pool has a lock of its own, so that a sequence can be destroyed at any time beside a
 * step of others.  Everything else is serialised by the decoder's lock.  Memory is handed on in the
 * order of the decoder's stream. */
#ifndef QLLM_KERNELS_PAGES_H
#define QLLM_KERNELS_PAGES_H

#include <pthread.h>

#include "runtime.h"

extern "C" {
#include "core/backend.h"
}

enum { GPU_PAGE = 64 };

typedef struct gpu_slab {
    uint8_t *memory; /* NULL: given back */
    int64_t used;    /* pages of it that are held */
} gpu_slab;

typedef struct gpu_pages {
    gpu_device *device;
    gpu_stream stream;
    pthread_mutex_t lock;     /* of everything below */
    int64_t page_bytes;
    int64_t slab_pages;       /* pages of a slab: number n lies in slab n / slab_pages */
    int64_t slabs, slab_capacity;
    gpu_slab *slab;           /* (slabs) */
    int32_t *references;      /* (slab_capacity * slab_pages) */
    int32_t *free_page;       /* stack of free page numbers, same size */
    int64_t free_pages, held; /* pages free and in use */
    void **base;              /* device: page number -> memory, for gpu_rows */
    int64_t base_capacity;
    bool moved;               /* base has a new address since somebody set this to false */
} gpu_pages;

struct qllm_sequence {
    qllm_decoder *decoder;
    gpu_pages *pool;
    int64_t length;      /* positions stored; read at any time, so by __atomic_load_n */
    int32_t *page;       /* numbers of the pages of positions [0, length + pending) */
    int64_t pages, capacity;
    /* Of the step in progress: */
    int64_t pending;     /* positions that it appends; 0 outside of a step */
    int64_t kept;        /* pages that stay if it is undone; all of them outside of a step */
    int32_t copied_from; /* what page[kept - 1] is a copy of, or -1 */
};

qllm_status gpu_pages_init(gpu_pages *pool, gpu_device *device, gpu_stream stream,
                           int64_t page_bytes, qllm_error *error);
void gpu_pages_clear(gpu_pages *pool);

/* Gives back slabs that hold no page in use; whether any was. */
bool gpu_pages_trim(gpu_pages *pool);

/* gpu_alloc, tried again without such slabs where memory is short. */
qllm_status gpu_alloc_trimmed(gpu_pages *pool, int64_t bytes, void **out, int memory,
                              const char *what, qllm_error *error);

/* Bytes of pages in use, shared ones once; of free pages and tables. */
void gpu_pages_bytes(gpu_pages *pool, int64_t *used, int64_t *spare);

qllm_status gpu_sequence_create(qllm_decoder *decoder, gpu_pages *pool, qllm_sequence **out,
                                qllm_error *error);
qllm_status gpu_sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error);
void gpu_sequence_destroy(qllm_sequence *sequence);
qllm_status gpu_sequence_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error);
int64_t gpu_sequence_length(const qllm_sequence *sequence);

/* Makes room for `count` >= 1 positions behind the stored ones, copying a shared page that they
 * begin in; on failure nothing has changed.  Then either commit or roll back. */
qllm_status gpu_sequence_reserve(qllm_sequence *sequence, int64_t count, qllm_error *error);
void gpu_sequence_commit(qllm_sequence *sequence);
void gpu_sequence_rollback(qllm_sequence *sequence);

#endif
