/* LLM.int8() (Dettmers et al., arXiv 2208.07339): docs/formats.md. */
#include <math.h>
#include <string.h>

#include "core/elementary.h"
#include "core/quant.h"

enum { CHUNK = 1024 };

/* bitsandbytes casts weights to float16 first, whatever their dtype. */
static void round_to_half(float *x, int64_t n)
{
    uint16_t half[CHUNK];
    qllm_from_float(x, QLLM_F16, n, half);
    qllm_to_float(half, QLLM_F16, n, x);
}

static void encode_half(const float *x, int64_t n, float scale, int8_t *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (int8_t)(int32_t)qllm_round_half_even(x[i] * scale);
}

static void encode_wide(const float *x, int64_t n, double scale, int8_t *out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (int8_t)(int32_t)qllm_round_half_even((float)(x[i] * scale));
}

static const uint8_t *row_at(const qllm_tensor *source, int64_t row, int64_t column)
{
    return (const uint8_t *)source->data +
           (row * source->cols + column) * qllm_dtype_size(source->dtype);
}

static float row_absmax(const qllm_tensor *source, int64_t row)
{
    float x[CHUNK];
    uint32_t largest = 0;
    for (int64_t first = 0; first < source->cols; first += CHUNK) {
        int64_t n = source->cols - first < CHUNK ? source->cols - first : CHUNK;
        qllm_to_float(row_at(source, row, first), source->dtype, n, x);
        uint32_t bits = qllm_largest_bits(x, n);
        largest = bits > largest ? bits : largest;
    }
    return qllm_float_from_bits(largest);
}

/* A row is rounded to float16 unless that would lose it: where its largest value overflows, or the
 * whole row becomes 0, the values are used as they are. */
static void quantize_row(const qllm_tensor *source, int64_t row, qllm_qweight *weight)
{
    float absmax = row_absmax(source, row), x[CHUNK];
    int8_t *out = (int8_t *)weight->data + row * source->cols;
    weight->absmax[row] = isfinite(absmax) ? absmax : NAN;
    if (!isfinite(absmax) || absmax == 0.0f) /* the codes stay 0 */
        return;
    float half_absmax = qllm_f16_to_float(qllm_float_to_f16(absmax));
    bool as_half = isfinite(half_absmax) && half_absmax != 0.0f;
    if (as_half)
        weight->absmax[row] = absmax = half_absmax;
    for (int64_t first = 0; first < source->cols; first += CHUNK) {
        int64_t n = source->cols - first < CHUNK ? source->cols - first : CHUNK;
        qllm_to_float(row_at(source, row, first), source->dtype, n, x);
        if (as_half) {
            round_to_half(x, n);
            encode_half(x, n, 1.0f / absmax * 127.0f, out + first);
        } else
            encode_wide(x, n, 127.0 / (double)absmax, out + first);
    }
}

void qllm_quantize_int8(const qllm_tensor *source, qllm_qweight *weight)
{
    for (int64_t row = 0; row < source->rows; row++)
        quantize_row(source, row, weight);
}

void qllm_dequantize_int8(const qllm_qweight *weight, int64_t first, int64_t count, float *out)
{
    const int8_t *data = (const int8_t *)weight->data;
    int64_t last = first + count;
    while (first < last) {
        int64_t row = first / weight->cols, end = (row + 1) * weight->cols;
        float scale = weight->absmax[row] * (1.0f / 127.0f);
        end = end < last ? end : last;
        for (; first < end; first++)
            *out++ = (float)data[first] * scale;
    }
}

void qllm_int8_activation(const float *x, int64_t cols, float threshold, int8_t *q, float *scale,
                          int32_t *outliers, int64_t *n_outliers)
{
    uint32_t largest = 0;
    float factor;
    *n_outliers = 0;
    for (int64_t k = 0; k < cols; k++) {
        if (qllm_is_int8_outlier(x[k], threshold)) {
            outliers[(*n_outliers)++] = (int32_t)k;
            continue;
        }
        uint32_t bits = qllm_bits_from_float(x[k]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    *scale = qllm_int8_scale(largest, &factor);
    for (int64_t k = 0; k < cols; k++)
        q[k] = qllm_is_int8_outlier(x[k], threshold) ? 0 : qllm_int8_code(x[k], factor);
}
