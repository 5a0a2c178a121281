#include "cpu/packed.h"

#include <inttypes.h>
#include <string.h>

#include "core/activation.h"
#include "core/alloc.h"
#include "core/checked.h"
#include "core/linear_ref.h"
#include "cpu/packing.h"

static qllm_layout choose_layout(const qllm_qweight *weight)
{
    switch (weight->format) {
    case QLLM_FORMAT_F32: return QLLM_LAYOUT_F32;
    case QLLM_FORMAT_F16: return QLLM_LAYOUT_F16;
    case QLLM_FORMAT_BF16: return QLLM_LAYOUT_BF16;
    case QLLM_FORMAT_INT8: return QLLM_LAYOUT_INT8;
    default: break;
    }
    return weight->cols % weight->blocksize == 0 ? QLLM_LAYOUT_BLOCKS : QLLM_LAYOUT_BYTES;
}

/* Bytes of one tile, or false if they do not fit.  Columns are padded as the layout says. */
static bool tile_size(const qllm_packed *p, int64_t *bytes)
{
    int64_t cols = 0, lines = 0, scale_lines = 0, codes = 0;
    switch (p->layout) {
    case QLLM_LAYOUT_F32:
        return qllm_checked_round_up(p->cols, QLLM_STEP, &cols) &&
               qllm_checked_mul(cols, QLLM_TILE_ROWS * 4, bytes);
    case QLLM_LAYOUT_F16:
    case QLLM_LAYOUT_BF16:
        return qllm_checked_round_up(p->cols, QLLM_STEP, &cols) &&
               qllm_checked_mul(cols, QLLM_TILE_ROWS * 2, bytes);
    case QLLM_LAYOUT_INT8:
        return qllm_checked_round_up(p->cols, QLLM_INT8_PAD, &cols) &&
               qllm_checked_mul(cols, QLLM_TILE_ROWS, bytes);
    case QLLM_LAYOUT_BLOCKS:
        scale_lines = p->row_blocks;
        if (qllm_packed_nested(p))
            qllm_checked_ceil_div(p->row_blocks, QLLM_UNIT_BLOCKS, &scale_lines);
        return qllm_checked_mul(p->cols / QLLM_STEP, QLLM_LINE, &codes) &&
               qllm_checked_mul(scale_lines, QLLM_LINE, &lines) &&
               qllm_checked_add(codes, lines, bytes);
    case QLLM_LAYOUT_BYTES:
        *bytes = 0;
        return true;
    }
    return false;
}

qllm_status qllm_packed_measure(const qllm_qweight *like, const char *name, qllm_packed *p,
                                qllm_error *error)
{
    int64_t bytes = 0;
    p->format = like->format;
    p->layout = choose_layout(like);
    p->rows = like->rows;
    p->cols = like->cols;
    p->blocksize = like->blocksize;
    p->row_blocks = p->layout == QLLM_LAYOUT_BLOCKS ? p->cols / p->blocksize : 0;
    p->nested_bytes = 0;
    qllm_checked_ceil_div(p->rows, QLLM_TILE_ROWS, &p->tiles);
    if (!tile_size(p, &p->tile_bytes) || !qllm_checked_mul(p->tiles, p->tile_bytes, &bytes) ||
        !qllm_checked_add(bytes, QLLM_LINE, &p->data_bytes))
        return qllm_fail(error, QLLM_MEMORY, "%s: the packed form of shape (%" PRId64 ", %" PRId64
                         ") is larger than can be addressed", name, p->rows, p->cols);
    if (p->layout == QLLM_LAYOUT_INT8 && p->cols > QLLM_INT8_MAX_COLS)
        return qllm_fail(error, QLLM_UNSUPPORTED, "%s: an int8 weight of %" PRId64 " columns was "
                         "given; the exact int32 sum holds at most %d: use another format", name,
                         p->cols, QLLM_INT8_MAX_COLS);
    /* so many that rows which pad the last tile may look */
    if (p->layout == QLLM_LAYOUT_BLOCKS && qllm_packed_nested(p))
        p->nested_bytes = (p->tiles * QLLM_TILE_ROWS * p->row_blocks / QLLM_NESTED_BLOCKSIZE + 1) *
                          (int64_t)sizeof(float);
    return QLLM_OK;
}

static qllm_status allocate_row_values(qllm_packed *p, qllm_error *error)
{
    void *memory;
    int64_t n = p->tiles * QLLM_TILE_ROWS;
    qllm_status status = qllm_alloc(&memory, n, sizeof(float), "the absmax of rows", error);
    p->row_absmax = memory;
    if (status == QLLM_OK) {
        status = qllm_alloc(&memory, n, sizeof(int32_t), "the sums of rows", error);
        p->row_sums = memory;
    }
    return status;
}

static qllm_status allocate(qllm_packed *p, const char *name, qllm_error *error)
{
    void *memory;
    qllm_status status = qllm_alloc_large(&memory, p->data_bytes, 1, name, error);
    p->data = memory;
    if (status == QLLM_OK)
        memset(p->data + p->data_bytes - QLLM_LINE, 0, QLLM_LINE);
    if (status == QLLM_OK && p->layout == QLLM_LAYOUT_INT8)
        status = allocate_row_values(p, error);
    if (status == QLLM_OK && p->nested_bytes > 0) {
        status = qllm_alloc(&memory, p->nested_bytes, 1, "a nested absmax", error);
        p->nested_absmax = memory;
    }
    return status;
}

/* The tables of values, and the forms of them that kernels look up. */
static void copy_tables(const qllm_qweight *weight, qllm_packed *p)
{
    memcpy(p->code, weight->code, sizeof p->code);
    memcpy(p->nested_code, weight->nested_code, sizeof p->nested_code);
    p->offset = weight->offset;
    if (!qllm_format_is_4bit(p->format))
        return;
    p->unit16 = qllm_integer_codes(p->code, QLLM_INT16_CODE_LIMIT, p->codes16);
    p->unit8 = qllm_integer_codes(p->code, QLLM_INT8_CODE_LIMIT, p->codes8);
    p->unit_bf16 = qllm_bf16_codes(p->code, p->codes_bf16);
    for (int i = 0; i < 256; i++) {
        uint32_t bits = qllm_bits_from_float(p->nested_code[i]);
        for (int plane = 0; plane < 4; plane++)
            p->nested_planes[plane][i] = (uint8_t)(bits >> (8 * plane));
    }
}

qllm_status qllm_packed_create(const qllm_qweight *like, const char *name, qllm_packed **out,
                               qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_packed), "a packed weight", error);
    if (status != QLLM_OK)
        return status;
    qllm_packed *p = memory;
    status = qllm_packed_measure(like, name, p, error);
    if (status == QLLM_OK) {
        copy_tables(like, p);
        status = allocate(p, name, error);
    }
    if (status != QLLM_OK) {
        qllm_packed_destroy(p);
        return status;
    }
    *out = p;
    return QLLM_OK;
}

void qllm_packed_destroy(qllm_packed *packed)
{
    if (packed == NULL)
        return;
    qllm_free(packed->data);
    qllm_free(packed->nested_absmax);
    qllm_free(packed->row_absmax);
    qllm_free(packed->row_sums);
    qllm_qweight_clear(&packed->standard);
    qllm_free(packed);
}

qllm_format qllm_packed_format(const qllm_packed *packed)
{
    return packed->format;
}

int64_t qllm_packed_rows(const qllm_packed *packed)
{
    return packed->rows;
}

int64_t qllm_packed_cols(const qllm_packed *packed)
{
    return packed->cols;
}

int64_t qllm_packed_nbytes(const qllm_packed *packed)
{
    int64_t row_values = packed->row_sums != NULL ? packed->tiles * QLLM_TILE_ROWS * 8 : 0;
    int64_t standard = packed->layout == QLLM_LAYOUT_BYTES ? qllm_qweight_nbytes(&packed->standard)
                                                           : 0;
    return packed->data_bytes + packed->nested_bytes + row_values + standard;
}
