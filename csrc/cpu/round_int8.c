#include "cpu/round_int8.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "cpu/packed_layout.h"

enum { FEW_ROWS = 4 }; /* the calling thread rounds them alone */

typedef struct rounding {
    const qllm_multiplier *by;
    const uint8_t *x;
    qllm_dtype dtype;
    int64_t cols;
    float threshold;
    int8_t *q;
    float *absmax;
    uint8_t *buffers; /* of threads: the four arrays below, each on lines of its own */
    int64_t outliers_at, q_at, used_at, buffer_bytes;
} rounding;

static bool divide_buffer(rounding *job)
{
    int64_t lines, floats;
    if (!qllm_checked_round_up(job->cols, QLLM_INT8_PAD, &lines) ||
        !qllm_checked_mul(lines, 4, &floats) || floats > INT64_MAX / 4)
        return false;
    job->outliers_at = floats;
    job->q_at = 2 * floats;
    job->used_at = job->q_at + lines;
    job->buffer_bytes = job->used_at + lines;
    return true;
}

/* The largest magnitude below the threshold. */
static float largest_below(const float *x, int64_t n, float threshold)
{
    float limit = threshold > 0.0f ? threshold : INFINITY, largest = 0.0f;
    for (int64_t k = 0; k < n; k++) {
        float magnitude = fabsf(x[k]);
        magnitude = magnitude < limit ? magnitude : 0.0f;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

static void round_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const rounding *job = context;
    uint8_t *buffer = job->buffers + thread * job->buffer_bytes, *used = buffer + job->used_at;
    float *x = (float *)(void *)buffer;
    int32_t *outliers = (int32_t *)(void *)(buffer + job->outliers_at);
    int8_t *q = (int8_t *)(buffer + job->q_at);
    int64_t cols = job->cols, n;
    for (int64_t r = begin; r < end; r++) {
        float scale;
        job->by->encode->to_float(job->x + r * cols * qllm_dtype_size(job->dtype), job->dtype, cols,
                                  x);
        job->by->ops->int8_activation(x, cols, job->threshold, q, 64, &scale, outliers, &n);
        memcpy(job->q + r * cols, q, (size_t)cols);
        job->absmax[r] = isnan(scale) ? scale : largest_below(x, cols, job->threshold);
        for (int64_t i = 0; i < n; i++)
            used[outliers[i]] = 1;
    }
}

static int64_t gather_used(const rounding *job, int threads, uint8_t *used)
{
    int64_t count = 0;
    memset(used, 0, (size_t)job->cols);
    for (int t = 0; t < threads; t++)
        for (int64_t k = 0; k < job->cols; k++)
            used[k] |= job->buffers[t * job->buffer_bytes + job->used_at + k];
    for (int64_t k = 0; k < job->cols; k++)
        count += used[k];
    return count;
}

qllm_status qllm_round_int8(const qllm_multiplier *by, const void *x, qllm_dtype dtype, int64_t m,
                            int64_t cols, float threshold, int8_t *q, float *absmax, uint8_t *used,
                            qllm_error *error)
{
    void *buffers;
    int threads = qllm_threads_count(by->threads);
    rounding job = {.by = by, .x = x, .dtype = dtype, .cols = cols, .threshold = threshold, .q = q,
                    .absmax = absmax};
    if (!divide_buffer(&job))
        return qllm_fail(error, QLLM_MEMORY, "x: its rows are longer than can be addressed");
    qllm_status status = qllm_alloc(&buffers, threads, job.buffer_bytes, "the buffers of rounding",
                                    error);
    if (status != QLLM_OK)
        return status;
    job.buffers = buffers;
    if (m <= FEW_ROWS)
        round_rows(&job, 0, m, 0);
    else
        qllm_threads_run(by->threads, m, round_rows, &job);
    if (gather_used(&job, threads, used) > 0 && m > 1)
        for (int64_t r = 0; r < m; r++)
            for (int64_t k = 0; k < cols; k++)
                q[r * cols + k] = used[k] ? 0 : q[r * cols + k];
    qllm_free(buffers);
    return QLLM_OK;
}
