#include "cpu/lanes_neon.h"

#include "cpu/attention_body.h"
#include "cpu/kernels.h"
#include "cpu/ops_body.h"

const qllm_cpu_ops qllm_cpu_ops_neondot = {
    .name = LANES_ISA,
    .linear = qllm_linear_neondot,
    .linear_name = qllm_linear_name_neondot,
    .int8_activation = int8_activation,
    .block_activation = block_activation,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rope = rope,
    .attention = attention,
    .attention_scores = attention_scores,
    .attention_weights = attention_weights,
    .attention_values = attention_values,
    .silu = silu,
    .gelu = gelu,
    .gelu_tanh = gelu_tanh,
    .add = add,
};
