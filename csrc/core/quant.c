#include "core/quant.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/codebook.h"

enum { CHUNK = 1024 }; /* values that are held as float32 at a time */

uint32_t qllm_largest_bits(const float *x, int64_t n)
{
    int32_t largest = 0; /* signed: SSE2 has no unsigned comparison */
    for (int64_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(qllm_bits_from_float(x[i]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

static const void *element(const qllm_tensor *source, int64_t i)
{
    return (const uint8_t *)source->data + i * qllm_dtype_size(source->dtype);
}

uint32_t qllm_overflow_bits(qllm_dtype dtype)
{
    switch (dtype) {
    case QLLM_F16: return 0x477ff000u;  /* 65520 */
    case QLLM_BF16: return 0x7f7f8000u; /* 3.396e38 */
    case QLLM_F32: break;
    }
    return 0x7f800000u;
}

static qllm_status check_range(const float *x, int64_t first, int64_t n, const qllm_tensor *source,
                               qllm_format format, const char *name, qllm_error *error)
{
    uint32_t limit = qllm_overflow_bits(qllm_format_dtype(format));
    if (qllm_largest_bits(x, n) < limit)
        return QLLM_OK;
    int64_t i = 0;
    while (i < n - 1 && qllm_largest_bits(x + i, 1) < limit)
        i++;
    return qllm_fail(error, QLLM_VALUE, "%s: the value %g at row %" PRId64 ", column %" PRId64
                     " is beyond the range of %s; use %s", name, (double)x[i],
                     (first + i) / source->cols, (first + i) % source->cols,
                     qllm_format_name(format), format == QLLM_FORMAT_F16 ? "bf16 or f32" : "f32");
}

qllm_status qllm_quantize_check(const qllm_tensor *source, qllm_format format, const char *name,
                                qllm_error *error)
{
    int64_t elements = source->rows * source->cols;
    float x[CHUNK];
    qllm_status status = qllm_tensor_check_finite(source, name, error);
    if (!qllm_format_is_float(format))
        return status;
    for (int64_t first = 0; status == QLLM_OK && first < elements; first += CHUNK) {
        int64_t n = elements - first < CHUNK ? elements - first : CHUNK;
        qllm_to_float(element(source, first), source->dtype, n, x);
        status = check_range(x, first, n, source, format, name, error);
    }
    return status;
}

static qllm_status round_to_float_format(const qllm_tensor *source, bool allow_nonfinite,
                                         const char *name, qllm_qweight *weight, qllm_error *error)
{
    int64_t elements = source->rows * source->cols;
    qllm_dtype dtype = qllm_format_dtype(weight->format);
    float x[CHUNK];
    if (dtype == source->dtype) {
        if (elements > 0)
            memcpy(weight->data, source->data, (size_t)weight->data_bytes);
        return QLLM_OK;
    }
    for (int64_t first = 0; first < elements; first += CHUNK) {
        int64_t n = elements - first < CHUNK ? elements - first : CHUNK;
        qllm_to_float(element(source, first), source->dtype, n, x);
        if (!allow_nonfinite &&
            check_range(x, first, n, source, weight->format, name, error) != QLLM_OK)
            return QLLM_VALUE;
        qllm_from_float(x, dtype, n, weight->data + first * qllm_dtype_size(dtype));
    }
    return QLLM_OK;
}

static qllm_status quantize_values(const qllm_tensor *source, bool allow_nonfinite,
                                   const char *name, qllm_qweight *weight, qllm_error *error)
{
    void *memory = NULL;
    if (qllm_format_is_float(weight->format))
        return round_to_float_format(source, allow_nonfinite, name, weight, error);
    if (weight->format == QLLM_FORMAT_INT8) {
        qllm_quantize_int8(source, weight);
        return QLLM_OK;
    }
    if (!qllm_format_is_nested(weight->format)) {
        qllm_quantize_4bit(source, weight->absmax, weight);
        return QLLM_OK;
    }
    qllm_status status = qllm_alloc(&memory, qllm_qweight_blocks(weight), sizeof(float),
                                    "the absmax values of a weight", error);
    if (status == QLLM_OK) {
        qllm_quantize_4bit(source, memory, weight);
        qllm_quantize_nested(memory, weight);
    }
    qllm_free(memory);
    return status;
}

qllm_status qllm_quantize(const qllm_tensor *source, qllm_format format, int64_t blocksize,
                          bool allow_nonfinite, const char *name, qllm_qweight *weight,
                          qllm_error *error)
{
    *weight = (qllm_qweight){.format = QLLM_FORMAT_F32};
    qllm_status status = qllm_tensor_check(source, name, error);
    if (status == QLLM_OK && !allow_nonfinite)
        status = qllm_tensor_check_finite(source, name, error);
    if (status == QLLM_OK)
        status = qllm_qweight_init(weight, format, source->rows, source->cols, blocksize, name,
                                   error);
    if (status == QLLM_OK)
        status = quantize_values(source, allow_nonfinite, name, weight, error);
    if (status != QLLM_OK)
        qllm_qweight_clear(weight);
    return status;
}

void qllm_dequantize(const qllm_qweight *weight, int64_t first, int64_t count, float *out)
{
    if (count <= 0)
        return;
    if (qllm_format_is_4bit(weight->format))
        qllm_dequantize_4bit(weight, first, count, out);
    else if (weight->format == QLLM_FORMAT_INT8)
        qllm_dequantize_int8(weight, first, count, out);
    else {
        qllm_dtype dtype = qllm_format_dtype(weight->format);
        qllm_to_float(weight->data + first * qllm_dtype_size(dtype), dtype, count, out);
    }
}

typedef struct partial_sums {
    double absolute[16], squared[16], signal[16], largest;
} partial_sums;

/* A piece of a row that begins at a multiple of 16. */
static void add_piece(const float *x, const float *y, int64_t n, partial_sums *sums)
{
    for (int64_t i = 0; i < n; i++) {
        double value = x[i], difference = fabs(value - (double)y[i]);
        sums->absolute[i % 16] += difference;
        sums->squared[i % 16] += difference * difference;
        sums->signal[i % 16] += value * value;
        sums->largest = difference > sums->largest ? difference : sums->largest;
    }
}

static void fold(partial_sums *sums, qllm_error_sums *out)
{
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) {
            sums->absolute[j] += sums->absolute[j + step];
            sums->squared[j] += sums->squared[j + step];
            sums->signal[j] += sums->signal[j + step];
        }
    *out = (qllm_error_sums){sums->absolute[0], sums->squared[0], sums->signal[0], sums->largest};
}

void qllm_add_row_error(qllm_error_sums *sums, const qllm_error_sums *row)
{
    sums->absolute += row->absolute;
    sums->squared += row->squared;
    sums->signal += row->signal;
    sums->largest = row->largest > sums->largest ? row->largest : sums->largest;
}

void qllm_finish_error(const qllm_error_sums *sums, int64_t elements, qllm_quant_error *out)
{
    double count = elements > 0 ? (double)elements : 1.0;
    out->mean_abs = sums->absolute / count;
    out->max_abs = isnan(sums->absolute) ? NAN : sums->largest;
    out->rmse = sqrt(sums->squared / count);
    out->sqnr_db = sums->squared == 0.0 ? INFINITY : 10.0 * log10(sums->signal / sums->squared);
}

static void measure_row(const qllm_tensor *source, const qllm_qweight *weight, int64_t row,
                        qllm_error_sums *out)
{
    float x[CHUNK], y[CHUNK];
    partial_sums sums = {.largest = 0.0};
    for (int64_t k = 0; k < source->cols; k += CHUNK) {
        int64_t n = source->cols - k < CHUNK ? source->cols - k : CHUNK;
        int64_t first = row * source->cols + k;
        qllm_to_float(element(source, first), source->dtype, n, x);
        qllm_dequantize(weight, first, n, y);
        add_piece(x, y, n, &sums);
    }
    fold(&sums, out);
}

qllm_status qllm_quantization_error(const qllm_tensor *source, const qllm_qweight *weight,
                                    const char *name, qllm_quant_error *out, qllm_error *error)
{
    qllm_error_sums sums = {.largest = 0.0}, row;
    qllm_status status = qllm_tensor_check(source, name, error);
    if (status != QLLM_OK)
        return status;
    if (source->rows != weight->rows || source->cols != weight->cols)
        return qllm_fail(error, QLLM_VALUE, "%s: shape (%" PRId64 ", %" PRId64 ") does not match "
                         "the quantized weight's (%" PRId64 ", %" PRId64 ")", name, source->rows,
                         source->cols, weight->rows, weight->cols);
    for (int64_t r = 0; r < source->rows; r++) {
        measure_row(source, weight, r, &row);
        qllm_add_row_error(&sums, &row);
    }
    qllm_finish_error(&sums, source->rows * source->cols, out);
    return QLLM_OK;
}
