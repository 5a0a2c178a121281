/* The functions over rows of logits (core/logit_ops.h), one table per instruction set, all with the
 * bits of qllm_logit_ops_core. */
#ifndef QLLM_CPU_LOGITS_H
#define QLLM_CPU_LOGITS_H

#include "core/logit_ops.h"
#include "cpu/features.h"

extern const qllm_logit_ops qllm_logit_ops_scalar, qllm_logit_ops_avx2, qllm_logit_ops_avx512;
extern const qllm_logit_ops qllm_logit_ops_neon, qllm_logit_ops_neondot;

/* The table of a compiled and supported set; a set without one of its own has the scalar one. */
const qllm_logit_ops *qllm_logit_ops_get(qllm_isa isa);

#endif
