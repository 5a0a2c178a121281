/* One step of a batch.  It first checks everything and makes room for everything (buffers, position
 * tables, keys and values), then works on the rows in chunks, and the lengths of the sequences
 * change at the very end: whatever fails before leaves them as they were.
 *
 * What a chunk is (tokens, positions, pages) goes to the device in one copy from pinned memory; the
 * kernels find it there at the same address each time, so that a recorded step can be run again. */
#include <string.h>

#include "step.h"

enum { MIN_POSITIONS = 1 };

typedef struct batch {
    qllm_sequence *const *sequences; /* NULL: rows without keys, of the embedding or the head */
    const int64_t *tokens;           /* NULL: rows that come as hidden states */
    const bool *want;                /* NULL: all */
    int64_t n;
} batch;

static bool starts_run(const batch *b, int64_t i)
{
    return i == 0 || b->sequences[i] != b->sequences[i - 1];
}

static int64_t chunk_rows(const qllm_decoder *decoder)
{
    return decoder->int8_batch ? GPU_STEP_ROWS / 2 : GPU_STEP_ROWS;
}

static int64_t power_of_two(int64_t n)
{
    int64_t power = 1;
    while (power < n)
        power *= 2;
    return power;
}

/* rows of a step ------------------------------------------------------------------------------- */

/* Checks row i and counts it as pending in its sequence. */
static qllm_status check_row(const qllm_decoder *decoder, const batch *b, int64_t i,
                             qllm_error *error)
{
    qllm_sequence *sequence = b->sequences[i];
    qllm_row_facts facts;
    facts.position = gpu_sequence_length(sequence) + sequence->pending;
    facts.foreign = sequence->decoder != decoder;
    facts.parted = starts_run(b, i) && sequence->pending > 0;
    qllm_status status = qllm_check_row(&decoder->config, &facts, b->tokens, i, error);
    if (status == QLLM_OK)
        sequence->pending++;
    return status;
}

static qllm_status check_rows(const qllm_decoder *decoder, const batch *b, qllm_error *error)
{
    qllm_status status = QLLM_OK;
    int64_t checked = 0;
    for (; status == QLLM_OK && checked < b->n; checked++)
        status = check_row(decoder, b, checked, error);
    if (status != QLLM_OK)
        for (int64_t i = 0; i < checked; i++)
            if (b->sequences[i]->decoder == decoder)
                b->sequences[i]->pending = 0;
    return status;
}

static void rollback(const batch *b)
{
    for (int64_t i = 0; b->sequences != NULL && i < b->n; i++)
        if (starts_run(b, i))
            gpu_sequence_rollback(b->sequences[i]);
}

static void commit(const batch *b)
{
    for (int64_t i = 0; b->sequences != NULL && i < b->n; i++)
        if (starts_run(b, i))
            gpu_sequence_commit(b->sequences[i]);
}

/* Room for the keys and values of every row; the sequences count how many those are. */
static qllm_status reserve_keys(qllm_decoder *decoder, const batch *b, qllm_error *error)
{
    qllm_status status = QLLM_OK;
    for (int64_t i = 0; status == QLLM_OK && b->sequences != NULL && i < b->n; i++)
        if (starts_run(b, i))
            status = gpu_sequence_reserve(b->sequences[i], b->sequences[i]->pending, error);
    if (decoder->pages.moved)
        decoder->generation++;
    decoder->pages.moved = false;
    return status;
}

/* what a batch needs --------------------------------------------------------------------------- */

static gpu_needs needs_of(const qllm_decoder *decoder, const batch *b)
{
    gpu_needs most = {1, 0, MIN_POSITIONS, 1};
    int64_t chunk = chunk_rows(decoder), wanted = 0;
    for (int64_t i = 0; i < b->n; i++) {
        wanted = i % chunk == 0 ? 0 : wanted;
        wanted += b->want == NULL || b->want[i];
        most.wanted = wanted > most.wanted ? wanted : most.wanted;
        if (b->sequences == NULL)
            continue;
        int64_t end = gpu_sequence_length(b->sequences[i]) + b->sequences[i]->pending;
        most.positions = end > most.positions ? end : most.positions;
    }
    most.rows = power_of_two(b->n < chunk ? b->n : chunk);
    most.wanted = most.wanted > 0 ? power_of_two(most.wanted) : 0;
    most.max_pages = power_of_two((most.positions + GPU_PAGE - 1) / GPU_PAGE);
    return most;
}

/* chunks --------------------------------------------------------------------------------------- */

/* Where the walk through a batch stands. */
typedef struct cursor {
    int64_t position; /* of the next row of the current sequence */
} cursor;

/* The rows of the pinned copy, as gpu_rows has them on the device. */
typedef struct host_rows {
    int32_t *tokens, *positions, *logits_row, *row_of, *page_index;
} host_rows;

static host_rows arrays_at(int32_t *memory)
{
    return host_rows{memory, memory + GPU_STEP_ROWS, memory + 2 * GPU_STEP_ROWS,
                     memory + 3 * GPU_STEP_ROWS, memory + GPU_ROW_ARRAYS * GPU_STEP_ROWS};
}

/* Row r of the chunk, which is row i of the batch. */
static void fill_row(const batch *b, int64_t i, const host_rows *host, int r, gpu_rows *rows,
                     cursor *at)
{
    int32_t *pages = host->page_index + (int64_t)r * rows->max_pages;
    bool wanted = b->want == NULL || b->want[i];
    int64_t known = 0, position = 0;
    if (b->sequences != NULL) {
        const qllm_sequence *sequence = b->sequences[i];
        if (starts_run(b, i))
            at->position = gpu_sequence_length(sequence);
        rows->sequences += r == 0 || starts_run(b, i);
        position = at->position++;
        known = position / GPU_PAGE + 1;
        memcpy(pages, sequence->page, (size_t)known * sizeof *pages);
    }
    for (int64_t p = known; p < rows->max_pages; p++)
        pages[p] = -1;
    host->tokens[r] = b->tokens != NULL ? (int32_t)b->tokens[i] : 0;
    host->positions[r] = (int32_t)position;
    host->logits_row[r] = wanted ? rows->wanted : -1;
    if (wanted)
        host->row_of[rows->wanted++] = r;
    if (position >= rows->positions_end)
        rows->positions_end = (int)position + 1;
}

/* Rows [begin, end) of the batch to the device. */
static qllm_status send_chunk(qllm_decoder *decoder, const batch *b, int64_t begin, int64_t end,
                              const gpu_needs *most, cursor *at, gpu_rows *rows, qllm_error *error)
{
    gpu_step *step = decoder->step;
    const host_rows host = arrays_at(step->host), device = arrays_at(step->device);
    *rows = gpu_rows();
    rows->n = (int)(end - begin);
    rows->padded = (int)power_of_two(rows->n);
    rows->max_pages = (int)most->max_pages;
    for (int r = 0; r < rows->n; r++)
        fill_row(b, begin + r, &host, r, rows, at);
    for (int r = rows->n; r < rows->padded; r++) {
        host.tokens[r] = host.positions[r] = 0;
        host.logits_row[r] = -1;
    }
    for (int r = rows->wanted; r < rows->padded; r++)
        host.row_of[r] = -1;
    for (int64_t p = (int64_t)rows->n * rows->max_pages;
         p < (int64_t)rows->padded * rows->max_pages; p++)
        host.page_index[p] = -1;
    rows->tokens = device.tokens;
    rows->positions = device.positions;
    rows->logits_row = device.logits_row;
    rows->row_of = device.row_of;
    rows->page_index = device.page_index;
    rows->page_base = decoder->pages.base;
    int64_t count = GPU_ROW_ARRAYS * GPU_STEP_ROWS + (int64_t)rows->padded * rows->max_pages;
    return gpu_check(gpu_copy_in(step->device, step->host, count * (int64_t)sizeof(int32_t),
                                 decoder->stream), "copying the rows of a step", error);
}

static qllm_status run_embed(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error)
{
    return decoder->exact ? gpu_exact_embed(decoder, rows, error)
                          : gpu_auto_embed(decoder, rows, error);
}

static qllm_status run_layers(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error)
{
    return decoder->exact ? gpu_exact_layers(decoder, rows, error)
                          : gpu_auto_layers(decoder, rows, error);
}

static qllm_status run_head(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error)
{
    if (rows->wanted == 0)
        return QLLM_OK;
    return decoder->exact ? gpu_exact_head(decoder, rows, rows->wanted, error)
                          : gpu_auto_head(decoder, rows, rows->wanted, error);
}

static qllm_status copy_rows_in(qllm_decoder *decoder, const float *hidden, int64_t rows,
                                qllm_error *error)
{
    return gpu_check(gpu_copy_in(decoder->scratch.x, hidden, rows * decoder->config.hidden *
                                 (int64_t)sizeof(float), decoder->stream),
                     "copying hidden states to the device", error);
}

static qllm_status copy_rows_out(qllm_decoder *decoder, const float *from, int64_t rows,
                                 int64_t width, float *out, qllm_error *error)
{
    return gpu_check(gpu_copy_out(out, from, rows * width * (int64_t)sizeof(float),
                                  decoder->stream), "copying results from the device", error);
}

static qllm_status wait(qllm_decoder *decoder, qllm_error *error)
{
    return gpu_check(gpu_stream_wait(decoder->stream), "a step", error);
}

/* What is to be done with a batch, chunk by chunk. */
typedef struct work {
    bool embed, layers, head;
    const float *hidden_in; /* (n, hidden) instead of an embedding, or NULL */
    float *hidden_out;      /* (n, hidden), or NULL */
    float *logits;          /* (wanted rows, vocab), or NULL */
    const qllm_draw *draws; /* (n_draws), in ascending order of row */
    int64_t n_draws;
    qllm_sampled *drawn;
    /* where it stands: */
    int64_t wanted_done, draws_done;
} work;

/* The draws from the logits of a chunk, whose wanted rows are those behind work->wanted_done. */
static qllm_status draw_chunk(qllm_decoder *decoder, const gpu_rows *rows, work *w,
                              qllm_error *error)
{
    int64_t begin = w->draws_done, end = begin, behind = w->wanted_done + rows->wanted;
    while (end < w->n_draws && w->draws[end].row < behind)
        end++;
    w->draws_done = end;
    if (begin == end)
        return QLLM_OK;
    return gpu_draw(decoder, decoder->scratch.logits, w->wanted_done, rows->wanted,
                    w->draws + begin, end - begin, begin, w->drawn + begin, error);
}

static qllm_status run_chunk(qllm_decoder *decoder, const gpu_rows *rows, int64_t begin, work *w,
                             qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    const gpu_scratch *s = &decoder->scratch;
    qllm_status status = QLLM_OK;
    if (w->hidden_in != NULL)
        status = copy_rows_in(decoder, w->hidden_in + begin * c->hidden, rows->n, error);
    if (status == QLLM_OK && w->embed)
        status = run_embed(decoder, rows, error);
    if (status == QLLM_OK && w->layers)
        status = run_layers(decoder, rows, error);
    if (status == QLLM_OK && w->hidden_out != NULL)
        status = copy_rows_out(decoder, s->x, rows->n, c->hidden,
                               w->hidden_out + begin * c->hidden, error);
    if (status == QLLM_OK && w->head)
        status = run_head(decoder, rows, error);
    if (status == QLLM_OK && w->logits != NULL)
        status = copy_rows_out(decoder, s->logits, rows->wanted, c->vocab,
                               w->logits + w->wanted_done * c->vocab, error);
    if (status == QLLM_OK && w->n_draws > 0)
        status = draw_chunk(decoder, rows, w, error);
    w->wanted_done += rows->wanted;
    return status;
}

/* Each chunk is waited for: the next one's rows go into the same memory. */
static qllm_status run_chunks(qllm_decoder *decoder, const batch *b, const gpu_needs *most, work *w,
                              qllm_error *error)
{
    cursor at = {0};
    int64_t chunk = chunk_rows(decoder);
    qllm_status status = QLLM_OK;
    for (int64_t begin = 0; status == QLLM_OK && begin < b->n; begin += chunk) {
        int64_t end = begin + chunk < b->n ? begin + chunk : b->n;
        gpu_rows rows;
        status = send_chunk(decoder, b, begin, end, most, &at, &rows, error);
        if (status == QLLM_OK)
            status = run_chunk(decoder, &rows, begin, w, error);
        if (status == QLLM_OK)
            status = wait(decoder, error);
    }
    return status;
}

static qllm_status run_batch(qllm_decoder *decoder, const batch *b, work *w, qllm_error *error)
{
    qllm_status status = b->sequences != NULL ? check_rows(decoder, b, error) : QLLM_OK;
    if (status != QLLM_OK || b->n == 0)
        return status;
    const gpu_needs most = needs_of(decoder, b);
    status = reserve_keys(decoder, b, error);
    if (status == QLLM_OK)
        status = gpu_step_reserve(decoder, &most, w->head, error);
    if (status == QLLM_OK)
        status = run_chunks(decoder, b, &most, w, error);
    if (status == QLLM_OK) {
        commit(b);
        return QLLM_OK;
    }
    gpu_stream_wait(decoder->stream);
    rollback(b);
    return status;
}

/* entries -------------------------------------------------------------------------------------- */

qllm_status gpu_step_run(qllm_decoder *decoder, qllm_sequence *const *sequences,
                         const int64_t *tokens, const bool *want, int64_t n, float *logits,
                         qllm_error *error)
{
    return gpu_step_draw(decoder, sequences, tokens, want, n, NULL, 0, NULL, logits, error);
}

/* The rows that draws name, against the number of those that are wanted. */
static qllm_status check_draws(const batch *b, const qllm_draw *draws, int64_t n_draws,
                               qllm_error *error)
{
    int64_t wanted = 0, last = 0;
    for (int64_t i = 0; i < b->n; i++)
        wanted += b->want == NULL || b->want[i];
    for (int64_t i = 0; i < n_draws; i++) {
        if (draws[i].row < last || draws[i].row >= wanted)
            return qllm_fail(error, QLLM_INTERNAL, "draws are not in the order of the wanted rows");
        last = draws[i].row;
    }
    return QLLM_OK;
}

qllm_status gpu_step_draw(qllm_decoder *decoder, qllm_sequence *const *sequences,
                          const int64_t *tokens, const bool *want, int64_t n,
                          const qllm_draw *draws, int64_t n_draws, qllm_sampled *out,
                          float *logits, qllm_error *error)
{
    const batch b = {sequences, tokens, want, n};
    work w = {};
    w.embed = w.layers = w.head = true;
    w.logits = logits;
    w.draws = draws;
    w.n_draws = n_draws;
    w.drawn = out;
    qllm_status status = gpu_slots_check(decoder, 0, decoder->slots, error);
    if (status == QLLM_OK)
        status = check_draws(&b, draws, n_draws, error);
    return status == QLLM_OK ? run_batch(decoder, &b, &w, error) : status;
}

qllm_status gpu_step_embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                           qllm_error *error)
{
    const batch b = {NULL, tokens, NULL, n};
    work w = {};
    w.embed = true;
    w.hidden_out = hidden;
    int64_t slot = qllm_slot_of_embedding(&decoder->config);
    qllm_status status = gpu_slots_check(decoder, slot, slot + 1, error);
    for (int64_t i = 0; status == QLLM_OK && i < n; i++)
        status = qllm_check_token(&decoder->config, tokens, i, error);
    return status == QLLM_OK ? run_batch(decoder, &b, &w, error) : status;
}

qllm_status gpu_step_blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                            float *hidden, qllm_error *error)
{
    const batch b = {sequences, NULL, NULL, n};
    work w = {};
    w.layers = true;
    w.hidden_in = w.hidden_out = hidden;
    qllm_status status = gpu_slots_check(decoder, qllm_slot_of_embedding(&decoder->config) + 1,
                                         qllm_slot_of_final_norm(&decoder->config), error);
    return status == QLLM_OK ? run_batch(decoder, &b, &w, error) : status;
}

qllm_status gpu_step_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                          qllm_error *error)
{
    const batch b = {NULL, NULL, NULL, n};
    work w = {};
    w.head = true;
    w.hidden_in = hidden;
    w.logits = logits;
    qllm_status status = gpu_slots_check(decoder, qllm_slot_of_final_norm(&decoder->config),
                                         decoder->slots, error);
    return status == QLLM_OK ? run_batch(decoder, &b, &w, error) : status;
}
