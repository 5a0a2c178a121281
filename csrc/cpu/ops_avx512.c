#include "cpu/lanes_avx512.h"

#include "cpu/attention_body.h"
#include "cpu/kernels.h"
#include "cpu/ops_body.h"

static void panel_activation(const float *x, int64_t cols, int64_t block, int64_t rows, int8_t *q,
                             float *scale)
{
    for (int64_t first = 0; first < cols; first += block, q += rows * block, scale += rows)
        round_block(false, x + first, block, q, scale);
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
