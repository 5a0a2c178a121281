#include "decoder/positions.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/dtype.h"

enum { FIRST_CAPACITY = 256 };

/* At least `positions`, doubling, not beyond the model's last position. */
static int64_t next_capacity(int64_t capacity, int64_t positions, int64_t max_positions)
{
    int64_t next = capacity > 0 ? 2 * capacity : FIRST_CAPACITY;
    next = next < positions ? positions : next;
    return next < max_positions ? next : max_positions;
}

/* The rotation of pair i at a position beyond the original ones, dynamic NTK. */
static float dynamic_inv_freq(const qllm_decoder_config *config, int64_t position, int64_t pair)
{
    float factor = (float)config->rope_dynamic_factor;
    float dim = (float)config->rotary_dim;
    float stretch = factor * (float)(position + 1) / (float)config->rope_original_positions;
    stretch -= (float)(config->rope_dynamic_factor - 1.0);
    float exponent = (float)((double)config->rotary_dim / (double)(config->rotary_dim - 2));
    float base = (float)config->rope_base * (float)pow(stretch, exponent);
    return 1.0f / (float)pow(base, (float)(2 * pair) / dim);
}

static void rope_position(const qllm_decoder_config *config, int64_t position, float *cos_row,
                          float *sin_row)
{
    bool dynamic = config->rope_dynamic_factor > 0 && position >= config->rope_original_positions;
    for (int64_t i = 0; i < config->rotary_dim / 2; i++) {
        float inv_freq = dynamic ? dynamic_inv_freq(config, position, i) : config->rope_inv_freq[i];
        double angle = (float)position * inv_freq;
        cos_row[i] = (float)cos(angle) * config->rope_scale;
        sin_row[i] = (float)sin(angle) * config->rope_scale;
    }
}

qllm_status qllm_rope_grow(qllm_rope *rope, const qllm_decoder_config *config, int64_t positions,
                           qllm_error *error)
{
    static const char what[] = "the table of rotations";
    if (positions <= rope->capacity)
        return QLLM_OK;
    int64_t half = config->rotary_dim / 2;
    int64_t capacity = next_capacity(rope->capacity, positions, config->max_positions);
    void *cos_table, *sin_table;
    qllm_status status = qllm_alloc(&cos_table, capacity * half, sizeof(float), what, error);
    if (status != QLLM_OK)
        return status;
    status = qllm_alloc(&sin_table, capacity * half, sizeof(float), what, error);
    if (status != QLLM_OK) {
        qllm_free(cos_table);
        return status;
    }
    if (rope->capacity > 0) {
        memcpy(cos_table, rope->cos, (size_t)(rope->capacity * half) * sizeof(float));
        memcpy(sin_table, rope->sin, (size_t)(rope->capacity * half) * sizeof(float));
    }
    for (int64_t t = rope->capacity; t < capacity; t++)
        rope_position(config, t, (float *)cos_table + t * half, (float *)sin_table + t * half);
    qllm_rope_clear(rope);
    rope->cos = cos_table;
    rope->sin = sin_table;
    rope->capacity = capacity;
    return QLLM_OK;
}

void qllm_rope_clear(qllm_rope *rope)
{
    qllm_free(rope->cos);
    qllm_free(rope->sin);
    memset(rope, 0, sizeof *rope);
}

static float round_bf16(float value)
{
    return qllm_bf16_to_float(qllm_float_to_bf16(value));
}

qllm_status qllm_alibi_grow(qllm_alibi *alibi, const qllm_decoder_config *config, int64_t positions,
                            qllm_error *error)
{
    if (positions <= alibi->capacity)
        return QLLM_OK;
    int64_t capacity = next_capacity(alibi->capacity, positions, config->max_positions);
    float root = (float)sqrt((double)config->head_dim);
    void *table;
    qllm_status status = qllm_alloc(&table, config->heads * capacity, sizeof(float),
                                    "the table of position biases", error);
    if (status != QLLM_OK)
        return status;
    for (int64_t h = 0; h < config->heads; h++) {
        float slope = round_bf16(config->alibi_slopes[h]);
        float *row = (float *)table + h * capacity;
        for (int64_t j = 0; j < capacity; j++)
            row[j] = round_bf16(slope * round_bf16((float)j)) / root;
    }
    qllm_alibi_clear(alibi);
    alibi->bias = table;
    alibi->capacity = capacity;
    return QLLM_OK;
}

void qllm_alibi_clear(qllm_alibi *alibi)
{
    qllm_free(alibi->bias);
    memset(alibi, 0, sizeof *alibi);
}
