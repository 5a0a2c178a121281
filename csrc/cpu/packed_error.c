/* The error of a packed weight against what it was made from. */
#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "cpu/packing.h"

typedef struct error_job {
    const qllm_encode_ops *ops;
    const qllm_packed *packed;
    const qllm_tensor *source;
    qllm_error_sums *sums; /* (rows) */
    uint8_t *buffers;      /* of threads: 16 rows of standard bytes, their absmax and codes, and a
                              row of values twice */
    int64_t buffer_bytes, stride, absmax_at, codes_at, values_at;
} error_job;

static int64_t whole_lines(int64_t bytes)
{
    return (bytes + QLLM_LINE - 1) / QLLM_LINE * QLLM_LINE;
}

/* Row r of a tile, taken out of it, as a standard weight of one row without double quantization. */
static qllm_qweight view_row(const qllm_packed *p, const qllm_tile_rows *rows, int64_t tile,
                             int64_t r)
{
    int64_t row = tile * QLLM_TILE_ROWS + r;
    qllm_qweight view = {.format = p->format, .rows = 1, .cols = p->cols,
                         .blocksize = p->blocksize, .data = rows->bytes + r * rows->stride};
    memcpy(view.code, p->code, sizeof view.code);
    if (p->layout == QLLM_LAYOUT_INT8)
        view.absmax = p->row_absmax + row;
    if (p->layout != QLLM_LAYOUT_BLOCKS)
        return view;
    view.absmax = rows->absmax + r * p->row_blocks;
    if (qllm_packed_nested(p)) {
        view.format = p->format == QLLM_FORMAT_NF4_DQ ? QLLM_FORMAT_NF4 : QLLM_FORMAT_FP4;
        for (int64_t b = 0; b < p->row_blocks; b++) {
            int64_t block = row * p->row_blocks + b;
            float scaled = p->nested_code[rows->codes[r * p->row_blocks + b]] *
                           p->nested_absmax[block / QLLM_NESTED_BLOCKSIZE];
            view.absmax[b] = scaled + p->offset;
        }
    }
    return view;
}

static void measure_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const error_job *job = context;
    const qllm_packed *p = job->packed;
    uint8_t *buffer = job->buffers + thread * job->buffer_bytes;
    float *x = (float *)(void *)(buffer + job->values_at), *y = x + p->cols;
    qllm_tile_rows rows = {.bytes = buffer, .stride = job->stride,
                           .absmax = (float *)(void *)(buffer + job->absmax_at),
                           .codes = buffer + job->codes_at};
    for (int64_t tile = begin; tile < end; tile++) {
        rows.n = qllm_tile_row_count(p, tile);
        qllm_tile_take(p, job->ops, tile, &rows);
        for (int64_t r = 0; r < rows.n; r++) {
            int64_t row = tile * QLLM_TILE_ROWS + r, first = row * p->cols;
            const qllm_tensor *source = job->source;
            job->ops->to_float((const uint8_t *)source->data +
                                   first * qllm_dtype_size(source->dtype),
                               source->dtype, p->cols, x);
            if (p->layout == QLLM_LAYOUT_BYTES)
                qllm_dequantize(&p->standard, first, p->cols, y);
            else {
                qllm_qweight view = view_row(p, &rows, tile, r);
                qllm_dequantize(&view, 0, p->cols, y);
            }
            job->ops->row_error(x, y, p->cols, &job->sums[row]);
        }
    }
}

qllm_status qllm_packed_error(const qllm_packer *packer, const qllm_packed *packed,
                              const qllm_tensor *source, const char *name, qllm_quant_error *out,
                              qllm_error *error)
{
    void *sums = NULL, *buffers = NULL;
    qllm_error_sums all = {.largest = 0.0};
    error_job job = {.ops = packer->ops, .packed = packed, .source = source};
    qllm_status status = qllm_tensor_check(source, name, error);
    if (status != QLLM_OK)
        return status;
    if (source->rows != packed->rows || source->cols != packed->cols)
        return qllm_fail(error, QLLM_VALUE, "%s: shape (%" PRId64 ", %" PRId64 ") does not match "
                         "the quantized weight's (%" PRId64 ", %" PRId64 ")", name, source->rows,
                         source->cols, packed->rows, packed->cols);
    job.stride = whole_lines(qllm_packed_row_bytes(packed)) + QLLM_LINE;
    job.absmax_at = QLLM_TILE_ROWS * job.stride;
    job.codes_at = job.absmax_at + whole_lines(QLLM_TILE_ROWS * packed->row_blocks * 4);
    job.values_at = job.codes_at + whole_lines(QLLM_TILE_ROWS * packed->row_blocks);
    job.buffer_bytes = job.values_at + whole_lines(2 * packed->cols * 4);
    status = qllm_alloc(&sums, packed->rows, sizeof(qllm_error_sums), "the errors of rows", error);
    if (status == QLLM_OK)
        status = qllm_alloc(&buffers, qllm_packer_threads(packer), job.buffer_bytes,
                            "the buffers of a comparison", error);
    if (status == QLLM_OK) {
        job.sums = sums;
        job.buffers = buffers;
        qllm_packer_run(packer, packed, measure_tiles, &job);
        for (int64_t row = 0; row < packed->rows; row++)
            qllm_add_row_error(&all, &job.sums[row]);
        qllm_finish_error(&all, packed->rows * packed->cols, out);
    }
    qllm_free(buffers);
    qllm_free(sums);
    return status;
}
