#include "decoder/weights.h"

#include <string.h>

#include "core/alloc.h"

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

static qllm_packed *head_of(const qllm_weights *weights, const qllm_decoder_config *config)
{
    return weights->slots[qllm_slot_of_head(config)].packed;
}

void qllm_weights_clear(qllm_weights *weights)
{
    for (int64_t i = 0; i < weights->count; i++)
        if (weights->slots[i].packed == weights->embedding)
            weights->embedding = NULL; /* freed with the slot */
    qllm_packed_destroy(weights->embedding);
    for (int64_t i = 0; i < weights->count; i++)
        qllm_weight_clear(&weights->slots[i]);
    qllm_free(weights->slots);
    memset(weights, 0, sizeof *weights);
}

static qllm_status pack(const qllm_packer *packer, const qllm_slot *slot,
                        const qllm_weight_source *source, qllm_packed **out, qllm_error *error)
{
    if (source->weight != NULL)
        return qllm_pack(packer, source->weight, slot->name, out, error);
    return qllm_pack_source(packer, source->values, source->format, source->blocksize,
                            source->name, out, error);
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

qllm_status qllm_weight_pack(const qllm_decoder_config *config, const qllm_packer *packer,
                             const qllm_weight_source *source, int64_t *index, qllm_weight *out,
                             qllm_error *error)
{
    qllm_slot slot;
    memset(out, 0, sizeof *out);
    qllm_status status = qllm_check_linear(config, source, index, &slot, error);
    if (status != QLLM_OK)
        return status;
    if (source->bias != NULL)
        status = copy_floats(source->bias, source->bias_length, slot.name, &out->values, error);
    if (status == QLLM_OK)
        status = pack(packer, &slot, source, &out->packed, error);
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
    qllm_status status = qllm_check_vector(config, slot_name, n, index, &slot, error);
    if (status != QLLM_OK)
        return status;
    return copy_floats(values, n, slot.name, &out->values, error);
}

qllm_status qllm_weight_embedding(const qllm_decoder_config *config, const qllm_packer *packer,
                                  const qllm_weight_source *source, qllm_packed **out,
                                  qllm_error *error)
{
    qllm_slot slot;
    *out = NULL;
    qllm_status status = qllm_check_embedding(config, source, error);
    if (status != QLLM_OK)
        return status;
    qllm_slot_describe(config, qllm_slot_of_embedding(config), &slot);
    return pack(packer, &slot, source, out, error);
}

void qllm_weights_exchange(qllm_weights *weights, const qllm_decoder_config *config, int64_t index,
                           qllm_weight *fresh)
{
    qllm_weight old = weights->slots[index];
    weights->slots[index] = *fresh;
    if (index == qllm_slot_of_head(config) && old.packed == weights->embedding)
        old.packed = NULL;
    *fresh = old;
}

void qllm_weights_exchange_embedding(qllm_weights *weights, const qllm_decoder_config *config,
                                     qllm_packed **fresh)
{
    qllm_packed *old = weights->embedding;
    weights->embedding = *fresh;
    *fresh = old == head_of(weights, config) ? NULL : old;
}

qllm_status qllm_weights_tie(qllm_weights *weights, const qllm_decoder_config *config,
                             qllm_packed **old, qllm_error *error)
{
    qllm_packed *head = head_of(weights, config);
    *old = NULL;
    qllm_status status = qllm_check_tie(
        head != NULL, head != NULL ? qllm_packed_format(head) : QLLM_FORMAT_F32, error);
    if (status != QLLM_OK)
        return status;
    *old = head;
    qllm_weights_exchange_embedding(weights, config, old);
    return QLLM_OK;
}

bool qllm_weights_is_set(const qllm_weights *weights, const qllm_decoder_config *config,
                         int64_t index)
{
    if (index == qllm_slot_of_embedding(config))
        return weights->embedding != NULL;
    return weights->slots[index].packed != NULL || weights->slots[index].values != NULL;
}

int64_t qllm_weights_missing(const qllm_weights *weights, const qllm_decoder_config *config,
                             int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++) {
        qllm_slot slot;
        if (qllm_weights_is_set(weights, config, i))
            continue;
        qllm_slot_describe(config, i, &slot);
        if (!slot.optional)
            return i;
    }
    return -1;
}

qllm_status qllm_weights_find(const qllm_weights *weights, const qllm_decoder_config *config,
                              const char *name, const qllm_packed **out, qllm_error *error)
{
    int64_t index;
    qllm_status status = qllm_check_readable(config, name, &index, error);
    if (status != QLLM_OK)
        return status;
    *out = index == qllm_slot_of_embedding(config) ? weights->embedding
                                                   : weights->slots[index].packed;
    return *out != NULL ? QLLM_OK : qllm_refuse_unset(name, error);
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
    *embedding = 0;
    if (weights->embedding != NULL && weights->embedding != head_of(weights, config))
        *embedding = qllm_packed_nbytes(weights->embedding);
}

void qllm_weights_embed(const qllm_weights *weights, int64_t token, float *out)
{
    qllm_packed_row(weights->embedding, token, out);
}
