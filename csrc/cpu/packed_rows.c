/* Rows of a packed weight as values. */
#include <string.h>

#include "core/alloc.h"
#include "cpu/packing.h"

static int64_t whole_lines(int64_t bytes)
{
    return (bytes + QLLM_LINE - 1) / QLLM_LINE * QLLM_LINE;
}

qllm_tile_buffer qllm_tile_buffer_of(const qllm_packed *packed, int64_t values)
{
    qllm_tile_buffer buffer;
    buffer.stride = whole_lines(qllm_packed_row_bytes(packed)) + QLLM_LINE;
    buffer.absmax_at = QLLM_TILE_ROWS * buffer.stride;
    buffer.codes_at = buffer.absmax_at + whole_lines(QLLM_TILE_ROWS * packed->row_blocks * 4);
    buffer.values_at = buffer.codes_at + whole_lines(QLLM_TILE_ROWS * packed->row_blocks);
    buffer.bytes = buffer.values_at + whole_lines(values * 4);
    return buffer;
}

qllm_tile_rows qllm_tile_buffer_rows(const qllm_tile_buffer *buffer, uint8_t *memory)
{
    return (qllm_tile_rows){.bytes = memory, .stride = buffer->stride,
                            .absmax = (float *)(void *)(memory + buffer->absmax_at),
                            .codes = memory + buffer->codes_at};
}

/* The absmax of a row's blocks from their codes. */
static void nested_absmax(const qllm_packed *p, int64_t row, const uint8_t *codes, float *absmax)
{
    for (int64_t b = 0; b < p->row_blocks; b++) {
        int64_t block = row * p->row_blocks + b;
        float scaled = p->nested_code[codes[b]] * p->nested_absmax[block / QLLM_NESTED_BLOCKSIZE];
        absmax[b] = scaled + p->offset;
    }
}

void qllm_tile_row_values(const qllm_packed *p, const qllm_encode_ops *ops,
                          const qllm_tile_rows *rows, int64_t tile, int64_t r, float *out)
{
    int64_t row = tile * QLLM_TILE_ROWS + r;
    uint8_t *bytes = rows->bytes + r * rows->stride;
    float *absmax = rows->absmax + r * p->row_blocks;
    if (p->layout == QLLM_LAYOUT_BYTES) {
        qllm_dequantize(&p->standard, row * p->cols, p->cols, out);
    } else if (p->layout == QLLM_LAYOUT_BLOCKS) {
        if (qllm_packed_nested(p))
            nested_absmax(p, row, rows->codes + r * p->row_blocks, absmax);
        ops->decode_blocks(p->code, bytes, absmax, p->row_blocks, p->blocksize, out);
    } else {
        qllm_qweight view = {.format = p->format, .rows = 1, .cols = p->cols, .data = bytes};
        if (p->layout == QLLM_LAYOUT_INT8)
            view.absmax = p->row_absmax + row;
        qllm_dequantize(&view, 0, p->cols, out);
    }
}

typedef struct rows_job {
    const qllm_encode_ops *ops;
    const qllm_packed *packed;
    int64_t first, end; /* rows that are wanted */
    qllm_dtype dtype;
    uint8_t *out;
    uint8_t *buffers; /* of threads; a row of values behind each */
    qllm_tile_buffer buffer;
} rows_job;

static void dequantize_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const rows_job *job = context;
    const qllm_packed *p = job->packed;
    uint8_t *memory = job->buffers + thread * job->buffer.bytes;
    float *values = (float *)(void *)(memory + job->buffer.values_at);
    qllm_tile_rows rows = qllm_tile_buffer_rows(&job->buffer, memory);
    int64_t row_bytes = p->cols * qllm_dtype_size(job->dtype);
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t start = tile * QLLM_TILE_ROWS;
        rows.n = qllm_tile_row_count(p, tile);
        if (start + rows.n <= job->first || start >= job->end)
            continue;
        qllm_tile_take(p, job->ops, tile, &rows);
        for (int64_t row = start; row < start + rows.n; row++) {
            uint8_t *out = job->out + (row - job->first) * row_bytes;
            if (row < job->first || row >= job->end)
                continue;
            qllm_tile_row_values(p, job->ops, &rows, tile, row - start, values);
            job->ops->from_float(values, job->dtype, p->cols, out);
        }
    }
}

qllm_status qllm_packed_dequantize(const qllm_packer *packer, const qllm_packed *packed,
                                   int64_t first, int64_t n, qllm_dtype dtype, void *out,
                                   qllm_error *error)
{
    void *buffers;
    rows_job job = {.ops = packer->ops, .packed = packed, .first = first, .end = first + n,
                    .dtype = dtype, .out = out,
                    .buffer = qllm_tile_buffer_of(packed, packed->cols)};
    qllm_status status = qllm_alloc_scratch(&buffers, qllm_packer_threads(packer),
                                            job.buffer.bytes, "the buffers of reading", error);
    job.buffers = buffers;
    if (status == QLLM_OK)
        qllm_packer_run(packer, packed, dequantize_tiles, &job);
    qllm_free(buffers);
    return status;
}
