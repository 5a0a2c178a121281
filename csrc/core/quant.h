/* Quantize, dequantize and measure the error, for every format.  Definitions: docs/formats.md. */
#ifndef QLLM_CORE_QUANT_H
#define QLLM_CORE_QUANT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/qweight.h"

/* Quantizes the matrix `source` (rows, cols) of f32, f16 or bf16 into *weight, which is initialised
 * here and owned by the caller.  `blocksize` is used by the 4-bit formats only.  NaN and infinity
 * are an error that names the tensor, the row, the column and the value, unless allow_nonfinite:
 * then a block (4-bit) or row (int8) that holds one gets absmax NaN and reads back as NaN
 * throughout, and every other block is unharmed.  The float formats round to nearest and keep them. */
qllm_status qllm_quantize(const qllm_tensor *source, qllm_format format, int64_t blocksize,
                          bool allow_nonfinite, const char *name, qllm_qweight *weight,
                          qllm_error *error);

/* Dequantizes `count` elements from flat index `first` into out, exactly as qweight.h defines. */
void qllm_dequantize(const qllm_qweight *weight, int64_t first, int64_t count, float *out);

typedef struct qllm_quant_error {
    double mean_abs;  /* mean |w - w'| */
    double max_abs;   /* max |w - w'| */
    double rmse;      /* sqrt(mean (w - w')^2) */
    double sqnr_db;   /* 10 log10(sum w^2 / sum (w - w')^2); +inf without error */
} qllm_quant_error;

/* Error of `weight` against `source` of the same shape, in float64. */
qllm_status qllm_quantization_error(const qllm_tensor *source, const qllm_qweight *weight,
                                    const char *name, qllm_quant_error *out, qllm_error *error);

/* Per-family parts, called by the functions above (one file each). `weight` is initialised;
 * source values have been checked or allowed. */
void qllm_quantize_4bit(const qllm_tensor *source, qllm_qweight *weight); /* quant_4bit.c */
void qllm_dequantize_4bit(const qllm_qweight *weight, int64_t first, int64_t count, float *out);
qllm_status qllm_quantize_nested(const float *absmax, qllm_qweight *weight,
                                 qllm_error *error); /* quant_dq.c */
float qllm_nested_absmax_at(const qllm_qweight *weight, int64_t block);
void qllm_quantize_int8(const qllm_tensor *source, qllm_qweight *weight); /* quant_int8.c */
void qllm_dequantize_int8(const qllm_qweight *weight, int64_t first, int64_t count, float *out);

/* LLM.int8() activations (Dettmers et al., arXiv 2208.07339): one row x (cols) -> q (cols) int8 and
 * *scale = absmax / 127 over the elements with |x| < threshold (threshold <= 0: all elements).
 * q = round-half-even(x * (127 / absmax)); elements at or above the threshold get q = 0 and their
 * column indices are written, ascending, to outliers (cols), their number to *n_outliers. */
void qllm_int8_activation(const float *x, int64_t cols, float threshold, int8_t *q, float *scale,
                          int32_t *outliers, int64_t *n_outliers);

#endif
