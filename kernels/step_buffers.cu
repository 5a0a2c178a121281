/* The memory of a step: buffers and position tables, which grow on demand and are kept. */
#include <string.h>

#include "step.h"

extern "C" {
#include "core/alloc.h"
#include "core/checked.h"
}

/* buffers -------------------------------------------------------------------------------------- */

/* Floats of one row, by buffer, in the order of gpu_scratch. */
enum { ROW_BUFFERS = 9 };

static void row_widths(const qllm_decoder_config *c, int64_t widths[ROW_BUFFERS])
{
    int64_t heads = c->heads * c->head_dim;
    const int64_t all[ROW_BUFFERS] = {
        c->hidden, c->hidden, c->hidden, c->hidden, c->hidden,
        heads + 2 * c->kv_heads * c->head_dim, heads, c->intermediate, c->intermediate,
    };
    memcpy(widths, all, sizeof all);
}

/* Bytes of a buffer of `rows` rows, which the next one may begin behind; false on overflow. */
static bool buffer_bytes(int64_t rows, int64_t width, int64_t *bytes)
{
    int64_t n;
    return qllm_checked_mul(rows, width, &n) && qllm_checked_mul(n, sizeof(float), &n) &&
           qllm_checked_round_up(n, 256, bytes);
}

/* One piece of device memory anew: what was there is freed first, so that both are never held, and
 * is gone if there is no room. */
static qllm_status renew(qllm_decoder *decoder, void **memory, int64_t *held, int64_t bytes,
                         const char *what, qllm_error *error)
{
    gpu_free(*memory);
    *memory = NULL;
    *held = 0;
    decoder->generation++;
    qllm_status status = gpu_alloc_trimmed(&decoder->pages, bytes, memory, GPU_SCRATCH, what,
                                           error);
    if (status == QLLM_OK)
        *held = bytes;
    return status;
}

static qllm_status too_large(const char *what, qllm_error *error)
{
    return qllm_fail(error, QLLM_MEMORY, "%s: more bytes than can be addressed", what);
}

static qllm_status grow_rows(qllm_decoder *decoder, int64_t rows, qllm_error *error)
{
    static const char what[] = "the buffers of a step";
    gpu_scratch *s = &decoder->scratch;
    float **buffers[ROW_BUFFERS] = {&s->x, &s->normed, &s->normed2, &s->branch, &s->branch2,
                                    &s->qkv, &s->attended, &s->gate, &s->up};
    int64_t widths[ROW_BUFFERS], bytes[ROW_BUFFERS], total = 0;
    if (rows <= s->rows)
        return QLLM_OK;
    row_widths(&decoder->config, widths);
    for (int i = 0; i < ROW_BUFFERS; i++)
        if (!buffer_bytes(rows, widths[i], &bytes[i]) ||
            !qllm_checked_add(total, bytes[i], &total))
            return too_large(what, error);
    s->rows = 0;
    qllm_status status = renew(decoder, &s->row_memory, &s->row_bytes, total, what, error);
    if (status != QLLM_OK)
        return status;
    uint8_t *at = (uint8_t *)s->row_memory;
    for (int i = 0; i < ROW_BUFFERS; at += bytes[i++])
        *buffers[i] = (float *)at;
    s->rows = rows;
    return QLLM_OK;
}

static qllm_status grow_logits(qllm_decoder *decoder, int64_t rows, qllm_error *error)
{
    gpu_scratch *s = &decoder->scratch;
    void *memory = s->logits;
    int64_t bytes, held;
    if (rows <= s->logits_rows)
        return QLLM_OK;
    if (!buffer_bytes(rows, decoder->config.vocab, &bytes))
        return too_large("the logits of a step", error);
    qllm_status status = renew(decoder, &memory, &held, bytes, "the logits of a step", error);
    s->logits = (float *)memory;
    s->logits_rows = status == QLLM_OK ? rows : 0;
    return status;
}

static qllm_status grow_extra(qllm_decoder *decoder, int64_t rows, int64_t positions,
                              qllm_error *error)
{
    static const char what[] = "the buffers of attention and linear layers";
    gpu_scratch *s = &decoder->scratch;
    int64_t bytes = decoder->exact ? gpu_exact_scratch(decoder, rows, positions)
                                   : gpu_auto_scratch(decoder, rows, positions);
    if (bytes < 0)
        return too_large(what, error);
    if (bytes <= s->extra_bytes)
        return QLLM_OK;
    return renew(decoder, &s->extra, &s->extra_bytes, bytes, what, error);
}

/* The rows of a chunk themselves. */
static qllm_status grow_step(qllm_decoder *decoder, int64_t padded, int64_t max_pages,
                             qllm_error *error)
{
    static const char what[] = "the rows of a step";
    gpu_step *step = decoder->step;
    int64_t bytes;
    if (!qllm_checked_mul(padded, max_pages, &bytes) ||
        !qllm_checked_add(bytes, GPU_ROW_ARRAYS * GPU_STEP_ROWS, &bytes) ||
        !qllm_checked_mul(bytes, sizeof(int32_t), &bytes))
        return too_large(what, error);
    if (bytes <= step->bytes)
        return QLLM_OK;
    void *host, *device = step->device;
    gpu_free_host(step->host);
    step->host = NULL;
    step->device = NULL;
    step->bytes = 0;
    int64_t held;
    qllm_status status = renew(decoder, &device, &held, bytes, what, error);
    step->device = (int32_t *)device;
    if (status == QLLM_OK)
        status = gpu_alloc_host(bytes, &host, what, error);
    if (status != QLLM_OK)
        return status;
    step->host = (int32_t *)host;
    step->bytes = bytes;
    return QLLM_OK;
}

/* position tables ------------------------------------------------------------------------------ */

/* A table of the host in device memory, in place of *table. */
static qllm_status upload_table(qllm_decoder *decoder, const float *values, int64_t n,
                                float **table, qllm_error *error)
{
    static const char what[] = "the table of positions";
    void *memory = *table;
    int64_t held, bytes = n * (int64_t)sizeof(float);
    qllm_status status = renew(decoder, &memory, &held, bytes, what, error);
    *table = (float *)memory;
    if (status == QLLM_OK)
        status = gpu_check(gpu_copy_in(memory, values, bytes, decoder->stream), what, error);
    return status;
}

static qllm_status grow_positions(qllm_decoder *decoder, int64_t positions, qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    gpu_positions *table = &decoder->positions;
    if (positions <= table->capacity)
        return QLLM_OK;
    bool rope = c->position == QLLM_POSITION_ROPE;
    qllm_status status = rope ? qllm_rope_grow(&decoder->rope, c, positions, error)
                              : qllm_alibi_grow(&decoder->alibi, c, positions, error);
    if (status != QLLM_OK)
        return status;
    int64_t capacity = rope ? decoder->rope.capacity : decoder->alibi.capacity;
    int64_t half = c->rotary_dim / 2;
    table->capacity = 0;
    if (rope) {
        status = upload_table(decoder, decoder->rope.cos, capacity * half, &table->cos, error);
        if (status == QLLM_OK)
            status = upload_table(decoder, decoder->rope.sin, capacity * half, &table->sin, error);
    } else
        status = upload_table(decoder, decoder->alibi.bias, capacity * c->heads, &table->bias,
                              error);
    if (status == QLLM_OK)
        table->capacity = capacity;
    return status;
}

qllm_status gpu_step_reserve(qllm_decoder *decoder, const gpu_needs *most, bool logits,
                             qllm_error *error)
{
    qllm_status status = grow_step(decoder, most->rows, most->max_pages, error);
    if (status == QLLM_OK)
        status = grow_rows(decoder, most->rows, error);
    if (status == QLLM_OK)
        status = grow_positions(decoder, most->positions, error);
    if (status == QLLM_OK)
        status = grow_extra(decoder, most->rows, most->positions, error);
    if (status == QLLM_OK && logits)
        status = grow_logits(decoder, most->wanted, error);
    return status;
}

qllm_status gpu_step_init(qllm_decoder *decoder, qllm_error *error)
{
    void *memory;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(gpu_step), "a decoder", error);
    if (status == QLLM_OK)
        decoder->step = (gpu_step *)memory;
    return status;
}

void gpu_step_clear(qllm_decoder *decoder)
{
    if (decoder->step != NULL) {
        gpu_free_host(decoder->step->host);
        gpu_free(decoder->step->device);
        qllm_free(decoder->step);
    }
    gpu_free(decoder->scratch.row_memory);
    gpu_free(decoder->scratch.logits);
    gpu_free(decoder->scratch.extra);
    gpu_free(decoder->positions.cos);
    gpu_free(decoder->positions.sin);
    gpu_free(decoder->positions.bias);
    qllm_rope_clear(&decoder->rope);
    qllm_alibi_clear(&decoder->alibi);
}
