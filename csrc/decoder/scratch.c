#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "decoder/step.h"

static const char what[] = "buffers of a step";

static void free_rows(qllm_scratch *s)
{
    void *const buffers[] = {s->row,     s->x,   s->normed,   s->normed2, s->branch,
                             s->branch2, s->qkv, s->attended, s->gate,    s->up, s->linear};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        qllm_free(buffers[i]);
}

static void free_attention(qllm_scratch *s)
{
    qllm_free((void *)s->paths);
    qllm_free(s->spans);
    qllm_free(s->scores);
    qllm_free(s->tasks);
}

void qllm_scratch_clear(qllm_scratch *scratch)
{
    free_rows(scratch);
    free_attention(scratch);
    memset(scratch, 0, sizeof *scratch);
}

/* Allocates count * size bytes into *out and counts them. */
static qllm_status take(void **out, int64_t count, int64_t size, int64_t *bytes, qllm_error *error)
{
    qllm_status status = qllm_alloc(out, count, size, what, error);
    if (status == QLLM_OK)
        *bytes += count * size;
    return status;
}

static qllm_status take_floats(float **out, int64_t rows, int64_t stride, int64_t *bytes,
                               qllm_error *error)
{
    void *memory = NULL;
    int64_t count;
    if (!qllm_checked_mul(rows, stride, &count))
        return qllm_fail(error, QLLM_MEMORY, "%s: %" PRId64 " rows of %" PRId64 " values are more "
                         "than can be addressed", what, rows, stride);
    qllm_status status = take(&memory, count, sizeof(float), bytes, error);
    *out = memory;
    return status;
}

static int64_t round_up_16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

static qllm_status take_linear(const qllm_decoder *decoder, int64_t rows, qllm_scratch *s,
                               qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    int64_t cols = c->hidden > c->intermediate ? c->hidden : c->intermediate;
    cols = c->heads * c->head_dim > cols ? c->heads * c->head_dim : cols;
    int64_t bytes = qllm_cpu_linear_scratch(cols, rows);
    if (bytes < 0)
        return qllm_fail(error, QLLM_MEMORY, "%s: %" PRId64 " rows of %" PRId64 " columns are more "
                         "than can be addressed", what, rows, cols);
    return take(&s->linear, bytes, 1, &s->row_bytes, error);
}

/* The row buffers of a fresh scratch. */
static qllm_status take_rows(const qllm_decoder *decoder, int64_t rows, qllm_scratch *s,
                             qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    s->rows = rows;
    s->hidden_stride = round_up_16(c->hidden);
    s->qkv_stride = round_up_16((c->heads + 2 * c->kv_heads) * c->head_dim);
    s->heads_stride = round_up_16(c->heads * c->head_dim);
    s->mlp_stride = round_up_16(c->intermediate);
    const struct { float **out; int64_t stride; } buffers[] = {
        {&s->x, s->hidden_stride},      {&s->normed, s->hidden_stride},
        {&s->branch, s->hidden_stride}, {&s->branch2, s->hidden_stride},
        {&s->qkv, s->qkv_stride},       {&s->attended, s->heads_stride},
        {&s->up, s->mlp_stride},        {&s->gate, c->gated ? s->mlp_stride : 0},
        {&s->normed2, c->block == QLLM_BLOCK_PARALLEL2 ? s->hidden_stride : 0},
    };
    void *row = NULL;
    qllm_status status = take(&row, rows, sizeof(qllm_step_row), &s->row_bytes, error);
    s->row = row;
    for (size_t i = 0; status == QLLM_OK && i < sizeof buffers / sizeof buffers[0]; i++)
        if (buffers[i].stride > 0)
            status = take_floats(buffers[i].out, rows, buffers[i].stride, &s->row_bytes, error);
    return status == QLLM_OK ? take_linear(decoder, rows, s, error) : status;
}

static qllm_status grow_rows(qllm_decoder *decoder, int64_t rows, qllm_error *error)
{
    qllm_scratch *s = &decoder->scratch, fresh = {0};
    if (rows <= s->rows)
        return QLLM_OK;
    qllm_status status = take_rows(decoder, rows, &fresh, error);
    if (status != QLLM_OK) {
        free_rows(&fresh);
        return status;
    }
    free_rows(s);
    fresh.paths_capacity = s->paths_capacity;
    fresh.spans_capacity = s->spans_capacity;
    fresh.scores_capacity = s->scores_capacity;
    fresh.paths = s->paths;
    fresh.spans = s->spans;
    fresh.scores = s->scores;
    fresh.tasks = s->tasks;
    fresh.attention_bytes = s->attention_bytes;
    *s = fresh;
    return QLLM_OK;
}

/* `capacity` where it suffices, else `needed` with room for as much again. */
static int64_t grown(int64_t capacity, int64_t needed)
{
    return needed <= capacity ? capacity : 2 * needed;
}

static qllm_status grow_attention(qllm_decoder *decoder, int64_t paths, int64_t spans,
                                  int64_t scores, qllm_error *error)
{
    qllm_scratch *s = &decoder->scratch, fresh = {0};
    int64_t threads = qllm_threads_count(decoder->threads), bytes = 0;
    void *path_memory = NULL, *span_memory = NULL, *task_memory = NULL;
    if (paths <= s->paths_capacity && spans <= s->spans_capacity && scores <= s->scores_capacity)
        return QLLM_OK;
    fresh.paths_capacity = grown(s->paths_capacity, paths);
    fresh.spans_capacity = grown(s->spans_capacity, spans);
    fresh.scores_capacity = round_up_16(grown(s->scores_capacity, scores));
    qllm_status status = take(&path_memory, fresh.paths_capacity, sizeof *fresh.paths, &bytes,
                              error);
    if (status == QLLM_OK)
        status = take(&span_memory, threads * fresh.spans_capacity, sizeof *fresh.spans, &bytes,
                      error);
    if (status == QLLM_OK)
        status = take_floats(&fresh.scores, threads, fresh.scores_capacity, &bytes, error);
    if (status == QLLM_OK)
        status = take(&task_memory, threads, sizeof *fresh.tasks, &bytes, error);
    fresh.paths = path_memory;
    fresh.spans = span_memory;
    fresh.tasks = task_memory;
    if (status != QLLM_OK) {
        free_attention(&fresh);
        return status;
    }
    free_attention(s);
    s->paths = fresh.paths;
    s->spans = fresh.spans;
    s->scores = fresh.scores;
    s->tasks = fresh.tasks;
    s->paths_capacity = fresh.paths_capacity;
    s->spans_capacity = fresh.spans_capacity;
    s->scores_capacity = fresh.scores_capacity;
    s->attention_bytes = bytes;
    return QLLM_OK;
}

qllm_status qllm_scratch_grow(qllm_decoder *decoder, int64_t rows, int64_t paths, int64_t spans,
                              int64_t positions, qllm_error *error)
{
    qllm_status status = grow_rows(decoder, rows, error);
    if (status != QLLM_OK)
        return status;
    const qllm_decoder_config *c = &decoder->config;
    int64_t scores = qllm_attention_scratch(positions, c->heads / c->kv_heads);
    return grow_attention(decoder, paths, spans, scores, error);
}
