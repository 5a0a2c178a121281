#include "cpu/quantize.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "core/alloc.h"
#include "core/codebook.h"
#include "cpu/packing.h"

enum { PIECE = 1 << 14 }; /* values that a thread takes at a time */

typedef struct quantize_job {
    const qllm_encode_ops *ops;
    const qllm_tensor *source;
    qllm_qweight *weight;
    float *absmax;
    qllm_code_table table;
    int64_t piece_blocks, blocks; /* whole blocks */
    uint8_t *scratch;             /* of a pass that keeps nothing: (threads, scratch_bytes) */
    int64_t scratch_bytes;
    _Atomic bool nonfinite;
} quantize_job;

static const uint8_t *element(const qllm_tensor *source, int64_t i)
{
    return (const uint8_t *)source->data + i * qllm_dtype_size(source->dtype);
}

static void run(const qllm_packer *packer, int64_t n,
                void (*work)(void *context, int64_t begin, int64_t end, int thread), void *context)
{
    if (packer->threads != NULL)
        qllm_threads_run(packer->threads, n, work, context);
    else if (n > 0)
        work(context, 0, n, 0);
}

/* 4 bits --------------------------------------------------------------------------------------- */

static void quantize_pieces(void *context, int64_t begin, int64_t end, int thread)
{
    quantize_job *job = context;
    int64_t size = job->weight->blocksize;
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t first = piece * job->piece_blocks, left = job->blocks - first;
        int64_t n = left < job->piece_blocks ? left : job->piece_blocks;
        uint8_t *bytes = job->weight->data + first * size / 2;
        float *absmax = job->absmax + first;
        if (job->scratch != NULL) {
            bytes = job->scratch + thread * job->scratch_bytes;
            absmax = (float *)(void *)(bytes + PIECE / 2);
        }
        if (!job->ops->blocks(&job->table, element(job->source, first * size), job->source->dtype,
                              n, size, bytes, absmax))
            atomic_store(&job->nonfinite, true);
    }
}

static void prepare_4bit(quantize_job *job)
{
    const qllm_qweight *w = job->weight;
    bool is_fp4 = w->format == QLLM_FORMAT_FP4 || w->format == QLLM_FORMAT_FP4_DQ;
    qllm_code_table_init(&job->table, is_fp4);
    job->blocks = w->rows * w->cols / w->blocksize;
    job->piece_blocks = PIECE / w->blocksize;
}

static int64_t pieces(const quantize_job *job)
{
    return (job->blocks + job->piece_blocks - 1) / job->piece_blocks;
}

/* The last block when it is not whole, by the reference. */
static void quantize_tail(quantize_job *job)
{
    qllm_qweight *w = job->weight, tail = *w;
    int64_t first = job->blocks * w->blocksize, n = w->rows * w->cols - first;
    if (n == 0)
        return;
    int64_t size = qllm_dtype_size(job->source->dtype);
    qllm_tensor rest = {element(job->source, first), n * size, job->source->dtype, 1, n};
    tail.rows = 1;
    tail.cols = n;
    tail.data = w->data + first / 2;
    qllm_quantize_4bit(&rest, job->absmax + job->blocks, &tail);
    if (isnan(job->absmax[job->blocks]))
        atomic_store(&job->nonfinite, true);
}

static qllm_status quantize_4bit(const qllm_packer *packer, quantize_job *job, qllm_error *error)
{
    qllm_qweight *w = job->weight;
    void *memory = NULL;
    bool nested = qllm_format_is_nested(w->format);
    qllm_status status = QLLM_OK;
    prepare_4bit(job);
    if (nested)
        status = qllm_alloc(&memory, qllm_qweight_blocks(w), sizeof(float),
                            "the absmax values of a weight", error);
    if (status != QLLM_OK)
        return status;
    job->absmax = nested ? memory : w->absmax;
    run(packer, pieces(job), quantize_pieces, job);
    quantize_tail(job);
    if (nested)
        status = qllm_nested_by(packer, job->absmax, qllm_qweight_blocks(w), &w->offset,
                                w->nested_absmax, w->absmax_codes, error);
    qllm_free(memory);
    return status;
}

typedef struct nested_job {
    const qllm_encode_ops *ops;
    const qllm_nested_table *table;
    const float *absmax;
    int64_t blocks;
    float offset, *nested_absmax;
    uint8_t *codes;
} nested_job;

static void quantize_groups(void *context, int64_t begin, int64_t end, int thread)
{
    const nested_job *job = context;
    (void)thread;
    for (int64_t group = begin; group < end; group++) {
        int64_t first = group * QLLM_NESTED_BLOCKSIZE, left = job->blocks - first;
        int64_t n = left < QLLM_NESTED_BLOCKSIZE ? left : QLLM_NESTED_BLOCKSIZE;
        float largest = qllm_nested_largest(job->absmax + first, n, job->offset);
        job->nested_absmax[group] = largest;
        if (largest > 0.0f)
            job->ops->nested_codes(job->table, job->absmax + first, n, job->offset, largest,
                                   job->codes + first);
        else /* a group of equal values, or NaN */
            memset(job->codes + first, qllm_dynamic_encode(0.0f), (size_t)n);
    }
}

qllm_status qllm_nested_by(const qllm_packer *packer, const float *absmax, int64_t blocks,
                           float *offset, float *nested_absmax, uint8_t *codes, qllm_error *error)
{
    void *table;
    qllm_status status = qllm_alloc(&table, 1, sizeof(qllm_nested_table),
                                    "the table of double quantization", error);
    if (status != QLLM_OK)
        return status;
    qllm_nested_table_init(table);
    *offset = qllm_nested_offset(absmax, blocks);
    nested_job job = {packer->ops, table, absmax, blocks, *offset, nested_absmax, codes};
    run(packer, (blocks + QLLM_NESTED_BLOCKSIZE - 1) / QLLM_NESTED_BLOCKSIZE, quantize_groups,
        &job);
    qllm_free(table);
    return QLLM_OK;
}

/* int8 and the whole --------------------------------------------------------------------------- */

static void quantize_rows(void *context, int64_t begin, int64_t end, int thread)
{
    quantize_job *job = context;
    int64_t cols = job->source->cols;
    for (int64_t row = begin; row < end; row++) {
        int8_t *codes = (int8_t *)job->weight->data + row * cols;
        float *absmax = job->absmax + row;
        if (job->scratch != NULL) {
            absmax = (float *)(void *)(job->scratch + thread * job->scratch_bytes);
            codes = (int8_t *)(absmax + 1);
        }
        if (!job->ops->int8_row(element(job->source, row * cols), job->source->dtype, cols, codes,
                                absmax))
            atomic_store(&job->nonfinite, true);
    }
}

static void look_at_rows(void *context, int64_t begin, int64_t end, int thread)
{
    quantize_job *job = context;
    int64_t cols = job->source->cols;
    (void)thread;
    if (!job->ops->all_finite(element(job->source, begin * cols), job->source->dtype,
                              (end - begin) * cols))
        atomic_store(&job->nonfinite, true);
}

qllm_status qllm_cpu_quantize(const qllm_packer *packer, const qllm_tensor *source,
                              qllm_format format, int64_t blocksize, bool allow_nonfinite,
                              const char *name, qllm_qweight *weight, qllm_error *error)
{
    if (qllm_format_is_float(format))
        return qllm_quantize(source, format, blocksize, allow_nonfinite, name, weight, error);
    quantize_job job = {.ops = packer->ops, .source = source, .weight = weight};
    *weight = (qllm_qweight){.format = QLLM_FORMAT_F32};
    qllm_status status = qllm_tensor_check(source, name, error);
    if (status == QLLM_OK)
        status = qllm_qweight_init(weight, format, source->rows, source->cols, blocksize, name,
                                   error);
    if (status == QLLM_OK && format == QLLM_FORMAT_INT8) {
        job.absmax = weight->absmax;
        run(packer, source->rows, quantize_rows, &job);
    } else if (status == QLLM_OK)
        status = quantize_4bit(packer, &job, error);
    if (status == QLLM_OK && !allow_nonfinite && atomic_load(&job.nonfinite))
        status = qllm_quantize_check(source, format, name, error);
    if (status != QLLM_OK)
        qllm_qweight_clear(weight);
    return status;
}

qllm_status qllm_cpu_quantize_pass(const qllm_packer *packer, const qllm_tensor *source,
                                   qllm_format format, int64_t blocksize, qllm_error *error)
{
    qllm_qweight weight;
    void *memory;
    quantize_job job = {.ops = packer->ops, .source = source, .weight = &weight};
    qllm_status status = qllm_qweight_describe(&weight, format, source->rows, source->cols,
                                               blocksize, "a pass", error);
    job.scratch_bytes = (PIECE + source->cols + 127) / 64 * 64;
    if (status == QLLM_OK)
        status = qllm_alloc(&memory, qllm_packer_threads(packer), job.scratch_bytes,
                            "the buffers of a pass", error);
    if (status != QLLM_OK)
        return status;
    job.scratch = memory;
    if (qllm_format_is_float(format))
        run(packer, source->rows, look_at_rows, &job);
    else if (format == QLLM_FORMAT_INT8)
        run(packer, source->rows, quantize_rows, &job);
    else {
        prepare_4bit(&job);
        run(packer, pieces(&job), quantize_pieces, &job);
    }
    qllm_free(memory);
    return QLLM_OK;
}
