/* Inside the CPU device: the limits of each instruction set. */
#ifndef QLLM_CPU_LIMITS_TABLES_H
#define QLLM_CPU_LIMITS_TABLES_H

#include "cpu/limits.h"

extern const qllm_limits qllm_limits_scalar, qllm_limits_avx2, qllm_limits_avx512;
extern const qllm_limits qllm_limits_avx512amx;
extern const qllm_limits qllm_limits_neon, qllm_limits_neondot;

/* of qllm_limits_avx512, for the sets beyond */
uint64_t qllm_read_avx512(const uint8_t *data, int64_t bytes);
int64_t qllm_multiply_avx512(qllm_unit unit, int64_t turns);

#endif
