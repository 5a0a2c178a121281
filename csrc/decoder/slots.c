#include "decoder/slots.h"

#include <inttypes.h>
#include <string.h>

static const char *const part_names[QLLM_PART_COUNT] = {
    "attention_norm.weight", "attention_norm.bias", "mlp_norm.weight", "mlp_norm.bias",
    "q", "k", "v", "qkv", "q_norm.weight", "k_norm.weight", "o", "gate", "up", "down",
};

static bool has_part(const qllm_decoder_config *config, qllm_part part)
{
    bool two_norms = config->block != QLLM_BLOCK_PARALLEL;
    bool norm_bias = config->norm == QLLM_NORM_LAYER;
    switch (part) {
    case QLLM_PART_ATTENTION_NORM_BIAS: return norm_bias;
    case QLLM_PART_MLP_NORM: return two_norms;
    case QLLM_PART_MLP_NORM_BIAS: return two_norms && norm_bias;
    case QLLM_PART_Q:
    case QLLM_PART_K:
    case QLLM_PART_V: return !config->fused_qkv;
    case QLLM_PART_QKV: return config->fused_qkv;
    case QLLM_PART_Q_NORM:
    case QLLM_PART_K_NORM: return config->qk_norm;
    case QLLM_PART_GATE: return config->gated;
    default: return true;
    }
}

/* The number of parts of a layer that stand before `part`. */
static int64_t parts_before(const qllm_decoder_config *config, int part)
{
    int64_t count = 0;
    for (int i = 0; i < part; i++)
        count += has_part(config, (qllm_part)i);
    return count;
}

int64_t qllm_slot_of_embedding(const qllm_decoder_config *config)
{
    (void)config;
    return 0;
}

int64_t qllm_slot_of_part(const qllm_decoder_config *config, int64_t layer, qllm_part part)
{
    if (!has_part(config, part))
        return -1;
    return 1 + layer * parts_before(config, QLLM_PART_COUNT) + parts_before(config, part);
}

int64_t qllm_slot_of_final_norm(const qllm_decoder_config *config)
{
    return 1 + config->layers * parts_before(config, QLLM_PART_COUNT);
}

int64_t qllm_slot_of_final_norm_bias(const qllm_decoder_config *config)
{
    return config->norm == QLLM_NORM_LAYER ? qllm_slot_of_final_norm(config) + 1 : -1;
}

int64_t qllm_slot_of_head(const qllm_decoder_config *config)
{
    return qllm_slot_of_final_norm(config) + (config->norm == QLLM_NORM_LAYER ? 2 : 1);
}

int64_t qllm_slot_count(const qllm_decoder_config *config)
{
    return qllm_slot_of_head(config) + 1;
}

static void shape(qllm_slot *slot, qllm_slot_kind kind, int64_t rows, int64_t cols)
{
    slot->kind = kind;
    slot->rows = rows;
    slot->cols = cols;
}

static void set_name(qllm_slot *slot, const char *name)
{
    qllm_format_text(slot->name, sizeof slot->name, "%s", name);
}

static void describe_part(const qllm_decoder_config *config, qllm_part part, qllm_slot *out)
{
    int64_t q_rows = config->heads * config->head_dim;
    int64_t kv_rows = config->kv_heads * config->head_dim;
    switch (part) {
    case QLLM_PART_ATTENTION_NORM_BIAS:
    case QLLM_PART_MLP_NORM_BIAS:
        out->optional = true; /* fall through */
    case QLLM_PART_ATTENTION_NORM:
    case QLLM_PART_MLP_NORM: shape(out, QLLM_SLOT_VECTOR, config->hidden, 1); break;
    case QLLM_PART_Q_NORM:
    case QLLM_PART_K_NORM: shape(out, QLLM_SLOT_VECTOR, config->head_dim, 1); break;
    case QLLM_PART_Q: shape(out, QLLM_SLOT_LINEAR, q_rows, config->hidden); break;
    case QLLM_PART_K:
    case QLLM_PART_V: shape(out, QLLM_SLOT_LINEAR, kv_rows, config->hidden); break;
    case QLLM_PART_QKV: shape(out, QLLM_SLOT_LINEAR, q_rows + 2 * kv_rows, config->hidden); break;
    case QLLM_PART_O: shape(out, QLLM_SLOT_LINEAR, config->hidden, q_rows); break;
    case QLLM_PART_GATE:
    case QLLM_PART_UP: shape(out, QLLM_SLOT_LINEAR, config->intermediate, config->hidden); break;
    case QLLM_PART_DOWN: shape(out, QLLM_SLOT_LINEAR, config->hidden, config->intermediate); break;
    case QLLM_PART_COUNT: break;
    }
}

static void describe_layer_slot(const qllm_decoder_config *config, int64_t index, qllm_slot *out)
{
    int64_t per_layer = parts_before(config, QLLM_PART_COUNT);
    int64_t layer = (index - 1) / per_layer;
    for (int part = 0; part < QLLM_PART_COUNT; part++)
        if (qllm_slot_of_part(config, layer, (qllm_part)part) == index) {
            describe_part(config, (qllm_part)part, out);
            qllm_format_text(out->name, sizeof out->name, "layers.%" PRId64 ".%s", layer,
                             part_names[part]);
        }
}

void qllm_slot_describe(const qllm_decoder_config *config, int64_t index, qllm_slot *out)
{
    memset(out, 0, sizeof *out);
    if (index == qllm_slot_of_embedding(config)) {
        shape(out, QLLM_SLOT_EMBEDDING, config->vocab, config->hidden);
        set_name(out, "embedding");
    } else if (index < qllm_slot_of_final_norm(config)) {
        describe_layer_slot(config, index, out);
    } else if (index == qllm_slot_of_head(config)) {
        shape(out, QLLM_SLOT_LINEAR, config->vocab, config->hidden);
        set_name(out, "head");
    } else {
        out->optional = index == qllm_slot_of_final_norm_bias(config);
        shape(out, QLLM_SLOT_VECTOR, config->hidden, 1);
        set_name(out, out->optional ? "final_norm.bias" : "final_norm.weight");
    }
}

/* The slot that "layers.<number>.<part>" would name, or -1. */
static int64_t find_layer_slot(const qllm_decoder_config *config, const char *name)
{
    static const char prefix[] = "layers.";
    int64_t layer = 0;
    if (strncmp(name, prefix, sizeof prefix - 1) != 0)
        return -1;
    const char *at = name + sizeof prefix - 1;
    for (; *at >= '0' && *at <= '9' && layer < config->layers; at++)
        layer = 10 * layer + (*at - '0');
    if (*at != '.' || layer >= config->layers)
        return -1;
    for (int part = 0; part < QLLM_PART_COUNT; part++)
        if (strcmp(at + 1, part_names[part]) == 0)
            return qllm_slot_of_part(config, layer, (qllm_part)part);
    return -1;
}

int64_t qllm_slot_find(const qllm_decoder_config *config, const char *name)
{
    int64_t candidates[] = {
        find_layer_slot(config, name), qllm_slot_of_embedding(config), qllm_slot_of_head(config),
        qllm_slot_of_final_norm(config), qllm_slot_of_final_norm_bias(config),
    };
    for (size_t i = 0; i < sizeof candidates / sizeof candidates[0]; i++) {
        qllm_slot slot;
        if (candidates[i] < 0)
            continue;
        qllm_slot_describe(config, candidates[i], &slot);
        if (strcmp(slot.name, name) == 0)
            return candidates[i];
    }
    return -1;
}
