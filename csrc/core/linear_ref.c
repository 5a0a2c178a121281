#include "core/linear_ref.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/activation.h"
#include "core/alloc.h"
#include "core/checked.h"
#include "core/codebook.h"
#include "core/quant.h"

static float block_absmax(const qllm_qweight *weight, int64_t block)
{
    return qllm_format_is_nested(weight->format) ? qllm_nested_absmax_at(weight, block)
                                                 : weight->absmax[block];
}

/* One row of W as the sum takes it: w (cols), and one scale for each group. */
static void decode_row(const qllm_qweight *weight, int64_t row, float *w, float *scales)
{
    int64_t cols = weight->cols, first = row * cols;
    bool by_block = qllm_format_is_4bit(weight->format) && cols % weight->blocksize == 0;
    if (!by_block)
        qllm_dequantize(weight, first, cols, w);
    for (int64_t k = 0; by_block && k < cols; k++) {
        int64_t i = first + k;
        uint8_t byte = weight->data[i / 2];
        w[k] = weight->code[i % 2 == 0 ? byte >> 4 : byte & 15];
    }
    for (int64_t k = 0, group = 0; k < cols; k += QLLM_GROUP, group++)
        scales[group] = by_block ? block_absmax(weight, (first + k) / weight->blocksize) : 1.0f;
}

static float dot(const float *w, const float *scales, const float *x, int64_t cols)
{
    float y = 0.0f;
    for (int64_t first = 0, group = 0; first < cols; first += QLLM_GROUP, group++) {
        int64_t end = cols - first < QLLM_GROUP ? cols : first + QLLM_GROUP;
        float p = 0.0f;
        for (int64_t k = first; k < end; k++)
            p = fmaf(w[k], x[k], p);
        y = fmaf(scales[group], p, y);
    }
    return y;
}

static qllm_status linear_float(const qllm_qweight *weight, const float *bias, const float *x,
                                int64_t m, float *y, qllm_error *error)
{
    int64_t cols = weight->cols, groups = 0;
    void *w = NULL, *scales = NULL;
    qllm_checked_ceil_div(cols, QLLM_GROUP, &groups);
    qllm_status status = qllm_alloc(&w, cols, sizeof(float), "a row of weights", error);
    if (status == QLLM_OK)
        status = qllm_alloc(&scales, groups, sizeof(float), "the scales of a row", error);
    for (int64_t r = 0; status == QLLM_OK && r < weight->rows; r++) {
        decode_row(weight, r, w, scales);
        for (int64_t i = 0; i < m; i++) {
            float sum = dot(w, scales, x + i * cols, cols);
            y[i * weight->rows + r] = bias != NULL ? sum + bias[r] : sum;
        }
    }
    qllm_free(w);
    qllm_free(scales);
    return status;
}

/* What a row of x needs in LLM.int8(), allocated once for all rows. */
typedef struct int8_scratch {
    int8_t *q;           /* (cols) */
    int32_t *outliers;   /* (cols) */
    int64_t n_outliers;
} int8_scratch;

static void free_scratch(int8_scratch *scratch)
{
    qllm_free(scratch->q);
    qllm_free(scratch->outliers);
}

static qllm_status make_scratch(const qllm_qweight *weight, int8_scratch *scratch,
                                qllm_error *error)
{
    void *memory;
    *scratch = (int8_scratch){NULL, NULL, 0};
    if (weight->cols > QLLM_INT8_MAX_COLS)
        return qllm_fail(error, QLLM_UNSUPPORTED, "an int8 weight of %" PRId64 " columns was "
                         "given; the exact int32 sum holds at most %d: use another format",
                         weight->cols, QLLM_INT8_MAX_COLS);
    qllm_status status = qllm_alloc(&memory, weight->cols, 1, "a row of int8 inputs", error);
    if (status != QLLM_OK)
        return status;
    scratch->q = memory;
    status = qllm_alloc(&memory, weight->cols, sizeof(int32_t), "the outlier columns", error);
    scratch->outliers = memory;
    if (status != QLLM_OK)
        free_scratch(scratch);
    return status;
}

/* All outputs of one row x, whose int8 part and outlier columns stand in scratch. */
static void linear_int8_row(const qllm_qweight *weight, const float *bias, const float *x,
                            float scale, const int8_scratch *scratch, float *y)
{
    for (int64_t r = 0; r < weight->rows; r++) {
        const int8_t *data = (const int8_t *)weight->data + r * weight->cols;
        float row_scale = weight->absmax[r] * (1.0f / 127.0f);
        int32_t sum = 0;
        for (int64_t k = 0; k < weight->cols; k++)
            sum += (int32_t)scratch->q[k] * data[k];
        float result = (float)sum * (scale * row_scale);
        for (int64_t j = 0; j < scratch->n_outliers; j++) {
            int32_t k = scratch->outliers[j];
            result = fmaf(x[k], (float)data[k] * row_scale, result);
        }
        y[r] = bias != NULL ? result + bias[r] : result;
    }
}

static qllm_status linear_int8(const qllm_qweight *weight, const float *bias, const float *x,
                               int64_t m, float threshold, float *y, qllm_error *error)
{
    int8_scratch scratch;
    float scale;
    qllm_status status = make_scratch(weight, &scratch, error);
    if (status != QLLM_OK)
        return status;
    for (int64_t i = 0; i < m; i++) {
        const float *row = x + i * weight->cols;
        qllm_int8_activation(row, weight->cols, threshold, scratch.q, &scale, scratch.outliers,
                             &scratch.n_outliers);
        linear_int8_row(weight, bias, row, scale, &scratch, y + i * weight->rows);
    }
    free_scratch(&scratch);
    return QLLM_OK;
}

qllm_status qllm_linear_ref(const qllm_qweight *weight, const float *bias, const float *x,
                            int64_t m, float threshold, float *y, qllm_error *error)
{
    if (weight->format == QLLM_FORMAT_INT8)
        return linear_int8(weight, bias, x, m, threshold, y, error);
    return linear_float(weight, bias, x, m, y, error);
}

bool qllm_tier_fits(qllm_tier tier, const qllm_qweight *weight)
{
    switch (tier) {
    case QLLM_TIER_INT16:
    case QLLM_TIER_INT8:
        return qllm_format_is_4bit(weight->format) && weight->cols % weight->blocksize == 0;
    case QLLM_TIER_BF16: return weight->format == QLLM_FORMAT_BF16;
    case QLLM_TIER_BF16X2:
        return weight->format == QLLM_FORMAT_BF16 || qllm_tier_fits(QLLM_TIER_INT16, weight);
    default: return true;
    }
}

/* One output of the tiers int16 and int8: row r of W with the rounded row q and its scales. */
static float integer_dot(const qllm_qweight *weight, const int16_t codes[16], int64_t r,
                         const int16_t *q, const float *scales)
{
    int64_t cols = weight->cols, block = qllm_activation_block(weight->blocksize);
    float y = 0.0f;
    for (int64_t first = 0; first < cols; first += block) {
        int32_t sum = 0;
        for (int64_t k = first; k < first + block; k++) {
            int64_t i = r * cols + k;
            uint8_t byte = weight->data[i / 2];
            sum += (int32_t)codes[i % 2 == 0 ? byte >> 4 : byte & 15] * q[k];
        }
        float absmax = block_absmax(weight, (r * cols + first) / weight->blocksize);
        y = fmaf(absmax * scales[first / block], (float)sum, y);
    }
    return y;
}

static qllm_status linear_integer(const qllm_qweight *weight, bool wide, const float *bias,
                                  const float *x, int64_t m, float *y, qllm_error *error)
{
    int64_t cols = weight->cols, block = qllm_activation_block(weight->blocksize);
    int16_t codes[16];
    void *q = NULL, *scales = NULL;
    float unit = qllm_integer_codes(weight->code,
                                    wide ? QLLM_INT16_CODE_LIMIT : QLLM_INT8_CODE_LIMIT, codes);
    qllm_status status = qllm_alloc(&q, cols, sizeof(int16_t), "a rounded row", error);
    if (status == QLLM_OK)
        status = qllm_alloc(&scales, cols / block, sizeof(float), "the scales of a row", error);
    for (int64_t i = 0; status == QLLM_OK && i < m; i++) {
        for (int64_t first = 0; first < cols; first += block)
            ((float *)scales)[first / block] = qllm_block_activation(
                x + i * cols + first, block, wide ? QLLM_INT16_LIMIT : QLLM_INT8_LIMIT,
                (int16_t *)q + first);
        for (int64_t r = 0; r < weight->rows; r++) {
            float value = integer_dot(weight, codes, r, q, scales) * unit;
            y[i * weight->rows + r] = bias != NULL ? value + bias[r] : value;
        }
    }
    qllm_free(q);
    qllm_free(scales);
    return status;
}

static float bf16_dot(const uint16_t *w, const float *x, int64_t cols)
{
    float y = 0.0f;
    for (int64_t first = 0; first < cols; first += QLLM_GROUP) {
        int64_t end = cols - first < QLLM_GROUP ? cols : first + QLLM_GROUP;
        float p = 0.0f;
        for (int64_t k = first; k < end; k += 2) {
            bool pair = k + 1 < cols;
            p = qllm_bf16_dot(p, w[k], pair ? w[k + 1] : 0, qllm_bf16_activation(x[k]),
                              pair ? qllm_bf16_activation(x[k + 1]) : 0);
        }
        y += p;
    }
    return y;
}

static void linear_bf16(const qllm_qweight *weight, const float *bias, const float *x, int64_t m,
                        float *y)
{
    const uint16_t *w = (const uint16_t *)(const void *)weight->data;
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = 0; r < weight->rows; r++) {
            float value = bf16_dot(w + r * weight->cols, x + i * weight->cols, weight->cols);
            y[i * weight->rows + r] = bias != NULL ? value + bias[r] : value;
        }
}

/* Columns [first, first + QLLM_GROUP) of `row` (cols) in the order of their pairs. */
static void take_pairs(const uint16_t *row, int64_t cols, int64_t first, int64_t distance,
                       uint16_t *pairs)
{
    for (int64_t i = 0; i < QLLM_GROUP; i++) {
        int64_t k = first + qllm_pair_column(i / 2, distance) + i % 2 * distance;
        pairs[i] = k < cols ? row[k] : 0;
    }
}

/* Row r of W as bf16: the weights, or the rounded codes. */
static void bf16_row(const qllm_qweight *weight, const uint16_t codes[16], int64_t r, uint16_t *w)
{
    for (int64_t k = 0, i = r * weight->cols; k < weight->cols; k++, i++)
        if (weight->format == QLLM_FORMAT_BF16)
            w[k] = ((const uint16_t *)(const void *)weight->data)[i];
        else
            w[k] = codes[i % 2 == 0 ? weight->data[i / 2] >> 4 : weight->data[i / 2] & 15];
}

/* Row r of W, as bf16 w (cols), by x (cols). */
static float pairs_dot(const qllm_qweight *weight, int64_t r, const uint16_t *w, const uint16_t *x)
{
    bool by_block = qllm_format_is_4bit(weight->format);
    int64_t distance = qllm_pair_distance(by_block), cols = weight->cols;
    float y = 0.0f, sum = 0.0f;
    for (int64_t first = 0; first < cols; first += QLLM_GROUP) {
        uint16_t w_pairs[QLLM_GROUP], x_pairs[QLLM_GROUP];
        take_pairs(w, cols, first, distance, w_pairs);
        take_pairs(x, cols, first, distance, x_pairs);
        sum = qllm_bf16_pairs(sum, w_pairs, x_pairs);
        if (by_block && (first + QLLM_GROUP) % qllm_activation_block(weight->blocksize) == 0) {
            y = fmaf(block_absmax(weight, (r * cols + first) / weight->blocksize), sum, y);
            sum = 0.0f;
        }
    }
    return by_block ? y : sum;
}

static qllm_status linear_pairs(const qllm_qweight *weight, const float *bias, const float *x,
                                int64_t m, float *y, qllm_error *error)
{
    int64_t cols = weight->cols;
    uint16_t codes[16] = {0}, *w = NULL, *rounded = NULL;
    void *memory = NULL;
    bool by_block = qllm_format_is_4bit(weight->format);
    float unit = by_block ? qllm_bf16_codes(weight->code, codes) : 1.0f;
    qllm_status status = qllm_alloc(&memory, cols, 2 * sizeof *w, "two rows as bf16", error);
    w = memory;
    for (int64_t i = 0; status == QLLM_OK && i < m; i++) {
        rounded = w + cols;
        for (int64_t k = 0; k < cols; k++)
            rounded[k] = qllm_bf16_activation(x[i * cols + k]);
        for (int64_t r = 0; r < weight->rows; r++) {
            bf16_row(weight, codes, r, w);
            float value = pairs_dot(weight, r, w, rounded) * unit;
            y[i * weight->rows + r] = bias != NULL ? value + bias[r] : value;
        }
    }
    qllm_free(memory);
    return status;
}

qllm_status qllm_linear_tier_ref(const qllm_qweight *weight, qllm_tier tier, const float *bias,
                                 const float *x, int64_t m, float *y, qllm_error *error)
{
    if (tier == QLLM_TIER_EXACT || !qllm_tier_fits(tier, weight))
        return qllm_fail(error, QLLM_UNSUPPORTED, "tier %s is not defined for a weight of format "
                         "%s, %" PRId64 " columns and blocksize %" PRId64, qllm_tier_name(tier),
                         qllm_format_name(weight->format), weight->cols, weight->blocksize);
    if (tier == QLLM_TIER_BF16X2)
        return linear_pairs(weight, bias, x, m, y, error);
    if (tier != QLLM_TIER_BF16)
        return linear_integer(weight, tier == QLLM_TIER_INT16, bias, x, m, y, error);
    linear_bf16(weight, bias, x, m, y);
    return QLLM_OK;
}

/* Marks in `used` (cols) the columns that are outliers in any row. */
static void mark_outliers(const float *x, int64_t m, int64_t cols, float threshold,
                          int8_scratch *scratch, uint8_t *used)
{
    float scale;
    for (int64_t i = 0; i < m; i++) {
        qllm_int8_activation(x + i * cols, cols, threshold, scratch->q, &scale, scratch->outliers,
                             &scratch->n_outliers);
        for (int64_t j = 0; j < scratch->n_outliers; j++)
            used[scratch->outliers[j]] = 1;
    }
}

qllm_status qllm_linear_int8_batch(const qllm_qweight *weight, const float *bias, const float *x,
                                   int64_t m, float threshold, float *y, qllm_error *error)
{
    int8_scratch scratch;
    void *memory;
    int64_t cols = weight->cols;
    if (weight->format != QLLM_FORMAT_INT8)
        return qllm_fail(error, QLLM_VALUE, "outlier columns of a batch exist for int8 only, not "
                         "for %s", qllm_format_name(weight->format));
    qllm_status status = make_scratch(weight, &scratch, error);
    if (status != QLLM_OK)
        return status;
    status = qllm_alloc(&memory, cols, 1, "the outlier columns of a batch", error);
    uint8_t *used = memory;
    if (status == QLLM_OK)
        mark_outliers(x, m, cols, threshold, &scratch, used);
    for (int64_t i = 0; status == QLLM_OK && i < m; i++) {
        const float *row = x + i * cols;
        float scale;
        qllm_int8_activation(row, cols, threshold, scratch.q, &scale, scratch.outliers,
                             &scratch.n_outliers);
        scratch.n_outliers = 0;
        for (int64_t k = 0; k < cols; k++)
            if (used[k]) {
                scratch.q[k] = 0;
                scratch.outliers[scratch.n_outliers++] = (int32_t)k;
            }
        linear_int8_row(weight, bias, row, scale, &scratch, y + i * weight->rows);
    }
    qllm_free(used);
    free_scratch(&scratch);
    return status;
}
