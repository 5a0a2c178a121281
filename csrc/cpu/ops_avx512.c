#include "cpu/lanes_avx512.h"

#include "cpu/attention_body.h"
#include "cpu/kernels.h"
#include "cpu/ops_body.h"

/* The sets beyond AVX-512 differ in their linear layers alone. */
#define OPS_TABLE(set, bf16)                                                                      \
    const qllm_cpu_ops qllm_cpu_ops_##set = {                                                     \
        .name = #set,                                                                             \
        .linear = qllm_linear_##set,                                                              \
        .linear_name = qllm_linear_name_##set,                                                    \
        .int8_activation = int8_activation,                                                       \
        .block_activation = block_activation,                                                     \
        .bf16_activation = bf16,                                                                  \
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
    }

OPS_TABLE(avx512, NULL);
OPS_TABLE(avx512vbmi, NULL);
OPS_TABLE(avx512bf16, qllm_bf16_activation_avx512bf16);
