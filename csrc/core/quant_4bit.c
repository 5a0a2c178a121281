/* nf4 and fp4: docs/formats.md.  The bytes are those that bitsandbytes 0.50 writes on a CPU. */
#include <math.h>
#include <string.h>

#include "core/codebook.h"
#include "core/quant.h"

/* Scales are never divided by less than this, so that 1 / absmax stays finite; blocks below it,
 * subnormal throughout, lose precision. */
static const float smallest_divisor = 1e-38f;

/* below[i] = number of thresholds less than x[i].  All fifteen comparisons are made, without a
 * branch, so that the loop becomes vector code. */
static void count_below(const float *restrict x, int64_t n, const float *restrict thresholds,
                        uint8_t *restrict below)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t count = 0;
        for (int j = 0; j < 15; j++)
            count += x[i] > thresholds[j];
        below[i] = (uint8_t)count;
    }
}

/* Codes of the n values x of one block, which become values in units of the absmax on the way.
 * Returns the absmax. */
static float encode_block(float *restrict x, int64_t n, bool is_tail, const qllm_encoder *encoder,
                          uint8_t *restrict codes)
{
    float absmax = qllm_float_from_bits(qllm_largest_bits(x, n));
    if (!isfinite(absmax)) { /* the scale says NaN; the codes are those of zeros */
        memset(x, 0, (size_t)n * sizeof *x);
        count_below(x, n, encoder->thresholds, codes);
        absmax = NAN;
    } else {
        float divisor = absmax < smallest_divisor ? smallest_divisor : absmax;
        float reciprocal = 1.0f / divisor;
        if (is_tail)
            for (int64_t i = 0; i < n; i++)
                x[i] /= divisor;
        else
            for (int64_t i = 0; i < n; i++)
                x[i] *= reciprocal;
        count_below(x, n, encoder->thresholds, codes);
    }
    for (int64_t i = 0; i < n; i++)
        codes[i] = encoder->codes[codes[i]];
    return absmax;
}

/* Blocks start at even flat indices, hence at whole bytes.  The low half of a last odd byte is the
 * code of zero. */
static void pack(const uint8_t *restrict codes, int64_t n, uint8_t code_of_zero,
                 uint8_t *restrict bytes)
{
    for (int64_t i = 0; i < n / 2; i++)
        bytes[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    if (n % 2 == 1)
        bytes[n / 2] = (uint8_t)(codes[n - 1] << 4 | code_of_zero);
}

void qllm_quantize_4bit(const qllm_tensor *source, float *absmax, qllm_qweight *weight)
{
    bool is_fp4 = weight->format == QLLM_FORMAT_FP4 || weight->format == QLLM_FORMAT_FP4_DQ;
    qllm_encoder encoder = is_fp4 ? qllm_fp4_encoder() : qllm_nf4_encoder();
    uint8_t code_of_zero = is_fp4 ? qllm_fp4_encode(0.0f) : qllm_nf4_encode(0.0f);
    int64_t elements = source->rows * source->cols, size = qllm_dtype_size(source->dtype);
    float x[QLLM_BLOCKSIZE_MAX];
    uint8_t codes[QLLM_BLOCKSIZE_MAX];
    for (int64_t first = 0, block = 0; first < elements; first += weight->blocksize, block++) {
        bool is_tail = elements - first < weight->blocksize;
        int64_t n = is_tail ? elements - first : weight->blocksize;
        qllm_to_float((const uint8_t *)source->data + first * size, source->dtype, n, x);
        absmax[block] = encode_block(x, n, is_tail, &encoder, codes);
        pack(codes, n, code_of_zero, weight->data + first / 2);
    }
}

static void dequantize_in_block(const uint8_t *data, int64_t first, int64_t end,
                                const float scaled[16], float *out)
{
    int64_t i = first;
    if (i < end && i % 2 == 1)
        *out++ = scaled[data[i++ / 2] & 15];
    for (; i + 1 < end; i += 2) {
        *out++ = scaled[data[i / 2] >> 4];
        *out++ = scaled[data[i / 2] & 15];
    }
    if (i < end)
        *out = scaled[data[i / 2] >> 4];
}

void qllm_dequantize_4bit(const qllm_qweight *weight, int64_t first, int64_t count, float *out)
{
    bool is_nested = qllm_format_is_nested(weight->format);
    int64_t last = first + count;
    while (first < last) {
        int64_t block = first / weight->blocksize, end = (block + 1) * weight->blocksize;
        float absmax = is_nested ? qllm_nested_absmax_at(weight, block) : weight->absmax[block];
        float scaled[16];
        for (int i = 0; i < 16; i++)
            scaled[i] = weight->code[i] * absmax;
        end = end < last ? end : last;
        dequantize_in_block(weight->data, first, end, scaled, out);
        out += end - first;
        first = end;
    }
}
