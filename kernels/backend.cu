/* The GPU's entry in the table of devices. */
#include <string.h>

#include "attention.h"
#include "decoder.h"
#include "driver.h"
#include "linear_entry.h"

extern "C" {
#include "core/alloc.h"
#include "core/checked.h"
}

/* Every entry from outside: the lock, and the device for this thread. */
static qllm_status enter(qllm_decoder *decoder, qllm_error *error)
{
    pthread_mutex_lock(&decoder->lock);
    qllm_status status = gpu_device_use(&decoder->device, error);
    if (status != QLLM_OK)
        pthread_mutex_unlock(&decoder->lock);
    return status;
}

static qllm_status leave(qllm_decoder *decoder, qllm_status status)
{
    pthread_mutex_unlock(&decoder->lock);
    return status;
}

/* What the kernels are compiled for. */
static void name_variant(const gpu_device *device, char *out, size_t capacity)
{
    if (strcmp(GPU_BACKEND_NAME, "cuda") == 0)
        qllm_format_text(out, capacity, "sm_%d%d", device->major, device->minor);
    else
        qllm_format_text(out, capacity, "%s", GPU_BACKEND_NAME);
}

/* a decoder's life ----------------------------------------------------------------------------- */

static void destroy(qllm_decoder *decoder)
{
    if (decoder == NULL)
        return;
    gpu_device_use(&decoder->device, NULL);
    if (decoder->stream != NULL)
        gpu_stream_wait(decoder->stream);
    gpu_auto_graphs_destroy(decoder->graphs);
    gpu_sampler_clear(&decoder->sampler);
    gpu_step_clear(decoder);
    gpu_slots_clear(decoder);
    gpu_pages_clear(&decoder->pages);
    gpu_stream_destroy(decoder->stream);
    qllm_decoder_config_clear(&decoder->config);
    pthread_mutex_destroy(&decoder->lock);
    qllm_free(decoder);
}

static qllm_status check_options(const qllm_decoder_options *options, qllm_error *error)
{
    if (options->variant != NULL)
        return qllm_fail(error, QLLM_UNSUPPORTED, "isa is '%.40s', but device '%s' has no choice "
                         "of instruction sets; leave isa out", options->variant, GPU_BACKEND_NAME);
    return gpu_check_compute(options->compute, error);
}

/* Bytes of a page: [layer][kv_head][keys | values]. */
static qllm_status page_bytes(const qllm_decoder *decoder, int64_t *bytes, qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    int64_t value = decoder->exact ? sizeof(float) : sizeof(uint16_t);
    if (qllm_checked_mul(c->layers, c->kv_heads, bytes) &&
        qllm_checked_mul(*bytes, 2 * GPU_PAGE * value, bytes) &&
        qllm_checked_mul(*bytes, c->head_dim, bytes))
        return QLLM_OK;
    return qllm_fail(error, QLLM_MEMORY, "keys and values: %d positions are more than can be "
                     "addressed", GPU_PAGE);
}

static qllm_status fill(qllm_decoder *decoder, const qllm_decoder_config *config,
                        const qllm_decoder_options *options, qllm_error *error)
{
    int64_t bytes = 0;
    decoder->sampler.device = &decoder->device;
    decoder->exact = options->compute == QLLM_COMPUTE_EXACT;
    decoder->int8_threshold = options->int8_threshold;
    decoder->int8_batch = options->int8_batch;
    qllm_status status = gpu_device_open(options->index, &decoder->device, error);
    name_variant(&decoder->device, decoder->variant, sizeof decoder->variant);
    if (status == QLLM_OK)
        status = gpu_stream_create(&decoder->stream, error);
    if (status == QLLM_OK)
        status = qllm_decoder_config_copy(config, &decoder->config, error);
    if (status == QLLM_OK)
        status = gpu_slots_init(decoder, error);
    if (status == QLLM_OK)
        status = gpu_step_init(decoder, error);
    if (status == QLLM_OK)
        status = page_bytes(decoder, &bytes, error);
    if (status == QLLM_OK)
        status = gpu_pages_init(&decoder->pages, &decoder->device, decoder->stream, bytes, error);
    return status;
}

static qllm_status create(const qllm_decoder_config *config, const qllm_decoder_options *options,
                          qllm_decoder **out, qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_decoder_config_check(config, error);
    if (status == QLLM_OK)
        status = check_options(options, error);
    if (status == QLLM_OK)
        status = qllm_alloc(&memory, 1, sizeof(qllm_decoder), "a decoder", error);
    if (status != QLLM_OK)
        return status;
    qllm_decoder *decoder = (qllm_decoder *)memory;
    if (pthread_mutex_init(&decoder->lock, NULL) != 0) {
        qllm_free(decoder);
        return qllm_fail(error, QLLM_MEMORY, "a decoder: the system has no lock left");
    }
    status = fill(decoder, config, options, error);
    if (status != QLLM_OK) {
        destroy(decoder);
        return status;
    }
    *out = decoder;
    return QLLM_OK;
}

/* weights -------------------------------------------------------------------------------------- */

static int64_t slot_count(const qllm_decoder *decoder)
{
    return decoder->slots;
}

static void slot(qllm_decoder *decoder, int64_t index, qllm_slot *out)
{
    qllm_slot_describe(&decoder->config, index, out);
    pthread_mutex_lock(&decoder->lock);
    out->set = gpu_slot_is_set(decoder, index);
    pthread_mutex_unlock(&decoder->lock);
}

static qllm_status put_linear(qllm_decoder *decoder, const qllm_weight_source *source,
                              qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_slot_put_linear(decoder, source, error)) : status;
}

static qllm_status put_embedding(qllm_decoder *decoder, const qllm_weight_source *source,
                                 qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_slot_put_embedding(decoder, source, error))
                             : status;
}

static qllm_status set_linear(qllm_decoder *decoder, const char *name, const qllm_qweight *weight,
                              const float *bias, int64_t bias_length, qllm_error *error)
{
    qllm_weight_source source = {};
    source.slot = name;
    source.weight = weight;
    source.bias = bias;
    source.bias_length = bias_length;
    return put_linear(decoder, &source, error);
}

static qllm_status load_linear(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                               qllm_format format, int64_t blocksize, const char *name,
                               const float *bias, int64_t bias_length, qllm_error *error)
{
    const qllm_weight_source source = {slot, NULL, values, format, blocksize, name, bias,
                                       bias_length};
    return put_linear(decoder, &source, error);
}

static qllm_status set_vector(qllm_decoder *decoder, const char *name, const float *values,
                              int64_t n, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_slot_put_vector(decoder, name, values, n, error))
                             : status;
}

static qllm_status set_embedding(qllm_decoder *decoder, const qllm_qweight *weight,
                                 qllm_error *error)
{
    qllm_weight_source source = {};
    source.weight = weight;
    return put_embedding(decoder, &source, error);
}

static qllm_status load_embedding(qllm_decoder *decoder, const qllm_tensor *values,
                                  qllm_format format, const char *name, qllm_error *error)
{
    qllm_weight_source source = {};
    source.values = values;
    source.format = format;
    source.name = name;
    return put_embedding(decoder, &source, error);
}

static qllm_status tie_embedding(qllm_decoder *decoder, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_slot_tie(decoder, error)) : status;
}

static qllm_status set_random(qllm_decoder *decoder, const char *name, qllm_format format,
                              int64_t blocksize, uint64_t seed, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK
               ? leave(decoder, gpu_slot_put_random(decoder, name, format, blocksize, seed, error))
               : status;
}

static qllm_status get_linear(qllm_decoder *decoder, const char *name, qllm_qweight *out,
                              qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_slot_get(decoder, name, out, error)) : status;
}

static qllm_status linear_error(qllm_decoder *decoder, const char *slot, const qllm_tensor *values,
                                const char *name, qllm_quant_error *out, qllm_error *error)
{
    qllm_qweight weight;
    qllm_status status = get_linear(decoder, slot, &weight, error);
    if (status != QLLM_OK)
        return status;
    status = qllm_quantization_error(values, &weight, name, out, error);
    qllm_qweight_clear(&weight);
    return status;
}

/* sequences and steps -------------------------------------------------------------------------- */

static qllm_status sequence_create(qllm_decoder *decoder, qllm_sequence **out, qllm_error *error)
{
    return gpu_sequence_create(decoder, &decoder->pages, out, error);
}

static qllm_status sequence_fork(qllm_sequence *from, qllm_sequence **out, qllm_error *error)
{
    pthread_mutex_lock(&from->decoder->lock);
    return leave(from->decoder, gpu_sequence_fork(from, out, error));
}

static qllm_status sequence_truncate(qllm_sequence *sequence, int64_t length, qllm_error *error)
{
    pthread_mutex_lock(&sequence->decoder->lock);
    return leave(sequence->decoder, gpu_sequence_truncate(sequence, length, error));
}

static qllm_status step(qllm_decoder *decoder, qllm_sequence *const *sequences,
                        const int64_t *tokens, const bool *want, int64_t n, float *logits,
                        qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_step_run(decoder, sequences, tokens, want, n,
                                                           logits, error))
                             : status;
}

static qllm_status step_draw(qllm_decoder *decoder, qllm_sequence *const *sequences,
                             const int64_t *tokens, const bool *want, int64_t n,
                             const qllm_draw *draws, int64_t n_draws, qllm_sampled *out,
                             float *logits, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_step_draw(decoder, sequences, tokens, want, n,
                                                            draws, n_draws, out, logits, error))
                             : status;
}

static qllm_status embed(qllm_decoder *decoder, const int64_t *tokens, int64_t n, float *hidden,
                         qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_step_embed(decoder, tokens, n, hidden, error))
                             : status;
}

static qllm_status blocks(qllm_decoder *decoder, qllm_sequence *const *sequences, int64_t n,
                          float *hidden, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_step_blocks(decoder, sequences, n, hidden, error))
                             : status;
}

static qllm_status head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits,
                        qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK ? leave(decoder, gpu_step_head(decoder, hidden, n, logits, error))
                             : status;
}

static qllm_status logit_stats(qllm_decoder *decoder, const float *ref, const float *test,
                               int64_t rows, const double *temperatures, int64_t n_temperatures,
                               const int64_t *targets, const qllm_logit_stats *out,
                               uint8_t *same_top, qllm_error *error)
{
    qllm_status status = enter(decoder, error);
    return status == QLLM_OK
               ? leave(decoder, gpu_logit_stats(decoder, ref, test, rows, temperatures,
                                                n_temperatures, targets, out, same_top, error))
               : status;
}

/* reports -------------------------------------------------------------------------------------- */

static void nbytes(qllm_decoder *decoder, qllm_decoder_bytes *out)
{
    int64_t spare;
    pthread_mutex_lock(&decoder->lock);
    gpu_slots_bytes(decoder, &out->weights, &out->embedding);
    gpu_pages_bytes(&decoder->pages, &out->kv_cache, &spare);
    out->scratch = decoder->device.held[GPU_SCRATCH] + spare;
    pthread_mutex_unlock(&decoder->lock);
}

static void info(const qllm_decoder *decoder, qllm_decoder_info *out)
{
    *out = {};
    out->variant = decoder->variant;
    out->model = decoder->device.name;
    out->attention = decoder->exact ? "float32 keys and values"
                                    : gpu_attention_name(decoder->config.head_dim);
    out->compute = qllm_compute_name(decoder->exact ? QLLM_COMPUTE_EXACT : QLLM_COMPUTE_AUTO);
    out->threads = 1;
    out->int8_threshold = decoder->int8_threshold;
    out->int8_batch = decoder->int8_batch;
}

static int kernels(qllm_decoder *decoder, qllm_format format, const char **names, int capacity)
{
    pthread_mutex_lock(&decoder->lock);
    int count = gpu_slots_kernels(decoder, format, names, capacity);
    pthread_mutex_unlock(&decoder->lock);
    return count;
}

/* the table ------------------------------------------------------------------------------------ */

static qllm_status device(int index, qllm_device_facts *out, qllm_error *error)
{
    gpu_device found;
    *out = {};
    qllm_status status = gpu_device_open(index, &found, error);
    if (status != QLLM_OK)
        return status;
    qllm_format_text(out->name, sizeof out->name, "%s", found.name);
    name_variant(&found, out->variant, sizeof out->variant);
    gpu_driver_version(out->driver, sizeof out->driver);
    out->memory_bytes = found.memory_bytes;
    return gpu_check(gpu_driver_memory(&out->free_bytes), "asking for free memory", error);
}

static qllm_backend make_table()
{
    qllm_backend table = {};
    table.abi = QLLM_BACKEND_ABI;
    table.name = GPU_BACKEND_NAME;
    table.device = device;
    table.limits = gpu_limits;
    gpu_linear_entries(&table);
    table.decoder_create = create;
    table.decoder_destroy = destroy;
    table.slot_count = slot_count;
    table.slot = slot;
    table.set_linear = set_linear;
    table.load_linear = load_linear;
    table.set_vector = set_vector;
    table.set_embedding = set_embedding;
    table.load_embedding = load_embedding;
    table.tie_embedding = tie_embedding;
    table.set_random = set_random;
    table.get_linear = get_linear;
    table.linear_error = linear_error;
    table.sequence_create = sequence_create;
    table.sequence_fork = sequence_fork;
    table.sequence_truncate = sequence_truncate;
    table.sequence_length = gpu_sequence_length;
    table.sequence_destroy = gpu_sequence_destroy;
    table.step = step;
    table.embed = embed;
    table.blocks = blocks;
    table.head = head;
    table.step_draw = step_draw;
    table.logit_stats = logit_stats;
    table.nbytes = nbytes;
    table.info = info;
    table.kernels = kernels;
    return table;
}

/* As core/backend.h says (QLLM_DEVICE_TABLE). */
GPU_EXPORT const qllm_backend *qllm_device_table(qllm_error *error)
{
    static const qllm_backend table = make_table();
    gpu_device found;
    return gpu_device_open(0, &found, error) == QLLM_OK ? &table : NULL;
}
