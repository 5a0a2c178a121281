#include "decoder/weights.h"

#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "core/linear_ref.h"

qllm_status qllm_weights_init(const qllm_decoder_config *config, qllm_weights *weights,
                              qllm_error *error)
{
    void *slots;
    memset(weights, 0, sizeof *weights);
    int64_t count = qllm_slot_count(config);
    qllm_status status = qllm_alloc(&slots, count, sizeof(qllm_weight), "the table of weights",
                                    error);
    if (status == QLLM_OK) {
        weights->slots = slots;
        weights->count = count;
    }
    return status;
}

void qllm_weight_clear(qllm_weight *weight)
{
    if (weight->packed != NULL)
        qllm_packed_destroy(weight->packed);
    qllm_free(weight->values);
    memset(weight, 0, sizeof *weight);
}

void qllm_weights_clear(qllm_weights *weights)
{
    for (int64_t i = 0; i < weights->count; i++)
        qllm_weight_clear(&weights->slots[i]);
    qllm_free(weights->slots);
    qllm_qweight_clear(&weights->embedding);
    memset(weights, 0, sizeof *weights);
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

static qllm_status check_shape(const qllm_slot *slot, const qllm_qweight *source, qllm_error *error)
{
    if (source->rows == slot->rows && source->cols == slot->cols)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "slot '%s': the weight has shape (%" PRId64 ", %" PRId64
                     "), expected (%" PRId64 ", %" PRId64 ")", slot->name, source->rows,
                     source->cols, slot->rows, slot->cols);
}

static qllm_status copy_floats(const float *values, int64_t n, const char *name, float **out,
                               qllm_error *error)
{
    void *copy;
    qllm_status status = qllm_alloc(&copy, n, sizeof(float), name, error);
    if (status == QLLM_OK)
        memcpy(copy, values, (size_t)n * sizeof(float));
    *out = copy;
    return status;
}

qllm_status qllm_weight_pack(const qllm_decoder_config *config, const char *slot_name,
                             const qllm_qweight *source, const float *bias, int64_t bias_length,
                             int64_t *index, qllm_weight *out, qllm_error *error)
{
    qllm_slot slot;
    memset(out, 0, sizeof *out);
    qllm_status status = find_slot(config, slot_name, QLLM_SLOT_LINEAR, index, &slot, error);
    if (status == QLLM_OK)
        status = check_shape(&slot, source, error);
    if (status != QLLM_OK)
        return status;
    if (bias != NULL && bias_length != slot.rows)
        return qllm_fail(error, QLLM_VALUE, "slot '%s': the bias has %" PRId64 " values, expected %"
                         PRId64, slot.name, bias_length, slot.rows);
    if (source->format == QLLM_FORMAT_INT8 && slot.cols > QLLM_INT8_MAX_COLS)
        return qllm_fail(error, QLLM_UNSUPPORTED, "slot '%s': int8 is offered for at most %d "
                         "columns, found %" PRId64 "; use another format", slot.name,
                         QLLM_INT8_MAX_COLS, slot.cols);
    if (bias != NULL)
        status = copy_floats(bias, bias_length, slot.name, &out->values, error);
    if (status == QLLM_OK)
        status = qllm_pack(source, slot.name, &out->packed, error);
    if (status != QLLM_OK) {
        out->packed = NULL;
        qllm_weight_clear(out);
    }
    return status;
}

qllm_status qllm_weight_vector(const qllm_decoder_config *config, const char *slot_name,
                               const float *values, int64_t n, int64_t *index, qllm_weight *out,
                               qllm_error *error)
{
    qllm_slot slot;
    memset(out, 0, sizeof *out);
    qllm_status status = find_slot(config, slot_name, QLLM_SLOT_VECTOR, index, &slot, error);
    if (status != QLLM_OK)
        return status;
    if (n != slot.rows)
        return qllm_fail(error, QLLM_VALUE, "slot '%s': %" PRId64 " values, expected %" PRId64,
                         slot.name, n, slot.rows);
    return copy_floats(values, n, slot.name, &out->values, error);
}

qllm_status qllm_qweight_copy(const qllm_qweight *source, const char *name, qllm_qweight *out,
                              qllm_error *error)
{
    qllm_status status = qllm_qweight_init(out, source->format, source->rows, source->cols,
                                           source->blocksize, name, error);
    if (status != QLLM_OK)
        return status;
    size_t blocks = (size_t)qllm_qweight_blocks(source);
    size_t nested = (size_t)qllm_qweight_nested_blocks(source);
    memcpy(out->data, source->data, (size_t)source->data_bytes);
    if (source->absmax != NULL)
        memcpy(out->absmax, source->absmax, blocks * sizeof(float));
    if (source->absmax_codes != NULL)
        memcpy(out->absmax_codes, source->absmax_codes, blocks);
    if (source->nested_absmax != NULL)
        memcpy(out->nested_absmax, source->nested_absmax, nested * sizeof(float));
    out->offset = source->offset;
    memcpy(out->code, source->code, sizeof out->code);
    memcpy(out->nested_code, source->nested_code, sizeof out->nested_code);
    return QLLM_OK;
}

qllm_status qllm_weight_embedding(const qllm_decoder_config *config, const qllm_qweight *source,
                                  qllm_qweight *out, qllm_error *error)
{
    qllm_slot slot;
    qllm_slot_describe(config, qllm_slot_of_embedding(config), &slot);
    qllm_status status = check_shape(&slot, source, error);
    if (status != QLLM_OK)
        return status;
    if (!qllm_format_is_float(source->format))
        return qllm_fail(error, QLLM_UNSUPPORTED, "slot 'embedding': format %s is not offered for "
                         "the embedding; use f32, f16 or bf16", qllm_format_name(source->format));
    return qllm_qweight_copy(source, slot.name, out, error);
}

bool qllm_weights_is_set(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t index)
{
    if (index == qllm_slot_of_embedding(config))
        return weights->embedding.rows > 0;
    return weights->slots[index].packed != NULL || weights->slots[index].values != NULL;
}

int64_t qllm_weights_missing(const qllm_weights *weights, const qllm_decoder_config *config)
{
    for (int64_t i = 0; i < weights->count; i++) {
        qllm_slot slot;
        if (qllm_weights_is_set(weights, config, i))
            continue;
        qllm_slot_describe(config, i, &slot);
        if (!slot.optional)
            return i;
    }
    return -1;
}

qllm_status qllm_weights_get(const qllm_weights *weights, const qllm_decoder_config *config,
                             const char *name, qllm_qweight *out, qllm_error *error)
{
    qllm_slot slot;
    int64_t index = qllm_slot_find(config, name);
    if (index < 0 || index != qllm_slot_of_embedding(config)) {
        qllm_status status = find_slot(config, name, QLLM_SLOT_LINEAR, &index, &slot, error);
        if (status != QLLM_OK)
            return status;
    }
    if (!qllm_weights_is_set(weights, config, index))
        return qllm_fail(error, QLLM_VALUE, "slot '%s': no weight has been set yet", name);
    if (index == qllm_slot_of_embedding(config))
        return qllm_qweight_copy(&weights->embedding, name, out, error);
    return qllm_unpack(weights->slots[index].packed, out, error);
}

void qllm_weights_nbytes(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t *linear, int64_t *embedding)
{
    *linear = 0;
    for (int64_t i = 0; i < weights->count; i++) {
        qllm_slot slot;
        qllm_slot_describe(config, i, &slot);
        if (weights->slots[i].packed != NULL)
            *linear += qllm_packed_nbytes(weights->slots[i].packed);
        if (weights->slots[i].values != NULL)
            *linear += slot.rows * (int64_t)sizeof(float);
    }
    *embedding = weights->embedding.rows > 0 ? qllm_qweight_nbytes(&weights->embedding) : 0;
}

void qllm_weights_embed(const qllm_weights *weights, int64_t token, float *out)
{
    const qllm_qweight *embedding = &weights->embedding;
    qllm_dtype dtype = embedding->format == QLLM_FORMAT_F32   ? QLLM_F32
                       : embedding->format == QLLM_FORMAT_F16 ? QLLM_F16
                                                              : QLLM_BF16;
    int64_t row_bytes = embedding->cols * qllm_dtype_size(dtype);
    qllm_to_float(embedding->data + token * row_bytes, dtype, embedding->cols, out);
}
