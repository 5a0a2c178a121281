/* qllm_quantize of core/quant.h at the speed of memory, for standard bytes: the same results and
 * errors, bit for bit and word for word. */
#ifndef QLLM_CPU_QUANTIZE_H
#define QLLM_CPU_QUANTIZE_H

#include "cpu/packed.h"

qllm_status qllm_cpu_quantize(const qllm_packer *packer, const qllm_tensor *source,
                              qllm_format format, int64_t blocksize, bool allow_nonfinite,
                              const char *name, qllm_qweight *weight, qllm_error *error);

/* Quantizes `source` and keeps nothing: into small buffers, one for each thread.  For the float
 * formats it only looks for NaN and infinity.  What reading and quantizing cost by themselves. */
qllm_status qllm_cpu_quantize_pass(const qllm_packer *packer, const qllm_tensor *source,
                                   qllm_format format, int64_t blocksize, qllm_error *error);

#endif
