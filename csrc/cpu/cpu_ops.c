#include "cpu/cpu_ops.h"

#include "cpu/kernels.h"

const qllm_cpu_ops *qllm_cpu_ops_get(qllm_isa isa)
{
    switch (isa) {
#if defined(__x86_64__)
    case QLLM_ISA_AVX2: return &qllm_cpu_ops_avx2;
    case QLLM_ISA_AVX512: return &qllm_cpu_ops_avx512;
    case QLLM_ISA_AVX512_VBMI: return &qllm_cpu_ops_avx512vbmi;
    case QLLM_ISA_AVX512_BF16: return &qllm_cpu_ops_avx512bf16;
    case QLLM_ISA_AVX512_AMX: return &qllm_cpu_ops_avx512amx;
#elif defined(__aarch64__)
    case QLLM_ISA_NEON: return &qllm_cpu_ops_neon;
    case QLLM_ISA_NEONDOT: return &qllm_cpu_ops_neondot;
#endif
    default: return &qllm_cpu_ops_scalar;
    }
}
