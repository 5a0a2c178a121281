/* The rows of an input as bitsandbytes rounds them for LLM.int8() (its int8_vectorwise_quant). */
#ifndef QLLM_CPU_ROUND_INT8_H
#define QLLM_CPU_ROUND_INT8_H

#include "cpu/image.h"

/* x (m, cols) of dtype, contiguous -> q (m, cols) and absmax (m) over the elements with
 * |x| < threshold (<= 0: all).  used (cols): 1 for the columns that hold another element in any
 * row; with more than one row these are 0 in every row of q.  Rounding as in
 * qllm_int8_activation. */
qllm_status qllm_round_int8(const qllm_multiplier *by, const void *x, qllm_dtype dtype, int64_t m,
                            int64_t cols, float threshold, int8_t *q, float *absmax, uint8_t *used,
                            qllm_error *error);

#endif
