#include "cpu/logits.h"

const qllm_logit_ops *qllm_logit_ops_get(qllm_isa isa)
{
    switch (isa) {
#if defined(__x86_64__)
    case QLLM_ISA_AVX2: return &qllm_logit_ops_avx2;
    case QLLM_ISA_AVX512: /* the sets beyond differ in their linear layers alone */
    case QLLM_ISA_AVX512_VBMI:
    case QLLM_ISA_AVX512_BF16:
    case QLLM_ISA_AVX512_AMX: return &qllm_logit_ops_avx512;
#elif defined(__aarch64__)
    case QLLM_ISA_NEON: return &qllm_logit_ops_neon;
    case QLLM_ISA_NEONDOT: return &qllm_logit_ops_neondot;
#endif
    default: return &qllm_logit_ops_scalar;
    }
}
