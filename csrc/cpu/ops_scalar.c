#include "cpu/lanes_scalar.h"

#include "cpu/attention_body.h"
#include "cpu/kernels.h"
#include "cpu/ops_body.h"

const qllm_cpu_ops qllm_cpu_ops_scalar = {
    .name = LANES_ISA,
    .linear = qllm_linear_scalar,
    .linear_name = qllm_linear_name_scalar,
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
