#include "cpu/packed.h"

#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "core/linear_ref.h"
#include "cpu/packed_layout.h"

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

static qllm_status allocate_data(qllm_packed *p, const char *name, qllm_error *error)
{
    void *memory;
    int64_t bytes = 0;
    qllm_checked_ceil_div(p->rows, QLLM_TILE_ROWS, &p->tiles);
    if (!tile_size(p, &p->tile_bytes) || !qllm_checked_mul(p->tiles, p->tile_bytes, &bytes) ||
        !qllm_checked_add(bytes, QLLM_LINE, &p->data_bytes))
        return qllm_fail(error, QLLM_MEMORY, "%s: the packed form of shape (%" PRId64 ", %" PRId64
                         ") is larger than can be addressed", name, p->rows, p->cols);
    qllm_status status = qllm_alloc_large(&memory, p->data_bytes, 1, name, error);
    p->data = memory;
    return status;
}

/* Copies between the standard row and its dwords in the tile: `width` bytes of a row form the dword
 * of one line.  Rows end where they end: a partial last dword keeps its zeros. */
static void interleave(const uint8_t *row, int64_t row_bytes, uint8_t *tile, int64_t r)
{
    for (int64_t i = 0; i < row_bytes; i += 4) {
        int64_t n = row_bytes - i < 4 ? row_bytes - i : 4;
        memcpy(tile + i / 4 * QLLM_LINE + r * 4, row + i, (size_t)n);
    }
}

static void deinterleave(const uint8_t *tile, int64_t r, uint8_t *row, int64_t row_bytes)
{
    for (int64_t i = 0; i < row_bytes; i += 4) {
        int64_t n = row_bytes - i < 4 ? row_bytes - i : 4;
        memcpy(row + i, tile + i / 4 * QLLM_LINE + r * 4, (size_t)n);
    }
}

/* float16: half lines, one column each. */
static void interleave_halves(const uint8_t *row, int64_t cols, uint8_t *tile, int64_t r)
{
    for (int64_t k = 0; k < cols; k++)
        memcpy(tile + k * (QLLM_LINE / 2) + r * 2, row + k * 2, 2);
}

static void deinterleave_halves(const uint8_t *tile, int64_t r, uint8_t *row, int64_t cols)
{
    for (int64_t k = 0; k < cols; k++)
        memcpy(row + k * 2, tile + k * (QLLM_LINE / 2) + r * 2, 2);
}

static void pack_blocks_row(const qllm_qweight *w, const qllm_packed *p, int64_t row, uint8_t *tile)
{
    int64_t r = row % QLLM_TILE_ROWS, half = p->blocksize / 2;
    const uint8_t *bytes = w->data + row * (p->cols / 2);
    for (int64_t b = 0; b < p->row_blocks; b++) {
        int64_t offset = qllm_block_offset(p, b), i = row * p->row_blocks + b;
        interleave(bytes + b * half, half, tile + offset, r);
        if (qllm_packed_nested(p))
            tile[qllm_unit_codes_offset(p, b / QLLM_UNIT_BLOCKS) +
                 qllm_unit_code_byte(r, b % QLLM_UNIT_BLOCKS)] = w->absmax_codes[i];
        else
            memcpy(tile + offset + qllm_block_bytes(p) + r * 4, &w->absmax[i], 4);
    }
}

static void unpack_blocks_row(const qllm_packed *p, int64_t row, const uint8_t *tile,
                              qllm_qweight *w)
{
    int64_t r = row % QLLM_TILE_ROWS, half = p->blocksize / 2;
    uint8_t *bytes = w->data + row * (p->cols / 2);
    for (int64_t b = 0; b < p->row_blocks; b++) {
        int64_t offset = qllm_block_offset(p, b), i = row * p->row_blocks + b;
        deinterleave(tile + offset, r, bytes + b * half, half);
        if (qllm_packed_nested(p))
            w->absmax_codes[i] = tile[qllm_unit_codes_offset(p, b / QLLM_UNIT_BLOCKS) +
                                      qllm_unit_code_byte(r, b % QLLM_UNIT_BLOCKS)];
        else
            memcpy(&w->absmax[i], tile + offset + qllm_block_bytes(p) + r * 4, 4);
    }
}

static void pack_row(const qllm_qweight *w, qllm_packed *p, int64_t row)
{
    uint8_t *tile = p->data + row / QLLM_TILE_ROWS * p->tile_bytes;
    int64_t r = row % QLLM_TILE_ROWS, cols = p->cols;
    switch (p->layout) {
    case QLLM_LAYOUT_F32: interleave(w->data + row * cols * 4, cols * 4, tile, r); break;
    case QLLM_LAYOUT_F16: interleave_halves(w->data + row * cols * 2, cols, tile, r); break;
    case QLLM_LAYOUT_BF16: interleave(w->data + row * cols * 2, cols * 2, tile, r); break;
    case QLLM_LAYOUT_BLOCKS: pack_blocks_row(w, p, row, tile); break;
    case QLLM_LAYOUT_INT8:
        interleave(w->data + row * cols, cols, tile, r);
        for (int64_t k = 0; k < cols; k++)
            p->row_sums[row] += (int8_t)w->data[row * cols + k];
        break;
    case QLLM_LAYOUT_BYTES: break;
    }
}

static void unpack_row(const qllm_packed *p, qllm_qweight *w, int64_t row)
{
    const uint8_t *tile = qllm_packed_tile(p, row / QLLM_TILE_ROWS);
    int64_t r = row % QLLM_TILE_ROWS, cols = p->cols;
    switch (p->layout) {
    case QLLM_LAYOUT_F32: deinterleave(tile, r, w->data + row * cols * 4, cols * 4); break;
    case QLLM_LAYOUT_F16: deinterleave_halves(tile, r, w->data + row * cols * 2, cols); break;
    case QLLM_LAYOUT_BF16: deinterleave(tile, r, w->data + row * cols * 2, cols * 2); break;
    case QLLM_LAYOUT_INT8: deinterleave(tile, r, w->data + row * cols, cols); break;
    case QLLM_LAYOUT_BLOCKS: unpack_blocks_row(p, row, tile, w); break;
    case QLLM_LAYOUT_BYTES: break;
    }
}

static void copy_floats(float *to, const float *from, int64_t n)
{
    if (n > 0)
        memcpy(to, from, (size_t)n * sizeof *to);
}

/* Same format and shape, same contents. */
static void copy_standard(const qllm_qweight *from, qllm_qweight *to)
{
    int64_t blocks = qllm_qweight_blocks(from);
    if (from->data_bytes > 0)
        memcpy(to->data, from->data, (size_t)from->data_bytes);
    if (qllm_format_is_nested(from->format)) {
        if (blocks > 0)
            memcpy(to->absmax_codes, from->absmax_codes, (size_t)blocks);
        copy_floats(to->nested_absmax, from->nested_absmax, qllm_qweight_nested_blocks(from));
    } else if (!qllm_format_is_float(from->format))
        copy_floats(to->absmax, from->absmax, blocks);
    to->offset = from->offset;
    copy_floats(to->code, from->code, 16);
    copy_floats(to->nested_code, from->nested_code, 256);
}

/* The second-level absmax values, with zeros behind so that rows which pad the last tile may
 * look. */
static qllm_status copy_nested(const qllm_qweight *weight, qllm_packed *p, qllm_error *error)
{
    void *memory;
    int64_t n = p->tiles * QLLM_TILE_ROWS * p->row_blocks / QLLM_NESTED_BLOCKSIZE + 1;
    qllm_status status = qllm_alloc(&memory, n, sizeof(float), "a nested absmax", error);
    if (status != QLLM_OK)
        return status;
    p->nested_absmax = memory;
    p->nested_bytes = n * (int64_t)sizeof(float);
    copy_floats(p->nested_absmax, weight->nested_absmax, qllm_qweight_nested_blocks(weight));
    return QLLM_OK;
}

static qllm_status allocate_row_values(const qllm_qweight *weight, qllm_packed *p, const char *name,
                                       qllm_error *error)
{
    void *memory;
    if (p->cols > QLLM_INT8_MAX_COLS)
        return qllm_fail(error, QLLM_UNSUPPORTED, "%s: an int8 weight of %" PRId64 " columns was "
                         "given; the exact int32 sum holds at most %d: use another format", name,
                         p->cols, QLLM_INT8_MAX_COLS);
    int64_t n = p->tiles * QLLM_TILE_ROWS;
    qllm_status status = qllm_alloc(&memory, n, sizeof(float), "the absmax of rows", error);
    if (status != QLLM_OK)
        return status;
    p->row_absmax = memory;
    copy_floats(p->row_absmax, weight->absmax, p->rows);
    status = qllm_alloc(&memory, n, sizeof(int32_t), "the sums of rows", error);
    p->row_sums = memory;
    return status;
}

static qllm_status fill(const qllm_qweight *weight, qllm_packed *p, const char *name,
                        qllm_error *error)
{
    qllm_status status = allocate_data(p, name, error);
    if (status == QLLM_OK && p->layout == QLLM_LAYOUT_INT8)
        status = allocate_row_values(weight, p, name, error);
    if (status == QLLM_OK && p->layout == QLLM_LAYOUT_BLOCKS && qllm_packed_nested(p))
        status = copy_nested(weight, p, error);
    if (status == QLLM_OK && p->layout == QLLM_LAYOUT_BYTES) {
        status = qllm_qweight_init(&p->standard, p->format, p->rows, p->cols, p->blocksize, name,
                                   error);
        if (status == QLLM_OK)
            copy_standard(weight, &p->standard);
    }
    for (int64_t row = 0; status == QLLM_OK && row < p->rows; row++)
        pack_row(weight, p, row);
    return status;
}

qllm_status qllm_pack(const qllm_qweight *weight, const char *name, qllm_packed **out,
                      qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_packed), "a packed weight", error);
    if (status != QLLM_OK)
        return status;
    qllm_packed *p = memory;
    p->format = weight->format;
    p->layout = choose_layout(weight);
    p->rows = weight->rows;
    p->cols = weight->cols;
    p->blocksize = weight->blocksize;
    p->row_blocks = p->layout == QLLM_LAYOUT_BLOCKS ? p->cols / p->blocksize : 0;
    p->offset = weight->offset;
    copy_floats(p->code, weight->code, 16);
    copy_floats(p->nested_code, weight->nested_code, 256);
    status = fill(weight, p, name, error);
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

qllm_status qllm_unpack(const qllm_packed *packed, qllm_qweight *out, qllm_error *error)
{
    qllm_status status = qllm_qweight_init(out, packed->format, packed->rows, packed->cols,
                                           packed->blocksize, "an unpacked weight", error);
    if (status != QLLM_OK)
        return status;
    if (packed->layout == QLLM_LAYOUT_BYTES) {
        copy_standard(&packed->standard, out);
        return QLLM_OK;
    }
    for (int64_t row = 0; row < packed->rows; row++)
        unpack_row(packed, out, row);
    if (packed->layout == QLLM_LAYOUT_INT8)
        copy_floats(out->absmax, packed->row_absmax, packed->rows);
    if (packed->nested_absmax != NULL)
        copy_floats(out->nested_absmax, packed->nested_absmax, qllm_qweight_nested_blocks(out));
    out->offset = packed->offset;
    copy_floats(out->code, packed->code, 16);
    copy_floats(out->nested_code, packed->nested_code, 256);
    return QLLM_OK;
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
