#include "cpu/lanes_avx512.h"

#include "cpu/attention_body.h"
#include "cpu/kernels.h"
#include "cpu/ops_body.h"

/* Tier int16: the high and the low bytes of a block, each in the order of lanes_store_quads. */
static void round_halves(const float *x, int64_t block, int8_t *high, int8_t *low, float *scale)
{
    float factor = block_factor(true, x, block, scale);
    for (int64_t i = 0; i < block; i += 16) {
        lanes scaled = factor != 0.0f ? lanes_mul(lanes_load(x + i), lanes_set1(factor))
                                      : lanes_zero();
        lanes_store_halves(high + i, low + i, scaled);
    }
}

static void panel_activation(qllm_tier tier, const float *x, int64_t cols, int64_t block,
                             int64_t rows, int8_t *q, float *scale)
{
    int64_t square = rows * block;
    for (int64_t first = 0; first < cols; first += block, scale += rows)
        if (tier == QLLM_TIER_INT16) {
            round_halves(x + first, block, q, q + square, scale);
            q += 2 * square;
        } else {
            round_block(false, x + first, block, q, scale);
            q += square;
        }
}

/* The sets beyond AVX-512 differ in their linear layers alone. */
#define OPS_TABLE(set, ...)                                                                       \
    const qllm_cpu_ops qllm_cpu_ops_##set = {                                                     \
        .name = #set,                                                                             \
        .linear = qllm_linear_##set,                                                              \
        .linear_name = qllm_linear_name_##set,                                                    \
        .int8_activation = int8_activation,                                                       \
        .block_activation = block_activation,                                                     \
        .rms_norm = rms_norm,                                                                     \
        .layer_norm = layer_norm,                                                                 \
        .rope = rope,                                                                             \
        .attention = attention,                                                                   \
        .attention_scores = attention_scores,                                                     \
        .attention_weights = attention_weights,                                                   \
        .attention_values = attention_values,                                                     \
        .silu = silu,                                                                             \
        .gelu = gelu,                                                                             \
        .gelu_tanh = gelu_tanh,                                                                   \
        .add = add,                                                                               \
        __VA_ARGS__                                                                               \
    }

OPS_TABLE(avx512, .bf16_activation = NULL);
OPS_TABLE(avx512vbmi, .bf16_activation = NULL);
OPS_TABLE(avx512bf16, .bf16_activation = qllm_bf16_activation_avx512bf16);
OPS_TABLE(avx512amx, .panel_rows = qllm_panel_rows_avx512amx,
          .panel_activation = panel_activation,
          .pairs_activation = qllm_pairs_activation_avx512amx);
