/* Unquantized rows straight into tiles, and the error of tiles against them. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/alloc.h"
#include "cpu/packing.h"
#include "cpu/quantize.h"

typedef struct source_job {
    const qllm_encode_ops *ops;
    qllm_packed *packed;
    const qllm_tensor *source;
    qllm_code_table table;
    uint8_t *buffers; /* of threads: 16 rows of standard bytes, their absmax, a row of floats */
    int64_t buffer_bytes, stride, floats_at, absmax_at;
    float *absmax;    /* nested forms: of all blocks */
    _Atomic bool refused; /* a value is not finite or out of range */
} source_job;

static const uint8_t *row_of(const qllm_tensor *source, int64_t row)
{
    return (const uint8_t *)source->data + row * source->cols * qllm_dtype_size(source->dtype);
}

static int64_t whole_lines(int64_t bytes)
{
    return (bytes + QLLM_LINE - 1) / QLLM_LINE * QLLM_LINE;
}

/* A row in a float format other than its own. */
static bool convert_row(const source_job *job, int64_t row, float *x, uint8_t *out)
{
    const qllm_tensor *source = job->source;
    qllm_dtype dtype = qllm_format_dtype(job->packed->format);
    float *values = dtype == QLLM_F32 ? (float *)(void *)out : x;
    job->ops->to_float(row_of(source, row), source->dtype, source->cols, values);
    if (dtype != QLLM_F32)
        qllm_from_float(values, dtype, source->cols, out);
    return qllm_largest_bits(values, source->cols) < qllm_overflow_bits(dtype);
}

/* One row to standard bytes at `out`; false when it cannot be.  scales: of the row's blocks. */
static bool encode_row(const source_job *job, int64_t row, float *scales, float *x, uint8_t *out)
{
    const qllm_tensor *source = job->source;
    qllm_packed *p = job->packed;
    if (p->layout == QLLM_LAYOUT_BLOCKS)
        return job->ops->blocks(&job->table, row_of(source, row), source->dtype, p->row_blocks,
                                p->blocksize, out, scales);
    if (p->layout == QLLM_LAYOUT_INT8)
        return job->ops->int8_row(row_of(source, row), source->dtype, source->cols, (int8_t *)out,
                                  &p->row_absmax[row]);
    return convert_row(job, row, x, out);
}

static void pack_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    source_job *job = context;
    qllm_packed *p = job->packed;
    const qllm_tensor *source = job->source;
    uint8_t *buffer = job->buffers + thread * job->buffer_bytes;
    bool same = qllm_format_is_float(p->format) && qllm_format_dtype(p->format) == source->dtype;
    bool accepted = true;
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t first = tile * QLLM_TILE_ROWS;
        qllm_tile_rows rows = {.n = qllm_tile_row_count(p, tile), .bytes = buffer,
                               .stride = job->stride};
        rows.absmax = job->absmax != NULL ? job->absmax + first * p->row_blocks
                                          : (float *)(void *)(buffer + job->absmax_at);
        if (same) {
            rows.bytes = (uint8_t *)row_of(source, first);
            rows.stride = qllm_packed_row_bytes(p);
            accepted &= job->ops->all_finite(rows.bytes, source->dtype, rows.n * source->cols);
        }
        for (int64_t r = 0; !same && r < rows.n; r++)
            accepted &= encode_row(job, first + r, rows.absmax + r * p->row_blocks,
                                   (float *)(void *)(buffer + job->floats_at),
                                   buffer + r * job->stride);
        qllm_tile_put(p, job->ops, tile, &rows);
    }
    if (!accepted)
        atomic_store(&job->refused, true);
}

static void divide_buffer(source_job *job)
{
    const qllm_packed *p = job->packed;
    /* one line more than a row has, so that rows do not meet in the same sets of the cache */
    job->stride = whole_lines(qllm_packed_row_bytes(p)) + QLLM_LINE;
    job->absmax_at = QLLM_TILE_ROWS * job->stride;
    job->floats_at = job->absmax_at + QLLM_TILE_ROWS * whole_lines(p->row_blocks * 4);
    job->buffer_bytes = job->floats_at + (qllm_format_is_float(p->format)
                                              ? whole_lines(p->cols * 4) : 0);
}

typedef struct codes_job {
    qllm_packed *packed;
    const uint8_t *codes;
} codes_job;

static void put_codes(void *context, int64_t begin, int64_t end, int thread)
{
    const codes_job *job = context;
    (void)thread;
    for (int64_t tile = begin; tile < end; tile++)
        qllm_tile_put_codes(job->packed, tile, qllm_tile_row_count(job->packed, tile),
                            job->codes + tile * QLLM_TILE_ROWS * job->packed->row_blocks);
}

/* The second level, when the absmax of all blocks are known. */
static qllm_status pack_nested(const qllm_packer *packer, const source_job *job, qllm_error *error)
{
    qllm_packed *p = job->packed;
    int64_t blocks = p->rows * p->row_blocks;
    void *codes;
    qllm_status status = qllm_alloc(&codes, blocks, 1, "the absmax codes of a weight", error);
    if (status != QLLM_OK)
        return status;
    status = qllm_nested_by(packer, job->absmax, blocks, &p->offset, p->nested_absmax, codes,
                            error);
    if (status == QLLM_OK) {
        codes_job put = {p, codes};
        qllm_packer_run(packer, p, put_codes, &put);
    }
    qllm_free(codes);
    return status;
}

static qllm_status fill_tiles(const qllm_packer *packer, source_job *job, const char *name,
                              qllm_error *error)
{
    qllm_packed *p = job->packed;
    void *buffers = NULL, *absmax = NULL;
    bool nested = qllm_packed_nested(p);
    divide_buffer(job);
    qllm_code_table_init(&job->table, p->format == QLLM_FORMAT_FP4 ||
                                          p->format == QLLM_FORMAT_FP4_DQ);
    qllm_status status = qllm_alloc(&buffers, qllm_packer_threads(packer), job->buffer_bytes,
                                    "the buffers of packing", error);
    if (status == QLLM_OK && nested)
        status = qllm_alloc(&absmax, p->rows * p->row_blocks, sizeof(float),
                            "the absmax values of a weight", error);
    job->buffers = buffers;
    job->absmax = absmax;
    if (status == QLLM_OK)
        qllm_packer_run(packer, p, pack_tiles, job);
    if (status == QLLM_OK && atomic_load(&job->refused))
        status = qllm_quantize_check(job->source, p->format, name, error);
    else if (status == QLLM_OK && nested)
        status = pack_nested(packer, job, error);
    qllm_free(absmax);
    qllm_free(buffers);
    return status;
}

qllm_status qllm_pack_source(const qllm_packer *packer, const qllm_tensor *source,
                             qllm_format format, int64_t blocksize, const char *name,
                             qllm_packed **out, qllm_error *error)
{
    qllm_qweight like;
    qllm_packed *p = NULL;
    *out = NULL;
    qllm_status status = qllm_tensor_check(source, name, error);
    if (status == QLLM_OK)
        status = qllm_qweight_describe(&like, format, source->rows, source->cols, blocksize, name,
                                       error);
    if (status == QLLM_OK)
        status = qllm_packed_create(&like, name, &p, error);
    if (status == QLLM_OK && p->layout == QLLM_LAYOUT_BYTES) {
        status = qllm_cpu_quantize(packer, source, format, blocksize, false, name, &p->standard,
                                   error);
        p->offset = p->standard.offset;
    } else if (status == QLLM_OK) {
        source_job job = {.ops = packer->ops, .packed = p, .source = source};
        status = fill_tiles(packer, &job, name, error);
    }
    if (status == QLLM_OK)
        *out = p;
    else
        qllm_packed_destroy(p);
    return status;
}
