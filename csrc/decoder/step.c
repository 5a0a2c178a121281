#include "decoder/step.h"

/* The rows of a step; of its blocks alone, without tokens. */
typedef struct batch {
    qllm_sequence *const *sequences;
    const int64_t *tokens; /* NULL for rows that come as hidden states */
    const bool *want;
    int64_t n;
} batch;

static bool starts_run(const batch *b, int64_t i)
{
    return i == 0 || b->sequences[i] != b->sequences[i - 1];
}

/* The slots in [begin, end) are set, as far as they are needed. */
static qllm_status check_weights(const qllm_decoder *decoder, int64_t begin, int64_t end,
                                 qllm_error *error)
{
    int64_t index = qllm_weights_missing(&decoder->weights, &decoder->config, begin, end);
    if (index < 0)
        return QLLM_OK;
    return qllm_refuse_missing(&decoder->config, index, error);
}

/* Checks row i and counts it as pending in its sequence. */
static qllm_status check_row(const qllm_decoder *decoder, const batch *b, int64_t i,
                             qllm_error *error)
{
    qllm_sequence *sequence = b->sequences[i];
    const qllm_row_facts facts = {
        .position = atomic_load(&sequence->length) + sequence->pending,
        .foreign = sequence->decoder != decoder,
        .parted = starts_run(b, i) && sequence->pending > 0,
    };
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
    for (int64_t i = 0; i < b->n; i++)
        qllm_kv_rollback(b->sequences[i]);
}

/* Room for the keys and values of every row; the sequences count how many those are. */
static qllm_status reserve_keys(const batch *b, qllm_error *error)
{
    for (int64_t i = 0; i < b->n; i++) {
        if (!starts_run(b, i))
            continue;
        qllm_status status = qllm_kv_reserve(b->sequences[i], b->sequences[i]->pending, error);
        if (status != QLLM_OK)
            return status;
    }
    return QLLM_OK;
}

/* Buffers and position tables for every chunk of the batch. */
static qllm_status reserve_buffers(qllm_decoder *decoder, const batch *b, qllm_error *error)
{
    int64_t max_paths = 0, max_spans = 0, positions = 0, paths = 0;
    for (int64_t i = 0; i < b->n; i++) {
        if (i % QLLM_STEP_ROWS == 0)
            paths = 0;
        if (starts_run(b, i) || i % QLLM_STEP_ROWS == 0) {
            int64_t spans = qllm_kv_path_length(b->sequences[i]);
            int64_t end = atomic_load(&b->sequences[i]->length) + b->sequences[i]->pending;
            paths += spans;
            max_spans = spans > max_spans ? spans : max_spans;
            max_paths = paths > max_paths ? paths : max_paths;
            positions = end > positions ? end : positions;
        }
    }
    int64_t rows = b->n < QLLM_STEP_ROWS ? b->n : QLLM_STEP_ROWS;
    qllm_status status = qllm_scratch_grow(decoder, rows, max_paths, max_spans, positions, error);
    if (status != QLLM_OK)
        return status;
    return decoder->config.position == QLLM_POSITION_ROPE
               ? qllm_rope_grow(&decoder->rope, &decoder->config, positions, error)
               : qllm_alibi_grow(&decoder->alibi, &decoder->config, positions, error);
}

/* Where the walk through a batch stands. */
typedef struct cursor {
    int64_t position; /* of the next row of the current sequence */
    int64_t wanted;   /* logits rows so far */
} cursor;

/* Fills the rows of the run that starts at row `i` of the batch, up to `end`, into scratch.row from
 * `r`; returns how many. */
static int64_t fill_run(qllm_decoder *decoder, const batch *b, int64_t i, int64_t end, int64_t r,
                        int64_t path, cursor *at)
{
    qllm_scratch *s = &decoder->scratch;
    const qllm_sequence *sequence = b->sequences[i];
    int64_t count = 1;
    if (starts_run(b, i))
        at->position = atomic_load(&sequence->length);
    while (i + count < end && b->sequences[i + count] == sequence)
        count++;
    const qllm_kv_block **blocks = s->paths + path;
    int64_t length = qllm_kv_path(sequence, at->position + count, blocks), block = 0;
    for (int64_t j = 0; j < count; j++) {
        int64_t position = at->position + j;
        while (block + 1 < length && blocks[block + 1]->start <= position)
            block++;
        bool wanted = b->want == NULL || b->want[i + j];
        s->row[r + j] = (qllm_step_row){
            .sequence = sequence, .token = b->tokens != NULL ? b->tokens[i + j] : -1,
            .position = position, .path = path, .path_length = length, .block = blocks[block],
            .wanted = wanted ? at->wanted++ : -1,
        };
    }
    at->position += count;
    return count;
}

/* Chunk by chunk: logits of wanted rows, or for rows without tokens their hidden states. */
static void run_chunks(qllm_decoder *decoder, const batch *b, float *out)
{
    cursor at = {0, 0};
    for (int64_t begin = 0; begin < b->n; begin += QLLM_STEP_ROWS) {
        int64_t end = begin + QLLM_STEP_ROWS < b->n ? begin + QLLM_STEP_ROWS : b->n;
        int64_t path = 0;
        for (int64_t i = begin; i < end;) {
            const qllm_step_row *row = &decoder->scratch.row[i - begin];
            i += fill_run(decoder, b, i, end, i - begin, path, &at);
            path += row->path_length;
        }
        if (b->tokens != NULL)
            qllm_forward(decoder, end - begin, out);
        else
            qllm_forward_blocks(decoder, end - begin, out + begin * decoder->config.hidden);
    }
}

static qllm_status run_batch(qllm_decoder *decoder, const batch *b, float *out, qllm_error *error)
{
    qllm_status status = check_rows(decoder, b, error);
    if (status != QLLM_OK || b->n == 0)
        return status;
    status = reserve_keys(b, error);
    if (status == QLLM_OK)
        status = reserve_buffers(decoder, b, error);
    if (status != QLLM_OK) {
        rollback(b);
        return status;
    }
    run_chunks(decoder, b, out);
    for (int64_t i = 0; i < b->n; i++)
        if (starts_run(b, i))
            qllm_kv_commit(b->sequences[i]);
    return QLLM_OK;
}

qllm_status qllm_cpu_step(qllm_decoder *decoder, qllm_sequence *const *sequences,
                          const int64_t *tokens, const bool *want, int64_t n, float *logits,
                          qllm_error *error)
{
    const batch b = {sequences, tokens, want, n};
    qllm_status status = check_weights(decoder, 0, decoder->weights.count, error);
    return status == QLLM_OK ? run_batch(decoder, &b, logits, error) : status;
}

qllm_status qllm_cpu_blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                            float *hidden, qllm_error *error)
{
    const batch b = {sequences, NULL, NULL, n};
    qllm_status status = check_weights(decoder, qllm_slot_of_embedding(&decoder->config) + 1,
                                       qllm_slot_of_final_norm(&decoder->config), error);
    return status == QLLM_OK ? run_batch(decoder, &b, hidden, error) : status;
}

qllm_status qllm_cpu_embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                           qllm_error *error)
{
    int64_t slot = qllm_slot_of_embedding(&decoder->config);
    qllm_status status = check_weights(decoder, slot, slot + 1, error);
    for (int64_t i = 0; status == QLLM_OK && i < n; i++)
        status = qllm_check_token(&decoder->config, tokens, i, error);
    for (int64_t i = 0; status == QLLM_OK && i < n; i++)
        qllm_weights_embed(&decoder->weights, tokens[i], hidden + i * decoder->config.hidden);
    return status;
}

qllm_status qllm_cpu_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                          qllm_error *error)
{
    const qllm_decoder_config *config = &decoder->config;
    qllm_status status = check_weights(decoder, qllm_slot_of_final_norm(config),
                                       decoder->weights.count, error);
    if (status == QLLM_OK && n > 0)
        status = qllm_scratch_grow(decoder, n < QLLM_STEP_ROWS ? n : QLLM_STEP_ROWS, 1, 1, 1,
                                   error);
    for (int64_t begin = 0; status == QLLM_OK && begin < n; begin += QLLM_STEP_ROWS) {
        int64_t rows = n - begin < QLLM_STEP_ROWS ? n - begin : QLLM_STEP_ROWS;
        qllm_forward_head(decoder, hidden + begin * config->hidden, rows,
                          logits + begin * config->vocab);
    }
    return status;
}
