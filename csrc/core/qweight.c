#include "core/qweight.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "core/codebook.h"

static const char *const format_names[QLLM_FORMAT_COUNT] = {
    "f32", "f16", "bf16", "nf4", "fp4", "nf4-dq", "fp4-dq", "int8",
};

const char *qllm_format_name(qllm_format format)
{
    return (int)format >= 0 && (int)format < QLLM_FORMAT_COUNT ? format_names[format] : "";
}

bool qllm_format_parse(const char *name, qllm_format *format)
{
    for (int i = 0; i < QLLM_FORMAT_COUNT; i++)
        if (strcmp(name, format_names[i]) == 0) {
            *format = (qllm_format)i;
            return true;
        }
    return false;
}

bool qllm_format_is_4bit(qllm_format format)
{
    return format >= QLLM_FORMAT_NF4 && format <= QLLM_FORMAT_FP4_DQ;
}

bool qllm_format_is_nested(qllm_format format)
{
    return format == QLLM_FORMAT_NF4_DQ || format == QLLM_FORMAT_FP4_DQ;
}

bool qllm_format_is_float(qllm_format format)
{
    return format == QLLM_FORMAT_F32 || format == QLLM_FORMAT_F16 || format == QLLM_FORMAT_BF16;
}

qllm_dtype qllm_format_dtype(qllm_format format)
{
    switch (format) {
    case QLLM_FORMAT_F16: return QLLM_F16;
    case QLLM_FORMAT_BF16: return QLLM_BF16;
    default: return QLLM_F32;
    }
}

static bool data_bytes(qllm_format format, int64_t elements, int64_t *bytes)
{
    if (qllm_format_is_4bit(format))
        return qllm_checked_ceil_div(elements, 2, bytes);
    int64_t size = format == QLLM_FORMAT_INT8 ? 1 : qllm_dtype_size(qllm_format_dtype(format));
    return qllm_checked_mul(elements, size, bytes);
}

static qllm_status check_sizes(const qllm_qweight *weight, const char *name, qllm_error *error)
{
    int64_t elements, bytes;
    if ((int)weight->format < 0 || (int)weight->format >= QLLM_FORMAT_COUNT)
        return qllm_fail(error, QLLM_VALUE, "%s: unknown format number %d", name,
                         (int)weight->format);
    if (weight->rows < 0 || weight->cols < 0)
        return qllm_fail(error, QLLM_VALUE, "%s: negative shape (%" PRId64 ", %" PRId64 ")", name,
                         weight->rows, weight->cols);
    if (!qllm_checked_mul(weight->rows, weight->cols, &elements) ||
        !qllm_checked_mul(elements, 8, &bytes)) /* room for any format and for counting bits */
        return qllm_fail(error, QLLM_VALUE, "%s: shape (%" PRId64 ", %" PRId64 ") is too large",
                         name, weight->rows, weight->cols);
    int64_t b = weight->blocksize;
    if (qllm_format_is_4bit(weight->format) &&
        (b < QLLM_BLOCKSIZE_MIN || b > QLLM_BLOCKSIZE_MAX || (b & (b - 1)) != 0))
        return qllm_fail(error, QLLM_VALUE, "%s: blocksize %" PRId64 " was given for %s; it must "
                         "be a power of two from %d to %d", name, b,
                         qllm_format_name(weight->format), QLLM_BLOCKSIZE_MIN, QLLM_BLOCKSIZE_MAX);
    return QLLM_OK;
}

static qllm_status allocate(qllm_qweight *weight, qllm_error *error)
{
    int64_t blocks = qllm_qweight_blocks(weight), nested = qllm_qweight_nested_blocks(weight);
    void *memory;
    if (qllm_alloc(&memory, weight->data_bytes, 1, "the data of a weight", error) != QLLM_OK)
        return QLLM_MEMORY;
    weight->data = memory;
    if (qllm_format_is_nested(weight->format)) {
        if (qllm_alloc(&memory, blocks, 1, "the absmax codes of a weight", error) != QLLM_OK)
            return QLLM_MEMORY;
        weight->absmax_codes = memory;
        if (qllm_alloc(&memory, nested, sizeof(float), "the nested absmax of a weight", error) !=
            QLLM_OK)
            return QLLM_MEMORY;
        weight->nested_absmax = memory;
    } else if (!qllm_format_is_float(weight->format)) {
        if (qllm_alloc(&memory, blocks, sizeof(float), "the absmax of a weight", error) != QLLM_OK)
            return QLLM_MEMORY;
        weight->absmax = memory;
    }
    return QLLM_OK;
}

static void fill_tables(qllm_qweight *weight)
{
    bool is_fp4 = weight->format == QLLM_FORMAT_FP4 || weight->format == QLLM_FORMAT_FP4_DQ;
    if (qllm_format_is_4bit(weight->format))
        memcpy(weight->code, is_fp4 ? qllm_fp4_values : qllm_nf4_values, sizeof weight->code);
    if (qllm_format_is_nested(weight->format))
        memcpy(weight->nested_code, qllm_dynamic_map, sizeof weight->nested_code);
}

qllm_status qllm_qweight_describe(qllm_qweight *weight, qllm_format format, int64_t rows,
                                  int64_t cols, int64_t blocksize, const char *name,
                                  qllm_error *error)
{
    *weight = (qllm_qweight){.format = format, .rows = rows, .cols = cols, .blocksize = blocksize};
    if (check_sizes(weight, name, error) != QLLM_OK) {
        qllm_qweight_clear(weight);
        return QLLM_VALUE;
    }
    if (!qllm_format_is_4bit(format))
        weight->blocksize = 0;
    data_bytes(format, rows * cols, &weight->data_bytes);
    fill_tables(weight);
    return QLLM_OK;
}

qllm_status qllm_qweight_init(qllm_qweight *weight, qllm_format format, int64_t rows, int64_t cols,
                              int64_t blocksize, const char *name, qllm_error *error)
{
    qllm_status status =
        qllm_qweight_describe(weight, format, rows, cols, blocksize, name, error);
    if (status == QLLM_OK)
        status = allocate(weight, error);
    if (status != QLLM_OK)
        qllm_qweight_clear(weight);
    return status;
}

void qllm_qweight_clear(qllm_qweight *weight)
{
    qllm_free(weight->data);
    qllm_free(weight->absmax);
    qllm_free(weight->absmax_codes);
    qllm_free(weight->nested_absmax);
    *weight = (qllm_qweight){.format = QLLM_FORMAT_F32};
}

int64_t qllm_qweight_blocks(const qllm_qweight *weight)
{
    int64_t blocks = 0;
    if (weight->format == QLLM_FORMAT_INT8)
        return weight->rows;
    if (qllm_format_is_4bit(weight->format) && weight->blocksize > 0)
        qllm_checked_ceil_div(weight->rows * weight->cols, weight->blocksize, &blocks);
    return blocks;
}

int64_t qllm_qweight_nested_blocks(const qllm_qweight *weight)
{
    int64_t nested = 0;
    if (qllm_format_is_nested(weight->format))
        qllm_checked_ceil_div(qllm_qweight_blocks(weight), QLLM_NESTED_BLOCKSIZE, &nested);
    return nested;
}

int64_t qllm_qweight_nbytes(const qllm_qweight *weight)
{
    int64_t blocks = qllm_qweight_blocks(weight);
    if (qllm_format_is_nested(weight->format))
        return weight->data_bytes + blocks +
               (qllm_qweight_nested_blocks(weight) + 1) * (int64_t)sizeof(float);
    return weight->data_bytes + blocks * (int64_t)sizeof(float);
}

void qllm_qweight_absmax(const qllm_qweight *weight, float *out)
{
    int64_t blocks = qllm_qweight_blocks(weight);
    if (!qllm_format_is_nested(weight->format)) {
        if (blocks > 0)
            memcpy(out, weight->absmax, (size_t)blocks * sizeof *out);
        return;
    }
    for (int64_t b = 0; b < blocks; b++)
        out[b] = qllm_nested_absmax_at(weight, b);
}

float qllm_nested_absmax_at(const qllm_qweight *weight, int64_t block)
{
    float scaled = weight->nested_code[weight->absmax_codes[block]] *
                   weight->nested_absmax[block / QLLM_NESTED_BLOCKSIZE];
    return scaled + weight->offset;
}

static qllm_status check_table(const float *table, int64_t n, const char *field, const char *name,
                               qllm_error *error)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(table[i]))
            return qllm_fail(error, QLLM_VALUE, "%s: %s holds %g at index %" PRId64
                             "; finite values were expected", name, field, (double)table[i], i);
    return QLLM_OK;
}

static qllm_status check_scales(const float *scales, int64_t n, const char *field,
                                bool allow_nonfinite, const char *name, qllm_error *error)
{
    for (int64_t i = 0; i < n; i++) {
        bool allowed = allow_nonfinite && isnan(scales[i]);
        if (!allowed && !(scales[i] >= 0.0f && isfinite(scales[i])))
            return qllm_fail(error, QLLM_VALUE, "%s: %s holds %g at index %" PRId64 "; a scale "
                             "must be finite and not negative", name, field, (double)scales[i], i);
    }
    return QLLM_OK;
}

/* Codes are -127 .. 127: the kernels negate them, and the exact int32 sum counts on it. */
static qllm_status check_int8(const qllm_qweight *weight, const char *name, qllm_error *error)
{
    const int8_t *row = (const int8_t *)weight->data;
    for (int64_t r = 0; r < weight->rows; r++, row += weight->cols) {
        int lowest = 0, highest = 0;
        for (int64_t c = 0; c < weight->cols; c++) {
            lowest = row[c] < lowest ? row[c] : lowest;
            highest = row[c] > highest ? row[c] : highest;
        }
        if (lowest < -127)
            return qllm_fail(error, QLLM_VALUE, "%s: row %" PRId64 " holds the int8 code -128; "
                             "codes are -127 to 127", name, r);
        if (weight->absmax[r] == 0.0f && (lowest != 0 || highest != 0))
            return qllm_fail(error, QLLM_VALUE, "%s: scb is 0 for row %" PRId64 ", whose codes are "
                             "not all 0", name, r);
    }
    return QLLM_OK;
}

static qllm_status check_nested(const qllm_qweight *weight, bool allow_nonfinite, const char *name,
                                qllm_error *error)
{
    qllm_status status = check_table(weight->nested_code, 256, "nested_quant_map", name, error);
    if (status == QLLM_OK)
        status = check_scales(weight->nested_absmax, qllm_qweight_nested_blocks(weight),
                              "nested_absmax", allow_nonfinite, name, error);
    if (status == QLLM_OK && !isfinite(weight->offset))
        status = qllm_fail(error, QLLM_VALUE, "%s: offset is %g; a finite value was expected", name,
                           (double)weight->offset);
    for (int64_t b = 0; status == QLLM_OK && b < qllm_qweight_blocks(weight); b++) {
        float absmax = qllm_nested_absmax_at(weight, b);
        if (!isfinite(absmax) && !allow_nonfinite)
            status = qllm_fail(error, QLLM_VALUE, "%s: the absmax of block %" PRId64 " reads back "
                               "as %g from code %d and nested_absmax %g; finite values were "
                               "expected", name, b, (double)absmax, weight->absmax_codes[b],
                               (double)weight->nested_absmax[b / QLLM_NESTED_BLOCKSIZE]);
    }
    return status;
}

qllm_status qllm_check_product(int64_t weight_rows, int64_t weight_cols, int64_t cols, int64_t rows,
                               qllm_error *error)
{
    if (cols != weight_cols)
        return qllm_fail(error, QLLM_VALUE, "x: the last dimension is %" PRId64 ", but the weight "
                         "of shape (%" PRId64 ", %" PRId64 ") takes %" PRId64, cols, weight_rows,
                         weight_cols, weight_cols);
    if (rows != weight_rows)
        return qllm_fail(error, QLLM_VALUE, "rows: %" PRId64 " were asked for, but the weight has "
                         "the shape (%" PRId64 ", %" PRId64 ")", rows, weight_rows, weight_cols);
    return QLLM_OK;
}

qllm_status qllm_qweight_check(const qllm_qweight *weight, bool allow_nonfinite, const char *name,
                               qllm_error *error)
{
    qllm_status status = QLLM_OK;
    if (qllm_format_is_float(weight->format)) {
        qllm_tensor values = {weight->data, weight->data_bytes, qllm_format_dtype(weight->format),
                              weight->rows, weight->cols};
        return allow_nonfinite ? QLLM_OK : qllm_tensor_check_finite(&values, name, error);
    }
    if (qllm_format_is_4bit(weight->format))
        status = check_table(weight->code, 16, "quant_map", name, error);
    if (status == QLLM_OK && qllm_format_is_nested(weight->format))
        status = check_nested(weight, allow_nonfinite, name, error);
    else if (status == QLLM_OK)
        status = check_scales(weight->absmax, qllm_qweight_blocks(weight),
                              weight->format == QLLM_FORMAT_INT8 ? "scb" : "absmax",
                              allow_nonfinite, name, error);
    if (status == QLLM_OK && weight->format == QLLM_FORMAT_INT8)
        status = check_int8(weight, name, error);
    return status;
}
