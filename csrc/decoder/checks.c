#include "decoder/checks.h"

#include <inttypes.h>

#include "core/linear_ref.h"

qllm_format qllm_source_format(const qllm_weight_source *source)
{
    return source->weight != NULL ? source->weight->format : source->format;
}

/* The slot of that name, which must be of `kind`. */
static qllm_status find_slot(const qllm_decoder_config *config, const char *name,
                             qllm_slot_kind kind, int64_t *index, qllm_slot *slot,
                             qllm_error *error)
{
    static const char *const setters[] = {"set_linear", "set_vector", "set_embedding"};
    *index = qllm_slot_find(config, name);
    if (*index < 0)
        return qllm_fail(error, QLLM_VALUE, "slot '%.80s': this decoder has no such slot; slots() "
                         "lists them", name);
    qllm_slot_describe(config, *index, slot);
    if (slot->kind != kind)
        return qllm_fail(error, QLLM_VALUE, "slot '%s': this slot is set with %s, not with %s",
                         name, setters[slot->kind], setters[kind]);
    return QLLM_OK;
}

static qllm_status check_shape(const qllm_slot *slot, const qllm_weight_source *source,
                               qllm_error *error)
{
    int64_t rows = source->weight != NULL ? source->weight->rows : source->values->rows;
    int64_t cols = source->weight != NULL ? source->weight->cols : source->values->cols;
    if (rows == slot->rows && cols == slot->cols)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "slot '%s': the weight has shape (%" PRId64 ", %" PRId64
                     "), expected (%" PRId64 ", %" PRId64 ")", slot->name, rows, cols, slot->rows,
                     slot->cols);
}

qllm_status qllm_check_linear(const qllm_decoder_config *config, const qllm_weight_source *source,
                              int64_t *index, qllm_slot *slot, qllm_error *error)
{
    qllm_status status = find_slot(config, source->slot, QLLM_SLOT_LINEAR, index, slot, error);
    if (status == QLLM_OK)
        status = check_shape(slot, source, error);
    if (status != QLLM_OK)
        return status;
    if (source->bias != NULL && source->bias_length != slot->rows)
        return qllm_fail(error, QLLM_VALUE, "slot '%s': the bias has %" PRId64 " values, expected %"
                         PRId64, slot->name, source->bias_length, slot->rows);
    if (qllm_source_format(source) == QLLM_FORMAT_INT8 && slot->cols > QLLM_INT8_MAX_COLS)
        return qllm_fail(error, QLLM_UNSUPPORTED, "slot '%s': int8 is offered for at most %d "
                         "columns, found %" PRId64 "; use another format", slot->name,
                         QLLM_INT8_MAX_COLS, slot->cols);
    return QLLM_OK;
}

qllm_status qllm_check_vector(const qllm_decoder_config *config, const char *name, int64_t n,
                              int64_t *index, qllm_slot *slot, qllm_error *error)
{
    qllm_status status = find_slot(config, name, QLLM_SLOT_VECTOR, index, slot, error);
    if (status == QLLM_OK && n != slot->rows)
        return qllm_fail(error, QLLM_VALUE, "slot '%s': %" PRId64 " values, expected %" PRId64,
                         slot->name, n, slot->rows);
    return status;
}

qllm_status qllm_check_embedding(const qllm_decoder_config *config,
                                 const qllm_weight_source *source, qllm_error *error)
{
    qllm_slot slot;
    qllm_slot_describe(config, qllm_slot_of_embedding(config), &slot);
    qllm_status status = check_shape(&slot, source, error);
    if (status == QLLM_OK && !qllm_format_is_float(qllm_source_format(source)))
        return qllm_fail(error, QLLM_UNSUPPORTED, "slot 'embedding': format %s is not offered for "
                         "the embedding; use f32, f16 or bf16",
                         qllm_format_name(qllm_source_format(source)));
    return status;
}

qllm_status qllm_check_tie(bool set, qllm_format format, qllm_error *error)
{
    if (!set)
        return qllm_fail(error, QLLM_VALUE, "slot 'head': no weight has been set yet that the "
                         "embedding could share");
    if (!qllm_format_is_float(format))
        return qllm_fail(error, QLLM_UNSUPPORTED, "slot 'embedding': it cannot share the head's "
                         "weight, which has format %s; f32, f16 or bf16 is needed",
                         qllm_format_name(format));
    return QLLM_OK;
}

qllm_status qllm_check_readable(const qllm_decoder_config *config, const char *name,
                                int64_t *index, qllm_error *error)
{
    qllm_slot slot;
    *index = qllm_slot_find(config, name);
    if (*index >= 0 && *index == qllm_slot_of_embedding(config))
        return QLLM_OK;
    return find_slot(config, name, QLLM_SLOT_LINEAR, index, &slot, error);
}

qllm_status qllm_refuse_unset(const char *name, qllm_error *error)
{
    return qllm_fail(error, QLLM_VALUE, "slot '%s': no weight has been set yet", name);
}

qllm_status qllm_refuse_missing(const qllm_decoder_config *config, int64_t index,
                                qllm_error *error)
{
    qllm_slot slot;
    qllm_slot_describe(config, index, &slot);
    return qllm_fail(error, QLLM_VALUE, "slot '%s': no weight has been set yet; missing() lists "
                     "all such slots", slot.name);
}

qllm_status qllm_check_token(const qllm_decoder_config *config, const int64_t *tokens, int64_t i,
                             qllm_error *error)
{
    if (tokens[i] >= 0 && tokens[i] < config->vocab)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "tokens[%" PRId64 "]: token id %" PRId64 ", expected 0 to "
                     "%" PRId64, i, tokens[i], config->vocab - 1);
}

qllm_status qllm_check_row(const qllm_decoder_config *config, const qllm_row_facts *row,
                           const int64_t *tokens, int64_t i, qllm_error *error)
{
    if (row->foreign)
        return qllm_fail(error, QLLM_VALUE, "sequences[%" PRId64 "]: made by another decoder; use "
                         "this decoder's sequence()", i);
    if (row->parted)
        return qllm_fail(error, QLLM_VALUE, "sequences[%" PRId64 "]: the rows of a sequence must "
                         "be consecutive, but it was named before row %" PRId64 " already", i,
                         i - 1);
    qllm_status status = tokens == NULL ? QLLM_OK : qllm_check_token(config, tokens, i, error);
    if (status == QLLM_OK && row->position >= config->max_positions)
        return qllm_fail(error, QLLM_VALUE, "sequences[%" PRId64 "]: position %" PRId64 " is "
                         "beyond the model's last one, max_positions is %" PRId64 "; truncate the "
                         "sequence or pass fewer tokens", i, row->position, config->max_positions);
    return status;
}

qllm_status qllm_check_truncation(int64_t stored, int64_t length, qllm_error *error)
{
    if (length >= 0 && length <= stored)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "length: %" PRId64 " positions, but the sequence has "
                     "stored %" PRId64 "; pass 0 to %" PRId64, length, stored, stored);
}
