#include "decoder/kv_cache.h"

#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "decoder/checks.h"

void qllm_kv_cache_init(qllm_kv_cache *cache, int64_t layers, int64_t kv_heads, int64_t head_dim)
{
    cache->layers = layers;
    cache->kv_heads = kv_heads;
    cache->head_dim = head_dim;
    atomic_init(&cache->bytes, 0);
}

/* Floats of a block: layers * kv_heads * 2 * capacity * head_dim. */
static bool block_floats(const qllm_kv_cache *cache, int64_t capacity, int64_t *floats)
{
    int64_t n;
    return qllm_checked_mul(cache->layers, cache->kv_heads, &n) &&
           qllm_checked_mul(n, 2 * cache->head_dim, &n) && qllm_checked_mul(n, capacity, floats);
}

/* Drops one reference; what nobody holds any more is freed, up the path. */
static void release(qllm_kv_cache *cache, qllm_kv_block *block)
{
    while (block != NULL && atomic_fetch_sub(&block->references, 1) == 1) {
        qllm_kv_block *parent = block->parent;
        int64_t floats = 0;
        block_floats(cache, block->capacity, &floats);
        atomic_fetch_sub(&cache->bytes, floats * (int64_t)sizeof(float));
        qllm_free(block->data);
        qllm_free(block);
        block = parent;
    }
}

/* A block of one reference behind `parent`, whose reference it does not take. */
static qllm_status create_block(qllm_kv_cache *cache, qllm_kv_block *parent, int64_t start,
                                int64_t capacity, qllm_kv_block **out, qllm_error *error)
{
    static const char what[] = "keys and values of a sequence";
    void *memory, *data;
    int64_t floats;
    if (!block_floats(cache, capacity, &floats))
        return qllm_fail(error, QLLM_MEMORY, "%s: %" PRId64 " positions are more than can be "
                         "addressed", what, capacity);
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_kv_block), what, error);
    if (status != QLLM_OK)
        return status;
    status = qllm_alloc(&data, floats, sizeof(float), what, error);
    if (status != QLLM_OK) {
        qllm_free(memory);
        return status;
    }
    qllm_kv_block *block = memory;
    block->parent = parent;
    block->start = start;
    block->capacity = capacity;
    block->data = data;
    atomic_init(&block->references, 1);
    atomic_fetch_add(&cache->bytes, floats * (int64_t)sizeof(float));
    *out = block;
    return QLLM_OK;
}

qllm_status qllm_kv_sequence_create(qllm_decoder *decoder, qllm_kv_cache *cache,
                                    qllm_sequence **out, qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_sequence), "a sequence", error);
    if (status != QLLM_OK)
        return status;
    *out = memory;
    (*out)->decoder = decoder;
    (*out)->cache = cache;
    atomic_init(&(*out)->length, 0);
    return QLLM_OK;
}

qllm_status qllm_kv_sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error)
{
    qllm_status status = qllm_kv_sequence_create(from->decoder, from->cache, out, error);
    if (status != QLLM_OK)
        return status;
    if (from->tail != NULL)
        atomic_fetch_add(&from->tail->references, 1);
    (*out)->tail = (*out)->pending_tail = from->tail;
    atomic_store(&(*out)->length, atomic_load(&from->length));
    return QLLM_OK;
}

void qllm_kv_sequence_destroy(qllm_sequence *sequence)
{
    if (sequence == NULL)
        return;
    release(sequence->cache, sequence->tail);
    qllm_free(sequence);
}

qllm_status qllm_kv_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error)
{
    qllm_status status = qllm_check_truncation(atomic_load(&sequence->length), length, error);
    if (status != QLLM_OK)
        return status;
    qllm_kv_block *tail = sequence->tail;
    while (tail != NULL && tail->start >= length)
        tail = tail->parent;
    if (tail != sequence->tail) {
        if (tail != NULL)
            atomic_fetch_add(&tail->references, 1);
        release(sequence->cache, sequence->tail);
    }
    sequence->tail = sequence->pending_tail = tail;
    atomic_store(&sequence->length, length);
    return QLLM_OK;
}

qllm_status qllm_kv_reserve(qllm_sequence *sequence, int64_t count, qllm_error *error)
{
    qllm_kv_block *tail = sequence->tail;
    int64_t at = atomic_load(&sequence->length), left = count, last_capacity = 0;
    bool own = tail != NULL && atomic_load(&tail->references) == 1;
    if (own) {
        int64_t room = tail->start + tail->capacity - at;
        last_capacity = tail->capacity;
        at += left < room ? left : room;
        left -= left < room ? left : room;
    }
    sequence->pending_tail = tail;
    while (left > 0) {
        int64_t capacity = left > 2 * last_capacity ? left : 2 * last_capacity;
        capacity = capacity < QLLM_KV_BLOCK_MAX ? capacity : QLLM_KV_BLOCK_MAX;
        capacity = (capacity + QLLM_KV_PANEL - 1) / QLLM_KV_PANEL * QLLM_KV_PANEL;
        qllm_kv_block *block = NULL;
        qllm_status status = create_block(sequence->cache, sequence->pending_tail, at, capacity,
                                          &block, error);
        if (status != QLLM_OK) {
            qllm_kv_rollback(sequence);
            return status;
        }
        sequence->pending_tail = block;
        at += left < capacity ? left : capacity;
        left -= left < capacity ? left : capacity;
        last_capacity = capacity;
    }
    sequence->pending = count;
    return QLLM_OK;
}

void qllm_kv_commit(qllm_sequence *sequence)
{
    /* The first new block has taken over the sequence's reference to the old tail. */
    sequence->tail = sequence->pending_tail;
    atomic_fetch_add(&sequence->length, sequence->pending);
    sequence->pending = 0;
}

void qllm_kv_rollback(qllm_sequence *sequence)
{
    while (sequence->pending_tail != sequence->tail) {
        qllm_kv_block *block = sequence->pending_tail;
        sequence->pending_tail = block->parent;
        block->parent = NULL;
        release(sequence->cache, block);
    }
    sequence->pending = 0;
}

int64_t qllm_kv_path_length(const qllm_sequence *sequence)
{
    int64_t count = 0;
    for (const qllm_kv_block *block = sequence->pending_tail; block != NULL; block = block->parent)
        count++;
    return count;
}

int64_t qllm_kv_path(const qllm_sequence *sequence, int64_t end, const qllm_kv_block **out)
{
    const qllm_kv_block *last = sequence->pending_tail;
    while (last != NULL && last->start >= end)
        last = last->parent;
    int64_t count = 0;
    for (const qllm_kv_block *block = last; block != NULL; block = block->parent)
        count++;
    int64_t at = count;
    for (const qllm_kv_block *block = last; block != NULL; block = block->parent)
        out[--at] = block;
    return count;
}

void qllm_kv_store(const qllm_kv_cache *cache, const qllm_kv_block *block, int64_t layer,
                   int64_t kv_head, int64_t position, const float *key, const float *value)
{
    int64_t head_dim = cache->head_dim;
    int64_t i = position - block->start;
    float *keys = qllm_kv_keys(cache, block, layer, kv_head) +
                  i / QLLM_KV_PANEL * head_dim * QLLM_KV_PANEL + i % QLLM_KV_PANEL;
    for (int64_t d = 0; d < head_dim; d++)
        keys[d * QLLM_KV_PANEL] = key[d];
    memcpy(qllm_kv_values(cache, block, layer, kv_head) + i * head_dim, value,
           (size_t)head_dim * sizeof(float));
}
