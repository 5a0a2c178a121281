#include "decoder/cpu_backend.h"

#include <stdlib.h>
#include <string.h>

#include "core/alloc.h"
#include "decoder/step.h"

/* The instruction set by name, else by the environment's QLLM_CPU, else the best. */
static qllm_status choose_isa(const char *variant, qllm_isa *isa, qllm_error *error)
{
    if (variant == NULL)
        variant = getenv("QLLM_CPU");
    return qllm_isa_choose(variant != NULL && variant[0] != '\0' ? variant : NULL, isa, error);
}

static void decoder_destroy(qllm_decoder *decoder)
{
    if (decoder == NULL)
        return;
    qllm_weights_clear(&decoder->weights);
    qllm_scratch_clear(&decoder->scratch);
    qllm_rope_clear(&decoder->rope);
    qllm_alibi_clear(&decoder->alibi);
    qllm_decoder_config_clear(&decoder->config);
    if (decoder->threads != NULL)
        qllm_threads_destroy(decoder->threads);
    pthread_mutex_destroy(&decoder->lock);
    qllm_free(decoder);
}

static qllm_status fill(qllm_decoder *decoder, const qllm_decoder_config *config,
                        const qllm_decoder_options *options, qllm_error *error)
{
    qllm_status status = qllm_decoder_config_copy(config, &decoder->config, error);
    if (status == QLLM_OK)
        status = qllm_weights_init(&decoder->config, &decoder->weights, error);
    if (status == QLLM_OK)
        status = qllm_threads_create(options->threads, &decoder->threads, error);
    decoder->packer = (qllm_packer){qllm_encode_ops_get(decoder->isa), decoder->threads};
    decoder->linear_options.compute = options->compute;
    decoder->linear_options.int8_threshold = options->int8_threshold;
    decoder->linear_options.int8_batch = options->int8_batch;
    qllm_kv_cache_init(&decoder->cache, config->layers, config->kv_heads, config->head_dim);
    return status;
}

static qllm_status decoder_create(const qllm_decoder_config *config,
                                  const qllm_decoder_options *options, qllm_decoder **out,
                                  qllm_error *error)
{
    void *memory;
    qllm_isa isa;
    *out = NULL;
    qllm_status status = qllm_decoder_config_check(config, error);
    if (status == QLLM_OK)
        status = choose_isa(options->variant, &isa, error);
    if (status == QLLM_OK)
        status = qllm_alloc(&memory, 1, sizeof(qllm_decoder), "a decoder", error);
    if (status != QLLM_OK)
        return status;
    qllm_decoder *decoder = memory;
    decoder->isa = isa;
    decoder->ops = qllm_cpu_ops_get(isa);
    if (pthread_mutex_init(&decoder->lock, NULL) != 0) {
        qllm_free(decoder);
        return qllm_fail(error, QLLM_MEMORY, "a decoder: the system has no lock left");
    }
    status = fill(decoder, config, options, error);
    if (status != QLLM_OK) {
        decoder_destroy(decoder);
        return status;
    }
    *out = decoder;
    return QLLM_OK;
}

static int64_t slot_count(const qllm_decoder *decoder)
{
    return qllm_slot_count(&decoder->config);
}

static void slot(qllm_decoder *decoder, int64_t index, qllm_slot *out)
{
    qllm_slot_describe(&decoder->config, index, out);
    pthread_mutex_lock(&decoder->lock);
    out->set = qllm_weights_is_set(&decoder->weights, &decoder->config, index);
    pthread_mutex_unlock(&decoder->lock);
}

static void exchange(qllm_decoder *decoder, int64_t index, qllm_weight *fresh)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_weights_exchange(&decoder->weights, &decoder->config, index, fresh);
    pthread_mutex_unlock(&decoder->lock);
    qllm_weight_clear(fresh);
}

static qllm_status put_linear(qllm_decoder *decoder, const qllm_weight_source *source,
                              qllm_error *error)
{
    int64_t index;
    qllm_weight fresh;
    qllm_status status = qllm_weight_pack(&decoder->config, &decoder->packer, source, &index,
                                          &fresh, error);
    if (status == QLLM_OK)
        exchange(decoder, index, &fresh);
    return status;
}

static qllm_status set_linear(qllm_decoder *decoder, const char *name, const qllm_qweight *weight,
                              const float *bias, int64_t bias_length, qllm_error *error)
{
    qllm_weight_source source = {.slot = name, .weight = weight, .bias = bias,
                                 .bias_length = bias_length};
    return put_linear(decoder, &source, error);
}

static qllm_status load_linear(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                               qllm_format format, int64_t blocksize, const char *name,
                               const float *bias, int64_t bias_length, qllm_error *error)
{
    qllm_weight_source source = {.slot = slot, .values = values, .format = format,
                                 .blocksize = blocksize, .name = name, .bias = bias,
                                 .bias_length = bias_length};
    return put_linear(decoder, &source, error);
}

static qllm_status set_vector(qllm_decoder *decoder, const char *name, const float *values,
                              int64_t n, qllm_error *error)
{
    int64_t index;
    qllm_weight fresh;
    qllm_status status = qllm_weight_vector(&decoder->config, name, values, n, &index, &fresh,
                                            error);
    if (status == QLLM_OK)
        exchange(decoder, index, &fresh);
    return status;
}

static qllm_status put_embedding(qllm_decoder *decoder, const qllm_weight_source *source,
                                 qllm_error *error)
{
    qllm_packed *fresh;
    qllm_status status = qllm_weight_embedding(&decoder->config, &decoder->packer, source, &fresh,
                                               error);
    if (status != QLLM_OK)
        return status;
    pthread_mutex_lock(&decoder->lock);
    qllm_weights_exchange_embedding(&decoder->weights, &decoder->config, &fresh);
    pthread_mutex_unlock(&decoder->lock);
    qllm_packed_destroy(fresh);
    return QLLM_OK;
}

static qllm_status set_embedding(qllm_decoder *decoder, const qllm_qweight *weight,
                                 qllm_error *error)
{
    qllm_weight_source source = {.weight = weight};
    return put_embedding(decoder, &source, error);
}

static qllm_status load_embedding(qllm_decoder *decoder, const qllm_tensor *values,
                                  qllm_format format, const char *name, qllm_error *error)
{
    qllm_weight_source source = {.values = values, .format = format, .name = name};
    return put_embedding(decoder, &source, error);
}

static qllm_status tie_embedding(qllm_decoder *decoder, qllm_error *error)
{
    qllm_packed *old;
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_weights_tie(&decoder->weights, &decoder->config, &old, error);
    pthread_mutex_unlock(&decoder->lock);
    qllm_packed_destroy(old);
    return status;
}

static qllm_status get_linear(qllm_decoder *decoder, const char *name, qllm_qweight *out,
                              qllm_error *error)
{
    const qllm_packed *packed;
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_weights_find(&decoder->weights, &decoder->config, name, &packed,
                                           error);
    if (status == QLLM_OK)
        status = qllm_unpack(&decoder->packer, packed, out, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status linear_error(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                                const char *name, qllm_quant_error *out, qllm_error *error)
{
    const qllm_packed *packed;
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_weights_find(&decoder->weights, &decoder->config, slot, &packed,
                                           error);
    if (status == QLLM_OK)
        status = qllm_packed_error(&decoder->packer, packed, values, name, out, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status sequence_create(qllm_decoder *decoder, qllm_sequence **out, qllm_error *error)
{
    return qllm_kv_sequence_create(decoder, &decoder->cache, out, error);
}

static qllm_status sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error)
{
    pthread_mutex_lock(&from->decoder->lock);
    qllm_status status = qllm_kv_sequence_fork(from, out, error);
    pthread_mutex_unlock(&from->decoder->lock);
    return status;
}

static qllm_status sequence_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error)
{
    pthread_mutex_lock(&sequence->decoder->lock);
    qllm_status status = qllm_kv_truncate(sequence, length, error);
    pthread_mutex_unlock(&sequence->decoder->lock);
    return status;
}

static int64_t sequence_length(const qllm_sequence *sequence)
{
    return atomic_load(&sequence->length);
}

static qllm_status step(qllm_decoder *decoder, qllm_sequence *const *sequences,
                        const int64_t *tokens, const bool *want, int64_t n, float *logits,
                        qllm_error *error)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_cpu_step(decoder, sequences, tokens, want, n, logits, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                         qllm_error *error)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_cpu_embed(decoder, tokens, n, hidden, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                          float *hidden, qllm_error *error)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_cpu_blocks(decoder, sequences, n, hidden, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                        qllm_error *error)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = qllm_cpu_head(decoder, hidden, n, logits, error);
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

static void nbytes(qllm_decoder *decoder, qllm_decoder_bytes *out)
{
    const qllm_decoder_config *config = &decoder->config;
    pthread_mutex_lock(&decoder->lock);
    qllm_weights_nbytes(&decoder->weights, config, &out->weights, &out->embedding);
    out->kv_cache = atomic_load(&decoder->cache.bytes);
    out->scratch = decoder->scratch.row_bytes + decoder->scratch.attention_bytes +
                   (decoder->rope.capacity * (config->rotary_dim / 2) * 2 +
                    decoder->alibi.capacity * config->heads) * (int64_t)sizeof(float);
    pthread_mutex_unlock(&decoder->lock);
}

static void info(const qllm_decoder *decoder, qllm_decoder_info *out)
{
    *out = (qllm_decoder_info){
        .variant = qllm_isa_name(decoder->isa),
        .model = qllm_cpu_features_get()->model,
        .compute = qllm_compute_name(decoder->linear_options.compute),
        .attention = "float32 keys and values",
        .threads = qllm_threads_count(decoder->threads),
        .int8_threshold = decoder->linear_options.int8_threshold,
        .int8_batch = decoder->linear_options.int8_batch,
    };
}

/* Adds `name` unless it is there; returns the new count. */
static int add_name(const char **names, int count, int capacity, const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0)
            return count;
    if (count < capacity)
        names[count++] = name;
    return count;
}

static int kernels(qllm_decoder *decoder, qllm_format format, const char **names, int capacity)
{
    int count = 0;
    pthread_mutex_lock(&decoder->lock);
    for (int64_t i = 0; i < decoder->weights.count; i++) {
        const qllm_packed *packed = decoder->weights.slots[i].packed;
        if (packed == NULL || qllm_packed_format(packed) != format)
            continue;
        qllm_tier tier = qllm_cpu_linear_tier(decoder->ops, packed,
                                              decoder->linear_options.compute);
        for (int64_t m = 1; m <= QLLM_STEP_ROWS; m *= 2)
            count = add_name(names, count, capacity, decoder->ops->linear_name(packed, tier, m));
    }
    pthread_mutex_unlock(&decoder->lock);
    return count;
}

const qllm_backend qllm_cpu_backend = {
    .abi = QLLM_BACKEND_ABI,
    .name = "cpu",
    .decoder_create = decoder_create,
    .decoder_destroy = decoder_destroy,
    .slot_count = slot_count,
    .slot = slot,
    .set_linear = set_linear,
    .load_linear = load_linear,
    .set_vector = set_vector,
    .set_embedding = set_embedding,
    .load_embedding = load_embedding,
    .tie_embedding = tie_embedding,
    .get_linear = get_linear,
    .linear_error = linear_error,
    .sequence_create = sequence_create,
    .sequence_fork = sequence_fork,
    .sequence_truncate = sequence_truncate,
    .sequence_length = sequence_length,
    .sequence_destroy = qllm_kv_sequence_destroy,
    .step = step,
    .embed = embed,
    .blocks = blocks,
    .head = head,
    .nbytes = nbytes,
    .info = info,
    .kernels = kernels,
};
