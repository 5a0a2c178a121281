#include "pages.h"

#include <inttypes.h>
#include <string.h>

extern "C" {
#include "core/alloc.h"
#include "decoder/checks.h"
}

enum { SLAB_BYTES = 16 << 20, SLAB_PAGES_MAX = 64 };

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

qllm_status gpu_pages_init(gpu_pages *pool, gpu_device *device, gpu_stream stream,
                           int64_t page_bytes, qllm_error *error)
{
    memset(pool, 0, sizeof *pool);
    if (pthread_mutex_init(&pool->lock, NULL) != 0)
        return qllm_fail(error, QLLM_MEMORY, "a decoder: the system has no lock left");
    pool->device = device;
    pool->stream = stream;
    pool->page_bytes = page_bytes;
    pool->slab_pages = clamp(SLAB_BYTES / page_bytes, 1, SLAB_PAGES_MAX);
    return QLLM_OK;
}

void gpu_pages_clear(gpu_pages *pool)
{
    if (pool->device == NULL)
        return;
    for (int64_t i = 0; i < pool->slabs; i++)
        gpu_free(pool->slab[i].memory);
    gpu_free(pool->base);
    qllm_free(pool->slab);
    qllm_free(pool->references);
    qllm_free(pool->free_page);
    pthread_mutex_destroy(&pool->lock);
    memset(pool, 0, sizeof *pool);
}

/* slabs ---------------------------------------------------------------------------------------- */

/* Copies an array to a new one of `capacity` elements; the old one is freed. */
static qllm_status grow_array(void **array, int64_t count, int64_t capacity, int64_t size,
                              qllm_error *error)
{
    void *fresh;
    qllm_status status = qllm_alloc(&fresh, capacity, size, "the table of pages", error);
    if (status != QLLM_OK)
        return status;
    if (count > 0)
        memcpy(fresh, *array, (size_t)(count * size));
    qllm_free(*array);
    *array = fresh;
    return QLLM_OK;
}

/* Room for one more slab in the tables of the host. */
static qllm_status grow_tables(gpu_pages *pool, qllm_error *error)
{
    int64_t pages = pool->slab_pages, from = pool->slab_capacity, to = from > 0 ? 2 * from : 8;
    if (pool->slabs < from)
        return QLLM_OK;
    if (to * pages > INT32_MAX)
        return qllm_fail(error, QLLM_MEMORY, "keys and values: %" PRId64 " pages are more than can "
                         "be numbered", to * pages);
    qllm_status status = grow_array((void **)&pool->slab, from, to, sizeof *pool->slab, error);
    if (status == QLLM_OK)
        status = grow_array((void **)&pool->references, from * pages, to * pages,
                            sizeof *pool->references, error);
    if (status == QLLM_OK)
        status = grow_array((void **)&pool->free_page, from * pages, to * pages,
                            sizeof *pool->free_page, error);
    if (status == QLLM_OK)
        pool->slab_capacity = to;
    return status;
}

static uint8_t *page_memory(const gpu_pages *pool, int32_t page)
{
    return pool->slab[page / pool->slab_pages].memory + page % pool->slab_pages * pool->page_bytes;
}

/* Tells the device where the pages of slabs [begin, end) lie. */
static qllm_status upload_base(gpu_pages *pool, int64_t begin, int64_t end, qllm_error *error)
{
    qllm_status status = QLLM_OK;
    for (int64_t s = begin; status == QLLM_OK && s < end; s++) {
        void *memory[SLAB_PAGES_MAX];
        int64_t first = s * pool->slab_pages;
        for (int64_t i = 0; i < pool->slab_pages; i++)
            memory[i] = page_memory(pool, (int32_t)(first + i));
        status = gpu_check(gpu_copy_in(pool->base + first, memory,
                                       pool->slab_pages * (int64_t)sizeof(void *), pool->stream),
                           "copying the table of pages", error);
    }
    return status;
}

/* The same for a slab that is new, after making room for it. */
static qllm_status enter_base(gpu_pages *pool, int64_t slab, qllm_error *error)
{
    int64_t capacity = pool->slab_capacity * pool->slab_pages;
    void *fresh;
    if (capacity <= pool->base_capacity)
        return upload_base(pool, slab, slab + 1, error);
    qllm_status status = gpu_alloc(pool->device, capacity * (int64_t)sizeof(void *), &fresh, GPU_SCRATCH,
                                   "the table of pages", error);
    if (status != QLLM_OK)
        return status;
    gpu_free(pool->base);
    pool->base = (void **)fresh;
    pool->base_capacity = capacity;
    pool->moved = true;
    return upload_base(pool, 0, pool->slabs, error);
}

/* One more slab of free pages, in the place of one that was given back or behind the last. */
static qllm_status add_slab(gpu_pages *pool, qllm_error *error)
{
    int64_t index = 0;
    while (index < pool->slabs && pool->slab[index].memory != NULL)
        index++;
    void *memory;
    qllm_status status = index < pool->slabs ? QLLM_OK : grow_tables(pool, error);
    if (status == QLLM_OK)
        status = gpu_alloc(pool->device, pool->slab_pages * pool->page_bytes, &memory,
                           GPU_KV_CACHE, "keys and values of a sequence", error);
    if (status != QLLM_OK)
        return status;
    int64_t slabs = pool->slabs;
    pool->slab[index].memory = (uint8_t *)memory;
    pool->slab[index].used = 0;
    pool->slabs = index < slabs ? slabs : slabs + 1;
    status = enter_base(pool, index, error);
    if (status != QLLM_OK) {
        pool->slab[index].memory = NULL;
        gpu_free(memory);
        return status;
    }
    for (int64_t i = pool->slab_pages; i-- > 0;)
        pool->free_page[pool->free_pages++] = (int32_t)(index * pool->slab_pages + i);
    return QLLM_OK;
}

bool gpu_pages_trim(gpu_pages *pool)
{
    bool any = false;
    pthread_mutex_lock(&pool->lock);
    int64_t kept = 0;
    for (int64_t i = 0; i < pool->free_pages; i++) {
        int32_t page = pool->free_page[i];
        if (pool->slab[page / pool->slab_pages].used > 0)
            pool->free_page[kept++] = page;
    }
    pool->free_pages = kept;
    for (int64_t i = 0; i < pool->slabs; i++) {
        if (pool->slab[i].memory == NULL || pool->slab[i].used > 0)
            continue;
        gpu_free(pool->slab[i].memory);
        pool->slab[i].memory = NULL;
        any = true;
    }
    pthread_mutex_unlock(&pool->lock);
    return any;
}

qllm_status gpu_alloc_trimmed(gpu_pages *pool, int64_t bytes, void **out, int memory,
                              const char *what, qllm_error *error)
{
    qllm_status status = gpu_alloc(pool->device, bytes, out, memory, what, error);
    if (status == QLLM_MEMORY && gpu_pages_trim(pool))
        status = gpu_alloc(pool->device, bytes, out, memory, what, error);
    return status;
}

void gpu_pages_bytes(gpu_pages *pool, int64_t *used, int64_t *spare)
{
    pthread_mutex_lock(&pool->lock);
    *used = pool->held * pool->page_bytes;
    *spare = pool->free_pages * pool->page_bytes + pool->base_capacity * (int64_t)sizeof(void *);
    pthread_mutex_unlock(&pool->lock);
}

/* pages; the lock is held ---------------------------------------------------------------------- */

static qllm_status take_page(gpu_pages *pool, int32_t *page, qllm_error *error)
{
    qllm_status status = pool->free_pages > 0 ? QLLM_OK : add_slab(pool, error);
    if (status != QLLM_OK)
        return status;
    *page = pool->free_page[--pool->free_pages];
    pool->references[*page] = 1;
    pool->slab[*page / pool->slab_pages].used++;
    pool->held++;
    return QLLM_OK;
}

static void release_page(gpu_pages *pool, int32_t page)
{
    if (--pool->references[page] > 0)
        return;
    pool->slab[page / pool->slab_pages].used--;
    pool->free_page[pool->free_pages++] = page;
    pool->held--;
}

static void release_from(qllm_sequence *sequence, int64_t first)
{
    while (sequence->pages > first)
        release_page(sequence->pool, sequence->page[--sequence->pages]);
}

static int64_t pages_of(int64_t positions)
{
    return (positions + GPU_PAGE - 1) / GPU_PAGE;
}

static qllm_status grow_list(qllm_sequence *sequence, int64_t pages, qllm_error *error)
{
    int64_t capacity = 2 * sequence->capacity > 8 ? 2 * sequence->capacity : 8;
    if (pages <= sequence->capacity)
        return QLLM_OK;
    capacity = capacity > pages ? capacity : pages;
    qllm_status status = grow_array((void **)&sequence->page, sequence->pages, capacity,
                                    sizeof *sequence->page, error);
    if (status == QLLM_OK)
        sequence->capacity = capacity;
    return status;
}

/* Replaces the last page, which others hold too, by a copy; its reference is kept until it is known
 * that the step stays. */
static qllm_status copy_last(qllm_sequence *sequence, qllm_error *error)
{
    gpu_pages *pool = sequence->pool;
    int32_t from = sequence->page[sequence->pages - 1], to;
    qllm_status status = take_page(pool, &to, error);
    if (status != QLLM_OK)
        return status;
    status = gpu_check(gpu_copy_within(page_memory(pool, to), page_memory(pool, from),
                                       pool->page_bytes, pool->stream),
                       "copying keys and values", error);
    if (status != QLLM_OK) {
        release_page(pool, to);
        return status;
    }
    sequence->page[sequence->pages - 1] = to;
    sequence->copied_from = from;
    return QLLM_OK;
}

static void undo(qllm_sequence *sequence)
{
    release_from(sequence, sequence->kept);
    if (sequence->copied_from >= 0) {
        release_page(sequence->pool, sequence->page[sequence->pages - 1]);
        sequence->page[sequence->pages - 1] = sequence->copied_from;
    }
    sequence->copied_from = -1;
    sequence->pending = 0;
}

/* sequences ------------------------------------------------------------------------------------ */

qllm_status gpu_sequence_create(qllm_decoder *decoder, gpu_pages *pool, qllm_sequence **out,
                                qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_sequence), "a sequence", error);
    if (status != QLLM_OK)
        return status;
    *out = (qllm_sequence *)memory;
    (*out)->decoder = decoder;
    (*out)->pool = pool;
    (*out)->copied_from = -1;
    return QLLM_OK;
}

int64_t gpu_sequence_length(const qllm_sequence *sequence)
{
    return __atomic_load_n(&sequence->length, __ATOMIC_SEQ_CST);
}

static void set_length(qllm_sequence *sequence, int64_t length)
{
    __atomic_store_n(&sequence->length, length, __ATOMIC_SEQ_CST);
}

qllm_status gpu_sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error)
{
    gpu_pages *pool = from->pool;
    qllm_sequence *fork;
    *out = NULL;
    qllm_status status = gpu_sequence_create(from->decoder, pool, &fork, error);
    if (status == QLLM_OK)
        status = grow_list(fork, from->pages, error);
    if (status != QLLM_OK) {
        gpu_sequence_destroy(fork);
        return status;
    }
    pthread_mutex_lock(&pool->lock);
    for (; fork->pages < from->pages; fork->pages++) {
        fork->page[fork->pages] = from->page[fork->pages];
        pool->references[fork->page[fork->pages]]++;
    }
    pthread_mutex_unlock(&pool->lock);
    fork->kept = fork->pages;
    set_length(fork, gpu_sequence_length(from));
    *out = fork;
    return QLLM_OK;
}

void gpu_sequence_destroy(qllm_sequence *sequence)
{
    if (sequence == NULL)
        return;
    pthread_mutex_lock(&sequence->pool->lock);
    release_from(sequence, 0);
    pthread_mutex_unlock(&sequence->pool->lock);
    qllm_free(sequence->page);
    qllm_free(sequence);
}

qllm_status gpu_sequence_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error)
{
    qllm_status status = qllm_check_truncation(gpu_sequence_length(sequence), length, error);
    if (status != QLLM_OK)
        return status;
    pthread_mutex_lock(&sequence->pool->lock);
    release_from(sequence, pages_of(length));
    sequence->kept = sequence->pages;
    pthread_mutex_unlock(&sequence->pool->lock);
    set_length(sequence, length);
    return QLLM_OK;
}

qllm_status gpu_sequence_reserve(qllm_sequence *sequence, int64_t count, qllm_error *error)
{
    gpu_pages *pool = sequence->pool;
    int64_t length = gpu_sequence_length(sequence), need = pages_of(length + count);
    qllm_status status = grow_list(sequence, need, error);
    pthread_mutex_lock(&pool->lock);
    if (status == QLLM_OK && length % GPU_PAGE != 0 &&
        pool->references[sequence->page[sequence->pages - 1]] > 1)
        status = copy_last(sequence, error);
    while (status == QLLM_OK && sequence->pages < need) {
        status = take_page(pool, &sequence->page[sequence->pages], error);
        sequence->pages += status == QLLM_OK;
    }
    if (status == QLLM_OK)
        sequence->pending = count;
    else
        undo(sequence);
    pthread_mutex_unlock(&pool->lock);
    return status;
}

void gpu_sequence_commit(qllm_sequence *sequence)
{
    if (sequence->copied_from >= 0) {
        pthread_mutex_lock(&sequence->pool->lock);
        release_page(sequence->pool, sequence->copied_from);
        pthread_mutex_unlock(&sequence->pool->lock);
    }
    set_length(sequence, gpu_sequence_length(sequence) + sequence->pending);
    sequence->kept = sequence->pages;
    sequence->copied_from = -1;
    sequence->pending = 0;
}

void gpu_sequence_rollback(qllm_sequence *sequence)
{
    pthread_mutex_lock(&sequence->pool->lock);
    undo(sequence);
    pthread_mutex_unlock(&sequence->pool->lock);
}
