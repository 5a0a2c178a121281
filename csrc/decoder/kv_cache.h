/* Keys and values of sequences that fork.  A sequence is a path from a leaf to the root of a tree
 * of blocks; every block holds some consecutive positions, for all layers, and is
 * reference-counted.
 *
 * A block that one sequence alone holds is filled in place; while it is shared nobody writes to it,
 * and a sequence that goes on hangs a block of its own behind the last position that it sees.  So a
 * prefix shared by many forks is stored once, and stored keys never move.  Blocks of one sequence
 * grow from 16 to 256 positions, doubling.
 *
 * Threads: reference counts and byte counts are atomic, so a sequence may be destroyed at any time
 * beside a step of other sequences.  Everything else is serialised by the decoder's lock. */
#ifndef QLLM_DECODER_KV_CACHE_H
#define QLLM_DECODER_KV_CACHE_H

#include <stdatomic.h>

#include "core/backend.h"
#include "cpu/cpu_ops.h"

enum { QLLM_KV_BLOCK_MIN = 16, QLLM_KV_BLOCK_MAX = 256 };

/* Sizes, and the bytes of all blocks alive. */
typedef struct qllm_kv_cache {
    int64_t layers, kv_heads, head_dim;
    _Atomic int64_t bytes; /* of keys and values */
} qllm_kv_cache;

typedef struct qllm_kv_block {
    struct qllm_kv_block *parent; /* held by this block; positions before `start` */
    int64_t start, capacity;      /* positions [start, start + capacity); capacity % 16 == 0 */
    _Atomic int64_t references;   /* sequences that end here, and blocks that hang here */
    float *data; /* per layer and key-value head: capacity / 16 panels of keys, then values */
} qllm_kv_block;

struct qllm_sequence {
    qllm_decoder *decoder;
    qllm_kv_cache *cache;
    qllm_kv_block *tail;    /* holds position length - 1; NULL when nothing is stored */
    _Atomic int64_t length; /* positions stored */
    /* Of the step in progress: */
    int64_t pending;        /* positions that it appends; 0 outside of a step */
    qllm_kv_block *pending_tail; /* the path with room for them; equals tail outside of a step */
};

void qllm_kv_cache_init(qllm_kv_cache *cache, int64_t layers, int64_t kv_heads, int64_t head_dim);

qllm_status qllm_kv_sequence_create(qllm_decoder *decoder, qllm_kv_cache *cache,
                                    qllm_sequence **out, qllm_error *error);
qllm_status qllm_kv_sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error);
void qllm_kv_sequence_destroy(qllm_sequence *sequence);

/* Forgets positions >= length; an error when fewer are stored. */
qllm_status qllm_kv_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error);

/* Makes room for `count` >= 1 positions behind the stored ones; on failure nothing has changed.
 * Then either commit or roll back. */
qllm_status qllm_kv_reserve(qllm_sequence *sequence, int64_t count, qllm_error *error);
void qllm_kv_commit(qllm_sequence *sequence);
void qllm_kv_rollback(qllm_sequence *sequence);

/* The path of a sequence, pending positions included.  The number of its blocks; and those that
 * hold positions below `end` into out, in ascending order, with their number as the result. */
int64_t qllm_kv_path_length(const qllm_sequence *sequence);
int64_t qllm_kv_path(const qllm_sequence *sequence, int64_t end, const qllm_kv_block **out);

/* Keys and values of one layer and key-value head in a block. */
static inline float *qllm_kv_keys(const qllm_kv_cache *cache, const qllm_kv_block *block,
                                  int64_t layer, int64_t kv_head)
{
    return block->data +
           (layer * cache->kv_heads + kv_head) * 2 * block->capacity * cache->head_dim;
}

static inline float *qllm_kv_values(const qllm_kv_cache *cache, const qllm_kv_block *block,
                                    int64_t layer, int64_t kv_head)
{
    return qllm_kv_keys(cache, block, layer, kv_head) + block->capacity * cache->head_dim;
}

/* Writes key and value (head_dim) of `position`, which the block holds. */
void qllm_kv_store(const qllm_kv_cache *cache, const qllm_kv_block *block, int64_t layer,
                   int64_t kv_head, int64_t position, const float *key, const float *value);

#endif
