/* Inside the CPU device: what the files of one instruction set hand to its table. */
#ifndef QLLM_CPU_KERNELS_H
#define QLLM_CPU_KERNELS_H

#include "cpu/cpu_ops.h"

typedef void qllm_linear_kernel(const qllm_packed *weight, const float *bias, const qllm_rows *rows,
                                int64_t tile_begin, int64_t tile_end, float *y, int64_t y_stride);
typedef const char *qllm_linear_namer(const qllm_packed *weight, qllm_tier tier, int64_t m);

qllm_linear_kernel qllm_linear_scalar, qllm_linear_avx2, qllm_linear_avx512,
    qllm_linear_avx512vbmi, qllm_linear_avx512bf16, qllm_linear_avx512amx, qllm_linear_neon,
    qllm_linear_neondot;
/* int8 weights; in tier bf16x2 4-bit weights (more than 16 rows, and up to 16) and bf16 weights; in
 * tier int8 4-bit weights */
qllm_linear_kernel qllm_linear_int8_avx512amx, qllm_linear_4bit_avx512amx,
    qllm_linear_4bit_square_avx512amx, qllm_linear_bf16_avx512amx, qllm_linear_4bit_int8_avx512amx;
qllm_linear_namer qllm_linear_name_scalar, qllm_linear_name_avx2, qllm_linear_name_avx512,
    qllm_linear_name_avx512vbmi, qllm_linear_name_avx512bf16, qllm_linear_name_avx512amx,
    qllm_linear_name_neon, qllm_linear_name_neondot;

void qllm_bf16_activation_avx512bf16(const float *x, int64_t cols, uint16_t *q);
int64_t qllm_panel_rows_avx512amx(qllm_tier tier, int64_t distance, int64_t m);
void qllm_pairs_activation_avx512amx(const float *x, int64_t cols, int64_t distance, int64_t rows,
                                     uint16_t *q);

extern const qllm_cpu_ops qllm_cpu_ops_scalar, qllm_cpu_ops_avx2, qllm_cpu_ops_avx512,
    qllm_cpu_ops_avx512vbmi, qllm_cpu_ops_avx512bf16, qllm_cpu_ops_avx512amx, qllm_cpu_ops_neon,
    qllm_cpu_ops_neondot;

#endif
