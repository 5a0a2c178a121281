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
    uint8_t *buffers;      /* of threads; a row of values twice behind each */
    qllm_tile_buffer buffer;
} error_job;

static void measure_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const error_job *job = context;
    const qllm_packed *p = job->packed;
    uint8_t *memory = job->buffers + thread * job->buffer.bytes;
    float *x = (float *)(void *)(memory + job->buffer.values_at), *y = x + p->cols;
    qllm_tile_rows rows = qllm_tile_buffer_rows(&job->buffer, memory);
    for (int64_t tile = begin; tile < end; tile++) {
        rows.n = qllm_tile_row_count(p, tile);
        qllm_tile_take(p, job->ops, tile, &rows);
        for (int64_t r = 0; r < rows.n; r++) {
            int64_t row = tile * QLLM_TILE_ROWS + r, first = row * p->cols;
            const qllm_tensor *source = job->source;
            job->ops->to_float((const uint8_t *)source->data +
                                   first * qllm_dtype_size(source->dtype),
                               source->dtype, p->cols, x);
            qllm_tile_row_values(p, job->ops, &rows, tile, r, y);
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
    job.buffer = qllm_tile_buffer_of(packed, 2 * packed->cols);
    status = qllm_alloc(&sums, packed->rows, sizeof(qllm_error_sums), "the errors of rows", error);
    if (status == QLLM_OK)
        status = qllm_alloc(&buffers, qllm_packer_threads(packer), job.buffer.bytes,
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
