#include "cpu/linear.h"

#include <string.h>

#include "core/checked.h"
#include "cpu/packed_layout.h"

enum {
    SMALL_JOB = 1 << 16,  /* products; below, waking a thread costs more than it saves */
    BLOCK_UNIT = 4,       /* tiles that stay together when many rows share decoded weights */
    BLOCK_ROWS = 4        /* more rows than this do */
};

/* The parts of the scratch memory, each on a line of its own. */
typedef struct int8_rows {
    int8_t *q;            /* (m, cols padded to 64) */
    float *scale;         /* (m) */
    int64_t *n_outliers;  /* (m) */
    int32_t *outliers;    /* (m, cols) */
    uint8_t *used;        /* (cols) per-batch form: columns that are outliers in any row */
} int8_rows;

/* Advances *bytes by count * size, rounded up to a line; false when that does not fit. */
static bool reserve(int64_t count, int64_t size, int64_t *bytes)
{
    int64_t part;
    return qllm_checked_mul(count, size, &part) &&
           qllm_checked_round_up(part, QLLM_LINE, &part) && qllm_checked_add(*bytes, part, bytes);
}

int64_t qllm_cpu_linear_scratch(int64_t cols, int64_t m)
{
    int64_t bytes = 0, padded, elements;
    if (qllm_checked_round_up(cols, QLLM_INT8_PAD, &padded) &&
        qllm_checked_mul(m, padded, &elements) && reserve(elements, 1, &bytes) &&
        reserve(m, sizeof(float), &bytes) && reserve(m, sizeof(int64_t), &bytes) &&
        reserve(elements, sizeof(int32_t), &bytes) && reserve(cols, 1, &bytes))
        return bytes;
    return -1;
}

static int8_rows divide_scratch(void *scratch, int64_t cols, int64_t m)
{
    int64_t padded = (cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD, at = 0;
    uint8_t *base = scratch;
    int8_rows rows;
    rows.q = (int8_t *)base;
    reserve(m * padded, 1, &at);
    rows.scale = (float *)(void *)(base + at);
    reserve(m, sizeof(float), &at);
    rows.n_outliers = (int64_t *)(void *)(base + at);
    reserve(m, sizeof(int64_t), &at);
    rows.outliers = (int32_t *)(void *)(base + at);
    reserve(m * padded, sizeof(int32_t), &at);
    rows.used = base + at;
    return rows;
}

/* Everything a thread needs. */
typedef struct linear_job {
    const qllm_cpu_ops *ops;
    const qllm_packed *weight;
    const float *bias;
    qllm_rows rows;
    int8_rows int8;
    float threshold;
    int64_t unit; /* tiles per item of the split */
    float *y;
    int64_t y_stride;
} linear_job;

static void quantize_rows(void *context, int64_t begin, int64_t end, int thread)
{
    linear_job *job = context;
    int64_t cols = job->rows.cols;
    int64_t padded = (cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        job->ops->int8_activation(job->rows.x + r * job->rows.stride, cols, job->threshold,
                                  job->int8.q + r * padded, &job->int8.scale[r],
                                  job->int8.outliers + r * cols, &job->int8.n_outliers[r]);
}

/* bitsandbytes' form: a column with an outlier in any row is one in every row. */
static void share_outliers(const int8_rows *int8, int64_t m, int64_t cols)
{
    int64_t padded = (cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD;
    memset(int8->used, 0, (size_t)cols);
    for (int64_t r = 0; r < m; r++)
        for (int64_t j = 0; j < int8->n_outliers[r]; j++)
            int8->used[int8->outliers[r * cols + j]] = 1;
    for (int64_t r = 0; r < m; r++) {
        int8->n_outliers[r] = 0;
        for (int64_t k = 0; k < cols; k++)
            if (int8->used[k]) {
                int8->q[r * padded + k] = 0;
                int8->outliers[r * cols + int8->n_outliers[r]++] = (int32_t)k;
            }
    }
}

static void multiply_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const linear_job *job = context;
    int64_t last = end * job->unit < job->weight->tiles ? end * job->unit : job->weight->tiles;
    (void)thread;
    job->ops->linear(job->weight, job->bias, &job->rows, begin * job->unit, last, job->y,
                     job->y_stride);
}

static bool is_small(int64_t rows, int64_t cols, int64_t m)
{
    int64_t weights, products;
    return qllm_checked_mul(rows, cols, &weights) && qllm_checked_mul(weights, m, &products) &&
           products < SMALL_JOB;
}

void qllm_cpu_linear(qllm_threads *threads, const qllm_cpu_ops *ops, const qllm_packed *weight,
                     const float *bias, const float *x, int64_t m, int64_t x_stride,
                     const qllm_linear_options *options, void *scratch, float *y, int64_t y_stride)
{
    int64_t cols = weight->cols, tiles = weight->tiles;
    bool small = is_small(weight->rows, cols, m);
    linear_job job = {.ops = ops, .weight = weight, .bias = bias, .y = y, .y_stride = y_stride,
                      .threshold = options->int8_threshold, .unit = 1};
    job.rows = (qllm_rows){.x = x, .m = m, .cols = cols, .stride = x_stride};
    if (m <= 0 || tiles == 0)
        return;
    if (weight->layout == QLLM_LAYOUT_INT8) {
        job.int8 = divide_scratch(scratch, cols, m);
        if (small || m <= BLOCK_ROWS)
            quantize_rows(&job, 0, m, 0);
        else
            qllm_threads_run(threads, m, quantize_rows, &job);
        if (options->int8_batch && job.threshold > 0.0f)
            share_outliers(&job.int8, m, cols);
        job.rows.q = job.int8.q;
        job.rows.scale = job.int8.scale;
        job.rows.outliers = job.int8.outliers;
        job.rows.n_outliers = job.int8.n_outliers;
    }
    if (m > BLOCK_ROWS && tiles >= 2 * BLOCK_UNIT * qllm_threads_count(threads))
        job.unit = BLOCK_UNIT;
    int64_t units = (tiles + job.unit - 1) / job.unit;
    if (small)
        multiply_tiles(&job, 0, units, 0);
    else
        qllm_threads_run(threads, units, multiply_tiles, &job);
}
