/* Standard bytes into tiles and back. */
#include <string.h>

#include "core/alloc.h"
#include "cpu/packing.h"

enum { SMALL_WEIGHT = 1 << 16 }; /* elements; below, waking a thread costs more than it saves */

/* tiles ---------------------------------------------------------------------------------------- */

int qllm_tile_row_count(const qllm_packed *packed, int64_t tile)
{
    int64_t left = packed->rows - tile * QLLM_TILE_ROWS;
    return left < QLLM_TILE_ROWS ? (int)left : QLLM_TILE_ROWS;
}

int64_t qllm_packed_row_bytes(const qllm_packed *packed)
{
    switch (packed->layout) {
    case QLLM_LAYOUT_F32: return packed->cols * 4;
    case QLLM_LAYOUT_F16:
    case QLLM_LAYOUT_BF16: return packed->cols * 2;
    case QLLM_LAYOUT_INT8: return packed->cols;
    default: return packed->cols / 2;
    }
}

/* BLOCKS: the lines of codes; scale lines stand between the runs. */
static qllm_lines code_lines(const qllm_packed *p)
{
    int64_t blocks = qllm_packed_nested(p) ? QLLM_UNIT_BLOCKS : 1;
    int64_t bytes = blocks * qllm_block_bytes(p);
    return (qllm_lines){p->cols / QLLM_STEP, bytes / QLLM_LINE, bytes + QLLM_LINE};
}

/* BLOCKS, not nested: the lines of absmax, of which the first stands behind the first block. */
static qllm_lines absmax_lines(const qllm_packed *p)
{
    return (qllm_lines){p->row_blocks, 1, qllm_block_bytes(p) + QLLM_LINE};
}

static qllm_lines all_lines(const qllm_packed *p)
{
    return (qllm_lines){p->tile_bytes / QLLM_LINE, p->tile_bytes / QLLM_LINE, 0};
}

void qllm_tile_put_codes(qllm_packed *packed, int64_t tile, int n, const uint8_t *codes)
{
    uint8_t *base = packed->data + tile * packed->tile_bytes;
    for (int64_t first = 0; first < packed->row_blocks; first += QLLM_UNIT_BLOCKS) {
        uint8_t *line = base + qllm_unit_codes_offset(packed, first / QLLM_UNIT_BLOCKS);
        int64_t left = packed->row_blocks - first;
        int64_t blocks = left < QLLM_UNIT_BLOCKS ? left : QLLM_UNIT_BLOCKS;
        memset(line, 0, QLLM_LINE);
        for (int64_t r = 0; r < n; r++)
            for (int64_t b = 0; b < blocks; b++)
                line[qllm_unit_code_byte(r, b)] = codes[r * packed->row_blocks + first + b];
    }
}

static void take_codes(const qllm_packed *packed, int64_t tile, int n, uint8_t *codes)
{
    const uint8_t *base = qllm_packed_tile(packed, tile);
    for (int64_t b = 0; b < packed->row_blocks; b++) {
        const uint8_t *line = base + qllm_unit_codes_offset(packed, b / QLLM_UNIT_BLOCKS);
        for (int64_t r = 0; r < n; r++)
            codes[r * packed->row_blocks + b] = line[qllm_unit_code_byte(r, b % QLLM_UNIT_BLOCKS)];
    }
}

static void sum_rows(qllm_packed *packed, int64_t tile, const qllm_tile_rows *rows)
{
    for (int64_t r = 0; r < rows->n; r++) {
        const int8_t *codes = (const int8_t *)rows->bytes + r * rows->stride;
        int32_t sum = 0;
        for (int64_t k = 0; k < packed->cols; k++)
            sum += codes[k];
        packed->row_sums[tile * QLLM_TILE_ROWS + r] = sum;
    }
}

static void put_blocks(qllm_packed *p, const qllm_encode_ops *ops, int64_t tile,
                       const qllm_tile_rows *rows)
{
    uint8_t *base = p->data + tile * p->tile_bytes;
    ops->interleave(rows->bytes, rows->stride, p->cols / 2, rows->n, code_lines(p), base);
    if (!qllm_packed_nested(p))
        ops->interleave((const uint8_t *)rows->absmax, p->row_blocks * 4, p->row_blocks * 4,
                        rows->n, absmax_lines(p), base + qllm_block_bytes(p));
    else if (rows->codes != NULL)
        qllm_tile_put_codes(p, tile, rows->n, rows->codes);
}

void qllm_tile_put(qllm_packed *packed, const qllm_encode_ops *ops, int64_t tile,
                   const qllm_tile_rows *rows)
{
    uint8_t *base = packed->data + tile * packed->tile_bytes;
    int64_t row_bytes = qllm_packed_row_bytes(packed);
    switch (packed->layout) {
    case QLLM_LAYOUT_INT8:
        sum_rows(packed, tile, rows);
        ops->interleave(rows->bytes, rows->stride, row_bytes, rows->n, all_lines(packed), base);
        break;
    case QLLM_LAYOUT_F32:
    case QLLM_LAYOUT_BF16:
        ops->interleave(rows->bytes, rows->stride, row_bytes, rows->n, all_lines(packed), base);
        break;
    case QLLM_LAYOUT_F16:
        ops->interleave_halves(rows->bytes, rows->stride, row_bytes, rows->n,
                               packed->tile_bytes / QLLM_LINE, base);
        break;
    case QLLM_LAYOUT_BLOCKS: put_blocks(packed, ops, tile, rows); break;
    case QLLM_LAYOUT_BYTES: break;
    }
}

void qllm_tile_take(const qllm_packed *packed, const qllm_encode_ops *ops, int64_t tile,
                    const qllm_tile_rows *rows)
{
    const uint8_t *base = qllm_packed_tile(packed, tile);
    int64_t row_bytes = qllm_packed_row_bytes(packed);
    switch (packed->layout) {
    case QLLM_LAYOUT_F32:
    case QLLM_LAYOUT_BF16:
    case QLLM_LAYOUT_INT8:
        ops->deinterleave(base, all_lines(packed), rows->bytes, rows->stride, row_bytes, rows->n);
        break;
    case QLLM_LAYOUT_F16:
        ops->deinterleave_halves(base, packed->tile_bytes / QLLM_LINE, rows->bytes, rows->stride,
                                 row_bytes, rows->n);
        break;
    case QLLM_LAYOUT_BLOCKS:
        ops->deinterleave(base, code_lines(packed), rows->bytes, rows->stride, row_bytes, rows->n);
        if (qllm_packed_nested(packed))
            take_codes(packed, tile, rows->n, rows->codes);
        else
            ops->deinterleave(base + qllm_block_bytes(packed), absmax_lines(packed),
                              (uint8_t *)rows->absmax, packed->row_blocks * 4,
                              packed->row_blocks * 4, rows->n);
        break;
    case QLLM_LAYOUT_BYTES: break;
    }
}

/* jobs ----------------------------------------------------------------------------------------- */

int qllm_packer_threads(const qllm_packer *packer)
{
    return packer->threads != NULL ? qllm_threads_count(packer->threads) : 1;
}

void qllm_packer_run(const qllm_packer *packer, const qllm_packed *packed,
                     void (*work)(void *context, int64_t begin, int64_t end, int thread),
                     void *context)
{
    if (packed->tiles == 0)
        return;
    if (packer->threads == NULL || packed->rows * packed->cols < SMALL_WEIGHT)
        work(context, 0, packed->tiles, 0);
    else
        qllm_threads_run(packer->threads, packed->tiles, work, context);
}

typedef struct standard_job {
    const qllm_encode_ops *ops;
    qllm_packed *packed;
    const qllm_qweight *weight; /* its arrays are read or written */
} standard_job;

/* The rows of a tile in the arrays of a standard weight. */
static qllm_tile_rows standard_rows(const standard_job *job, int64_t tile)
{
    const qllm_packed *p = job->packed;
    const qllm_qweight *w = job->weight;
    int64_t first = tile * QLLM_TILE_ROWS, row_bytes = qllm_packed_row_bytes(p);
    int64_t block = first * p->row_blocks;
    return (qllm_tile_rows){
        .n = qllm_tile_row_count(p, tile),
        .bytes = w->data + first * row_bytes,
        .stride = row_bytes,
        .absmax = w->absmax != NULL ? w->absmax + block : NULL,
        .codes = w->absmax_codes != NULL ? w->absmax_codes + block : NULL,
    };
}

static void put_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const standard_job *job = context;
    (void)thread;
    for (int64_t tile = begin; tile < end; tile++) {
        qllm_tile_rows rows = standard_rows(job, tile);
        qllm_tile_put(job->packed, job->ops, tile, &rows);
    }
}

static void take_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const standard_job *job = context;
    (void)thread;
    for (int64_t tile = begin; tile < end; tile++) {
        qllm_tile_rows rows = standard_rows(job, tile);
        qllm_tile_take(job->packed, job->ops, tile, &rows);
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

static qllm_status fill(const qllm_packer *packer, const qllm_qweight *weight, qllm_packed *p,
                        const char *name, qllm_error *error)
{
    if (p->layout == QLLM_LAYOUT_BYTES) {
        qllm_status status = qllm_qweight_init(&p->standard, p->format, p->rows, p->cols,
                                               p->blocksize, name, error);
        if (status == QLLM_OK)
            copy_standard(weight, &p->standard);
        return status;
    }
    standard_job job = {packer->ops, p, weight};
    qllm_packer_run(packer, p, put_tiles, &job);
    if (p->layout == QLLM_LAYOUT_INT8)
        copy_floats(p->row_absmax, weight->absmax, p->rows);
    if (p->nested_absmax != NULL)
        copy_floats(p->nested_absmax, weight->nested_absmax, qllm_qweight_nested_blocks(weight));
    return QLLM_OK;
}

qllm_status qllm_pack(const qllm_packer *packer, const qllm_qweight *weight, const char *name,
                      qllm_packed **out, qllm_error *error)
{
    qllm_packed *p;
    *out = NULL;
    qllm_status status = qllm_packed_create(weight, name, &p, error);
    if (status == QLLM_OK)
        status = fill(packer, weight, p, name, error);
    if (status == QLLM_OK)
        *out = p;
    else
        qllm_packed_destroy(p);
    return status;
}

qllm_status qllm_unpack(const qllm_packer *packer, const qllm_packed *packed, qllm_qweight *out,
                        qllm_error *error)
{
    qllm_status status = qllm_qweight_init(out, packed->format, packed->rows, packed->cols,
                                           packed->blocksize, "an unpacked weight", error);
    if (status != QLLM_OK)
        return status;
    if (packed->layout == QLLM_LAYOUT_BYTES) {
        copy_standard(&packed->standard, out);
        return QLLM_OK;
    }
    standard_job job = {packer->ops, (qllm_packed *)packed, out};
    qllm_packer_run(packer, packed, take_tiles, &job);
    if (packed->layout == QLLM_LAYOUT_INT8)
        copy_floats(out->absmax, packed->row_absmax, packed->rows);
    if (packed->nested_absmax != NULL)
        copy_floats(out->nested_absmax, packed->nested_absmax, qllm_qweight_nested_blocks(out));
    out->offset = packed->offset;
    copy_floats(out->code, packed->code, 16);
    copy_floats(out->nested_code, packed->nested_code, 256);
    return QLLM_OK;
}

void qllm_packed_row(const qllm_packed *packed, int64_t row, float *out)
{
    const uint8_t *tile = qllm_packed_tile(packed, row / QLLM_TILE_ROWS);
    int64_t r = row % QLLM_TILE_ROWS;
    for (int64_t k = 0; k < packed->cols; k++) {
        uint16_t half;
        switch (packed->layout) {
        case QLLM_LAYOUT_BF16:
            memcpy(&half, tile + k / 2 * QLLM_LINE + r * 4 + k % 2 * 2, sizeof half);
            out[k] = qllm_bf16_to_float(half);
            break;
        case QLLM_LAYOUT_F16:
            memcpy(&half, tile + k * (QLLM_LINE / 2) + r * 2, sizeof half);
            out[k] = qllm_f16_to_float(half);
            break;
        default: memcpy(&out[k], tile + k * QLLM_LINE + r * 4, sizeof *out); break;
        }
    }
}
