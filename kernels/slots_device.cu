/* Weights by slot, in device memory.  What replaces a weight is made first, then the old one is
 * freed; the embedding may be the head's weight, held once. */
#include <string.h>

#include "decoder.h"
#include "skinny.h"

extern "C" {
#include "core/alloc.h"
}

qllm_status gpu_slots_init(qllm_decoder *decoder, qllm_error *error)
{
    void *linears, *vectors;
    int64_t slots = qllm_slot_count(&decoder->config);
    qllm_status status = qllm_alloc(&linears, slots, sizeof(gpu_weight), "the table of weights",
                                    error);
    if (status != QLLM_OK)
        return status;
    decoder->linears = (gpu_weight *)linears;
    status = qllm_alloc(&vectors, slots, sizeof(float *), "the table of weights", error);
    if (status != QLLM_OK)
        return status;
    decoder->vectors = (float **)vectors;
    decoder->slots = slots;
    return QLLM_OK;
}

/* With its bias. */
static void clear_weight(gpu_weight *weight)
{
    gpu_weight_clear(weight);
    memset(weight, 0, sizeof *weight);
}

void gpu_slots_clear(qllm_decoder *decoder)
{
    for (int64_t i = 0; i < decoder->slots; i++) {
        clear_weight(&decoder->linears[i]);
        gpu_free(decoder->vectors[i]);
    }
    clear_weight(&decoder->own_embedding);
    qllm_free(decoder->linears);
    qllm_free(decoder->vectors);
}

static gpu_weight *head_of(const qllm_decoder *decoder)
{
    return &decoder->linears[qllm_slot_of_head(&decoder->config)];
}

bool gpu_slot_is_set(const qllm_decoder *decoder, int64_t index)
{
    if (index == qllm_slot_of_embedding(&decoder->config))
        return decoder->embedding != NULL;
    return decoder->linears[index].data != NULL || decoder->vectors[index] != NULL;
}

qllm_status gpu_slots_check(const qllm_decoder *decoder, int64_t begin, int64_t end,
                            qllm_error *error)
{
    for (int64_t i = begin; i < end; i++) {
        qllm_slot slot;
        if (gpu_slot_is_set(decoder, i))
            continue;
        qllm_slot_describe(&decoder->config, i, &slot);
        if (!slot.optional)
            return qllm_refuse_missing(&decoder->config, i, error);
    }
    return QLLM_OK;
}

/* A copy of n values in device memory. */
static qllm_status upload(qllm_decoder *decoder, const float *values, int64_t n, const char *what,
                          float **out, qllm_error *error)
{
    void *memory;
    int64_t bytes = n * (int64_t)sizeof(float);
    *out = NULL;
    qllm_status status = gpu_alloc_trimmed(&decoder->pages, bytes, &memory, GPU_WEIGHTS, what,
                                           error);
    if (status == QLLM_OK)
        status = gpu_check(gpu_copy_in(memory, values, bytes, decoder->stream), what, error);
    if (status == QLLM_OK)
        *out = (float *)memory;
    else
        gpu_free(memory);
    return status;
}

/* In tiles are the linear layers of compute="auto", but not int8 ones whose outliers depend on the
 * whole batch, nor an embedding of its own. */
static bool in_tiles(const qllm_decoder *decoder, qllm_format format, int memory)
{
    return memory == GPU_WEIGHTS && !decoder->exact &&
           !(format == QLLM_FORMAT_INT8 && decoder->int8_batch);
}

/* The weight of a source, without a bias. */
static qllm_status make_weight(qllm_decoder *decoder, const qllm_weight_source *source, int memory,
                               gpu_weight *out, qllm_error *error)
{
    qllm_format format = qllm_source_format(source);
    bool tiled = in_tiles(decoder, format, memory);
    if (source->weight != NULL)
        return gpu_weight_set(&decoder->device, out, source->weight, tiled, memory,
                              decoder->stream, error);
    return gpu_weight_load(&decoder->device, out, source->values, format, source->blocksize,
                           source->name, tiled, memory, decoder->stream, error);
}

/* The same, once more without the free pages of keys and values when memory is short. */
static qllm_status make(qllm_decoder *decoder, const qllm_weight_source *source, int memory,
                        gpu_weight *out, qllm_error *error)
{
    qllm_status status = make_weight(decoder, source, memory, out, error);
    if (status == QLLM_MEMORY && gpu_pages_trim(&decoder->pages))
        status = make_weight(decoder, source, memory, out, error);
    return status;
}

/* Puts a weight into the place of another, which is freed once the device is done with it. */
static void replace(qllm_decoder *decoder, gpu_weight *place, const gpu_weight *fresh)
{
    gpu_weight old = *place;
    *place = *fresh;
    decoder->generation++;
    clear_weight(&old);
}

/* An embedding that was the head's weight stays, as a weight of its own. */
static void part_from_head(qllm_decoder *decoder)
{
    if (decoder->embedding != head_of(decoder))
        return;
    decoder->own_embedding = *decoder->embedding;
    gpu_free(decoder->own_embedding.bias);
    decoder->own_embedding.bias = NULL;
    decoder->embedding = &decoder->own_embedding;
    memset(head_of(decoder), 0, sizeof(gpu_weight));
}

/* Puts a weight into its slot. */
static void put(qllm_decoder *decoder, int64_t index, bool is_embedding, const gpu_weight *fresh)
{
    if (is_embedding) {
        decoder->embedding = &decoder->own_embedding;
        replace(decoder, &decoder->own_embedding, fresh);
        return;
    }
    if (index == qllm_slot_of_head(&decoder->config))
        part_from_head(decoder);
    replace(decoder, &decoder->linears[index], fresh);
}

qllm_status gpu_slot_put_linear(qllm_decoder *decoder, const qllm_weight_source *source,
                                qllm_error *error)
{
    int64_t index;
    qllm_slot slot;
    gpu_weight fresh;
    float *bias = NULL;
    qllm_status status = qllm_check_linear(&decoder->config, source, &index, &slot, error);
    if (status == QLLM_OK && source->bias != NULL)
        status = upload(decoder, source->bias, slot.rows, slot.name, &bias, error);
    if (status == QLLM_OK)
        status = make(decoder, source, GPU_WEIGHTS, &fresh, error);
    if (status != QLLM_OK) {
        gpu_free(bias);
        return status;
    }
    fresh.bias = bias;
    put(decoder, index, false, &fresh);
    return QLLM_OK;
}

qllm_status gpu_slot_put_vector(qllm_decoder *decoder, const char *name, const float *values,
                                int64_t n, qllm_error *error)
{
    int64_t index;
    qllm_slot slot;
    float *fresh;
    qllm_status status = qllm_check_vector(&decoder->config, name, n, &index, &slot, error);
    if (status == QLLM_OK)
        status = upload(decoder, values, n, slot.name, &fresh, error);
    if (status != QLLM_OK)
        return status;
    float *old = decoder->vectors[index];
    decoder->vectors[index] = fresh;
    decoder->generation++;
    gpu_free(old);
    return QLLM_OK;
}

qllm_status gpu_slot_put_embedding(qllm_decoder *decoder, const qllm_weight_source *source,
                                   qllm_error *error)
{
    gpu_weight fresh;
    qllm_status status = qllm_check_embedding(&decoder->config, source, error);
    if (status == QLLM_OK)
        status = make(decoder, source, GPU_EMBEDDING, &fresh, error);
    if (status == QLLM_OK)
        put(decoder, 0, true, &fresh);
    return status;
}

qllm_status gpu_slot_put_random(qllm_decoder *decoder, const char *name, qllm_format format,
                                int64_t blocksize, uint64_t seed, qllm_error *error)
{
    int64_t index;
    qllm_slot slot;
    qllm_qweight described;
    gpu_weight fresh;
    qllm_status status = qllm_check_readable(&decoder->config, name, &index, error);
    if (status != QLLM_OK)
        return status;
    qllm_slot_describe(&decoder->config, index, &slot);
    bool is_embedding = slot.kind == QLLM_SLOT_EMBEDDING;
    status = qllm_qweight_describe(&described, format, slot.rows, slot.cols, blocksize, slot.name,
                                   error);
    qllm_weight_source source = {};
    source.slot = name;
    source.weight = &described;
    if (status == QLLM_OK)
        status = is_embedding ? qllm_check_embedding(&decoder->config, &source, error)
                              : qllm_check_linear(&decoder->config, &source, &index, &slot, error);
    int memory = is_embedding ? GPU_EMBEDDING : GPU_WEIGHTS;
    if (status == QLLM_OK)
        status = gpu_weight_random(&decoder->device, &fresh, &described, seed,
                                   in_tiles(decoder, format, memory), memory, decoder->stream,
                                   error);
    if (status == QLLM_OK)
        put(decoder, index, is_embedding, &fresh);
    return status;
}

qllm_status gpu_slot_tie(qllm_decoder *decoder, qllm_error *error)
{
    const gpu_weight *head = head_of(decoder);
    const gpu_weight none = {};
    qllm_status status = qllm_check_tie(head->data != NULL, head->format, error);
    if (status != QLLM_OK)
        return status;
    decoder->embedding = head;
    replace(decoder, &decoder->own_embedding, &none);
    return QLLM_OK;
}

qllm_status gpu_slot_get(qllm_decoder *decoder, const char *slot, qllm_qweight *out,
                         qllm_error *error)
{
    int64_t index;
    qllm_status status = qllm_check_readable(&decoder->config, slot, &index, error);
    if (status != QLLM_OK)
        return status;
    if (!gpu_slot_is_set(decoder, index))
        return qllm_refuse_unset(slot, error);
    const gpu_weight *weight = index == qllm_slot_of_embedding(&decoder->config)
                                   ? decoder->embedding : &decoder->linears[index];
    return gpu_weight_get(&decoder->device, weight, out, decoder->stream, error);
}

void gpu_slots_bytes(const qllm_decoder *decoder, int64_t *weights, int64_t *embedding)
{
    *weights = 0;
    for (int64_t i = 0; i < decoder->slots; i++) {
        const gpu_weight *weight = &decoder->linears[i];
        qllm_slot slot;
        qllm_slot_describe(&decoder->config, i, &slot);
        if (weight->data != NULL)
            *weights += weight->bytes;
        if (weight->bias != NULL || decoder->vectors[i] != NULL)
            *weights += slot.rows * (int64_t)sizeof(float);
    }
    *embedding = decoder->own_embedding.data != NULL ? decoder->own_embedding.bytes : 0;
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

int gpu_slots_kernels(const qllm_decoder *decoder, qllm_format format, const char **names,
                      int capacity)
{
    int count = 0;
    for (int64_t i = 0; i < decoder->slots; i++) {
        const gpu_weight *weight = &decoder->linears[i];
        if (weight->data == NULL || weight->format != format)
            continue;
        if (!weight->tiled)
            count = add_name(names, count, capacity, gpu_exact_linear_name(format));
        for (int64_t m = 1; weight->tiled && m <= GPU_STEP_ROWS; m *= 2)
            count = add_name(names, count, capacity, gpu_linear_name(format, m));
    }
    return count;
}
