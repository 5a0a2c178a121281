/* Quantize, dequantize and measure the error, for every format.  Definitions: docs/formats.md. */
#ifndef QLLM_CORE_QUANT_H
#define QLLM_CORE_QUANT_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/device.h"
#include "core/elementary.h"
#include "core/qweight.h"

/* Quantizes the matrix `source` (rows, cols) of f32, f16 or bf16 into *weight, which is initialised
 * here and owned by the caller; on failure it is empty.  `blocksize` is used by the 4-bit formats
 * only.  NaN and infinity are an error that names the tensor, the row, the column and the value,
 * unless allow_nonfinite: then everything that shares a scale with one reads back as NaN, which is
 * its block (nf4, fp4), its row (int8) or its group of 256 blocks (the -dq forms), and every other
 * value is unharmed.  The float formats round to nearest; a finite value beyond the range of the
 * format is an error, unless allow_nonfinite: then it becomes infinity. */
qllm_status qllm_quantize(const qllm_tensor *source, qllm_format format, int64_t blocksize,
                          bool allow_nonfinite, const char *name, qllm_qweight *weight,
                          qllm_error *error);

/* The error of qllm_quantize for the values of a valid tensor, without allow_nonfinite; QLLM_OK
 * when it would accept them. */
qllm_status qllm_quantize_check(const qllm_tensor *source, qllm_format format, const char *name,
                                qllm_error *error);

/* Bits of the smallest |x| that rounds to infinity. */
uint32_t qllm_overflow_bits(qllm_dtype dtype);

/* Dequantizes `count` elements from flat index `first` into out, exactly as qweight.h defines. */
void qllm_dequantize(const qllm_qweight *weight, int64_t first, int64_t count, float *out);

typedef struct qllm_quant_error {
    double mean_abs;  /* mean |w - w'| */
    double max_abs;   /* max |w - w'| */
    double rmse;      /* sqrt(mean (w - w')^2) */
    double sqnr_db;   /* 10 log10(sum w^2 / sum (w - w')^2); +inf without error */
} qllm_quant_error;

/* Sums in float64.  In a row, element i goes to partial sum i % 16, and partial j += partial j + 8
 * (j < 8), + 4, + 2, + 1; rows are added in ascending order. */
typedef struct qllm_error_sums {
    double absolute, squared, signal, largest;
} qllm_error_sums;

void qllm_add_row_error(qllm_error_sums *sums, const qllm_error_sums *row);
void qllm_finish_error(const qllm_error_sums *sums, int64_t elements, qllm_quant_error *out);

/* Error of `weight` against `source` of the same shape, in float64. */
qllm_status qllm_quantization_error(const qllm_tensor *source, const qllm_qweight *weight,
                                    const char *name, qllm_quant_error *out, qllm_error *error);

/* Per-family parts, called by the functions above (one file each). `weight` is initialised;
 * source values have been checked or allowed.  absmax (blocks) receives the scales, NaN for a block
 * that holds NaN or infinity; for nf4 and fp4 it is weight->absmax itself. */
void qllm_quantize_4bit(const qllm_tensor *source, float *absmax, qllm_qweight *weight);
void qllm_dequantize_4bit(const qllm_qweight *weight, int64_t first, int64_t count, float *out);
void qllm_quantize_nested(const float *absmax, qllm_qweight *weight); /* quant_dq.c */
void qllm_quantize_int8(const qllm_tensor *source, qllm_qweight *weight); /* quant_int8.c */
void qllm_dequantize_int8(const qllm_qweight *weight, int64_t first, int64_t count, float *out);

/* Double quantization in its parts: the mean over the values that are not NaN, float64 sums in
 * ascending order and one rounding to float32 at the end; and the second-level absmax of up to 256
 * values, the largest |absmax - offset|, NaN where one is NaN. */
float qllm_nested_offset(const float *absmax, int64_t blocks);
float qllm_nested_largest(const float *absmax, int64_t n, float offset);

/* The largest |x| of n values as bits of a float32: above 0x7f800000 where one is NaN, equal to it
 * where one is infinite. */
uint32_t qllm_largest_bits(const float *x, int64_t n);

/* LLM.int8() activations (Dettmers et al., arXiv 2208.07339): one row x (cols) -> q (cols) int8 and
 * *scale = absmax / 127 over the elements with |x| < threshold (threshold <= 0: all elements),
 * q = round-half-even(x * (127 / absmax)), every operation rounded to float32.  The other elements,
 * NaN among them, are outliers: they get q = 0, and their column indices are written, ascending, to
 * outliers (cols; NULL allowed when threshold <= 0), their number to *n_outliers.  A row of zeros,
 * or so small that 127 / absmax is infinite (absmax below 3.8e-37), gets q = 0 and scale 0; a row
 * that holds NaN or infinity where these are no outliers gets q = 0 and scale NaN. */
void qllm_int8_activation(const float *x, int64_t cols, float threshold, int8_t *q, float *scale,
                          int32_t *outliers, int64_t *n_outliers);

/* The same in its parts.  Whether x is an outlier: */
QLLM_BOTH static inline bool qllm_is_int8_outlier(float x, float threshold)
{
    return threshold > 0.0f && !(fabsf(x) < threshold);
}

/* `largest`: the bits of the largest |x| that is no outlier.  Returns the scale of the row; *factor
 * is what x is multiplied by before rounding, or 0 where every q is 0. */
QLLM_BOTH static inline float qllm_int8_scale(uint32_t largest, float *factor)
{
    const uint32_t infinity = 0x7f800000u;
    float absmax = qllm_float_from_bits(largest);
    *factor = 127.0f / absmax;
    if (largest < infinity && qllm_bits_from_float(*factor) < infinity)
        return absmax / 127.0f;
    *factor = 0.0f;
    return largest < infinity ? 0.0f : NAN;
}

/* q of an x that is no outlier */
QLLM_BOTH static inline int8_t qllm_int8_code(float x, float factor)
{
    return factor > 0.0f ? (int8_t)qllm_round_half_even(x * factor) : (int8_t)0;
}

#endif
