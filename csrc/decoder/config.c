#include "decoder/config.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"

/* Far above any model, and low enough that products of three sizes fit int64_t. */
enum {
    SIZE_BOUND = 1 << 24,
    LAYER_BOUND = 1 << 16,
    HEAD_BOUND = 1 << 16,
    POSITION_BOUND = 1 << 30
};

static qllm_status check_size(const char *field, int64_t value, int64_t bound, qllm_error *error)
{
    if (value >= 1 && value <= bound)
        return QLLM_OK;
    return qllm_fail(error, QLLM_VALUE, "config: %s is %" PRId64 ", expected 1 to %" PRId64, field,
                     value, bound);
}

static qllm_status check_sizes(const qllm_decoder_config *c, qllm_error *error)
{
    const struct { const char *field; int64_t value, bound; } sizes[] = {
        {"vocab", c->vocab, SIZE_BOUND},       {"hidden", c->hidden, SIZE_BOUND},
        {"layers", c->layers, LAYER_BOUND},    {"heads", c->heads, HEAD_BOUND},
        {"kv_heads", c->kv_heads, HEAD_BOUND}, {"head_dim", c->head_dim, HEAD_BOUND},
        {"intermediate", c->intermediate, SIZE_BOUND},
        {"max_positions", c->max_positions, POSITION_BOUND},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        qllm_status status = check_size(sizes[i].field, sizes[i].value, sizes[i].bound, error);
        if (status != QLLM_OK)
            return status;
    }
    if (c->heads % c->kv_heads != 0)
        return qllm_fail(error, QLLM_VALUE, "config: heads (%" PRId64 ") is no multiple of "
                         "kv_heads (%" PRId64 ")", c->heads, c->kv_heads);
    if (c->heads * c->head_dim > SIZE_BOUND)
        return qllm_fail(error, QLLM_VALUE, "config: heads * head_dim is %" PRId64 ", expected at "
                         "most %d", c->heads * c->head_dim, SIZE_BOUND);
    return QLLM_OK;
}

static qllm_status check_finite(const char *field, const float *values, int64_t n,
                                qllm_error *error)
{
    if (values == NULL)
        return qllm_fail(error, QLLM_VALUE, "config: %s is missing, expected %" PRId64 " values",
                         field, n);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(values[i]))
            return qllm_fail(error, QLLM_VALUE, "config: %s[%" PRId64 "] is %g, expected a finite "
                             "number", field, i, (double)values[i]);
    return QLLM_OK;
}

static qllm_status check_rope(const qllm_decoder_config *c, qllm_error *error)
{
    if (c->rotary_dim < 2 || c->rotary_dim > c->head_dim || c->rotary_dim % 2 != 0)
        return qllm_fail(error, QLLM_VALUE, "config: rotary_dim is %" PRId64 ", expected an even "
                         "number from 2 to head_dim (%" PRId64 ")", c->rotary_dim, c->head_dim);
    if (!isfinite(c->rope_scale) || c->rope_scale <= 0)
        return qllm_fail(error, QLLM_VALUE, "config: rope_scale is %g, expected a finite number "
                         "above 0", (double)c->rope_scale);
    if (!isfinite(c->rope_dynamic_factor) || c->rope_dynamic_factor < 0)
        return qllm_fail(error, QLLM_VALUE, "config: rope_dynamic_factor is %g, expected a finite "
                         "number from 0 (off)", c->rope_dynamic_factor);
    if (c->rope_dynamic_factor > 0) {
        if (c->rotary_dim < 4)
            return qllm_fail(error, QLLM_VALUE, "config: rotary_dim is %" PRId64 ", but "
                             "rope_dynamic_factor needs at least 4", c->rotary_dim);
        if (!isfinite(c->rope_base) || c->rope_base <= 0)
            return qllm_fail(error, QLLM_VALUE, "config: rope_base is %g, expected a finite number "
                             "above 0", c->rope_base);
        qllm_status status = check_size("rope_original_positions", c->rope_original_positions,
                                        POSITION_BOUND, error);
        if (status != QLLM_OK)
            return status;
    }
    return check_finite("rope_inv_freq", c->rope_inv_freq, c->rotary_dim / 2, error);
}

static qllm_status check_kinds(const qllm_decoder_config *c, qllm_error *error)
{
    const struct { const char *field; int value, bound; } kinds[] = {
        {"block", (int)c->block, QLLM_BLOCK_PARALLEL2}, {"norm", (int)c->norm, QLLM_NORM_LAYER},
        {"activation", (int)c->activation, QLLM_ACT_GELU_TANH},
        {"position", (int)c->position, QLLM_POSITION_ALIBI},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (kinds[i].value < 0 || kinds[i].value > kinds[i].bound)
            return qllm_fail(error, QLLM_VALUE, "config: %s is %d, expected 0 to %d",
                             kinds[i].field, kinds[i].value, kinds[i].bound);
    return QLLM_OK;
}

qllm_status qllm_decoder_config_check(const qllm_decoder_config *config, qllm_error *error)
{
    qllm_status status = check_sizes(config, error);
    if (status == QLLM_OK)
        status = check_kinds(config, error);
    if (status != QLLM_OK)
        return status;
    if (!isfinite(config->norm_eps) || config->norm_eps < 0)
        return qllm_fail(error, QLLM_VALUE, "config: norm_eps is %g, expected a finite number "
                         "from 0", (double)config->norm_eps);
    if (!isfinite(config->attention_scale) || config->attention_scale <= 0)
        return qllm_fail(error, QLLM_VALUE, "config: attention_scale is %g, expected a finite "
                         "number above 0", (double)config->attention_scale);
    for (int64_t i = 0; config->sliding_window != NULL && i < config->layers; i++)
        if (config->sliding_window[i] < 0)
            return qllm_fail(error, QLLM_VALUE, "config: sliding_window[%" PRId64 "] is %" PRId64
                             ", expected a number of positions, or 0 for all", i,
                             config->sliding_window[i]);
    return config->position == QLLM_POSITION_ROPE
               ? check_rope(config, error)
               : check_finite("alibi_slopes", config->alibi_slopes, config->heads, error);
}

/* A copy of n elements of `size` bytes; `source` NULL gives NULL. */
static qllm_status copy_array(const void *source, int64_t n, int64_t size, const void **out,
                              qllm_error *error)
{
    void *copy = NULL;
    if (source != NULL) {
        qllm_status status = qllm_alloc(&copy, n, size, "the decoder's config", error);
        if (status != QLLM_OK)
            return status;
        memcpy(copy, source, (size_t)(n * size));
    }
    *out = copy;
    return QLLM_OK;
}

qllm_status qllm_decoder_config_copy(const qllm_decoder_config *config, qllm_decoder_config *out,
                                     qllm_error *error)
{
    bool rope = config->position == QLLM_POSITION_ROPE;
    const void *inv_freq = NULL, *slopes = NULL, *window = NULL;
    qllm_status status = copy_array(rope ? config->rope_inv_freq : NULL, config->rotary_dim / 2,
                                    sizeof(float), &inv_freq, error);
    if (status == QLLM_OK)
        status = copy_array(rope ? NULL : config->alibi_slopes, config->heads, sizeof(float),
                            &slopes, error);
    if (status == QLLM_OK)
        status = copy_array(config->sliding_window, config->layers, sizeof(int64_t), &window,
                            error);
    *out = *config;
    out->rope_inv_freq = inv_freq;
    out->alibi_slopes = slopes;
    out->sliding_window = window;
    if (status != QLLM_OK)
        qllm_decoder_config_clear(out);
    return status;
}

void qllm_decoder_config_clear(qllm_decoder_config *copy)
{
    qllm_free((void *)copy->rope_inv_freq);
    qllm_free((void *)copy->alibi_slopes);
    qllm_free((void *)copy->sliding_window);
    memset(copy, 0, sizeof *copy);
}
