#include "cpu/linear.h"

#include <string.h>

#include "core/checked.h"
#include "core/linear_ref.h"
#include "cpu/packed_layout.h"

enum {
    SMALL_JOB = 1 << 16, /* products; below, waking a thread costs more than it saves */
    BLOCK_UNIT = 4,      /* tiles that stay together when many rows share decoded weights */
    BLOCK_ROWS = 4       /* more rows than this do */
};

/* The rounded form of x, which parts of one job share. */
typedef struct form {
    qllm_tier tier;
    bool int8_weights; /* tier exact: LLM.int8() */
    bool panels;       /* tier exact, float weights: x is interleaved for the block kernel */
    int64_t block;     /* tiers int16 and int8 */
    int64_t distance;  /* tier bf16x2: columns from one to the other of a pair */
} form;

/* The parts of the scratch memory, each on a line of its own; in LLM.int8() all, in the other tiers
 * less than that. */
typedef struct rounded_rows {
    void *q;              /* (m) rows of q_stride bytes */
    int64_t q_stride;
    float *scale;         /* (m) or (m, blocks) */
    int32_t *block_sums;  /* (m, blocks) */
    int64_t *n_outliers;  /* (m) */
    int32_t *outliers;    /* (m, cols) */
    uint8_t *used;        /* (cols) per-batch form: columns that are outliers in any row */
} rounded_rows;

qllm_tier qllm_cpu_linear_tier(const qllm_cpu_ops *ops, const qllm_packed *weight,
                               qllm_compute compute)
{
    if (compute == QLLM_COMPUTE_EXACT)
        return QLLM_TIER_EXACT;
    if (weight->layout == QLLM_LAYOUT_BLOCKS)
        return compute == QLLM_COMPUTE_INT8 ? QLLM_TIER_INT8
               : ops->pairs_activation != NULL ? QLLM_TIER_BF16X2 : QLLM_TIER_INT16;
    if (weight->layout != QLLM_LAYOUT_BF16)
        return QLLM_TIER_EXACT;
    return ops->pairs_activation != NULL ? QLLM_TIER_BF16X2
           : ops->bf16_activation != NULL ? QLLM_TIER_BF16 : QLLM_TIER_EXACT;
}

/* Advances *bytes by count * size, rounded up to a line; false when that does not fit. */
static bool reserve(int64_t count, int64_t size, int64_t *bytes)
{
    int64_t part;
    return qllm_checked_mul(count, size, &part) &&
           qllm_checked_round_up(part, QLLM_LINE, &part) && qllm_checked_add(*bytes, part, bytes);
}

/* LLM.int8() takes 5 bytes for an element of x, 6 by panels, which are at most twice as many rows;
 * int16 takes 2, and two more numbers of 4 bytes for a block of at least 32; int8 takes 1 with such
 * numbers, and bf16x2 takes 2, both by panels; tier exact takes 4 for float weights. */
int64_t qllm_cpu_linear_scratch(int64_t cols, int64_t m)
{
    int64_t bytes = 0, padded, elements;
    if (qllm_checked_round_up(cols, QLLM_INT8_PAD, &padded) &&
        qllm_checked_mul(m, padded, &elements) && reserve(elements, 2, &bytes) &&
        reserve(m, sizeof(float), &bytes) && reserve(m, sizeof(int64_t), &bytes) &&
        reserve(elements, sizeof(int32_t), &bytes) && reserve(cols, 1, &bytes) &&
        qllm_checked_add(bytes, 2 * QLLM_LINE, &bytes))
        return bytes;
    return -1;
}

static void *take(uint8_t *base, int64_t count, int64_t size, int64_t *at)
{
    void *out = base + *at;
    reserve(count, size, at);
    return out;
}

/* `filled`: m and the rows that fill the last panel */
static rounded_rows divide_scratch(void *scratch, const form *form, int64_t cols, int64_t m,
                                   int64_t filled)
{
    int64_t padded = (cols + QLLM_INT8_PAD - 1) / QLLM_INT8_PAD * QLLM_INT8_PAD, at = 0;
    rounded_rows rows = {.q = NULL};
    if (form->panels) {
        rows.q = take(scratch, m * cols, sizeof(float), &at);
        return rows;
    }
    if (form->tier == QLLM_TIER_EXACT) {
        rows.q_stride = padded;
        rows.q = take(scratch, filled * padded, 1, &at);
        rows.scale = take(scratch, m, sizeof(float), &at);
        rows.n_outliers = take(scratch, m, sizeof(int64_t), &at);
        rows.outliers = take(scratch, m * padded, sizeof(int32_t), &at);
        rows.used = take(scratch, cols, 1, &at);
        return rows;
    }
    rows.q_stride = form->tier == QLLM_TIER_INT8 ? padded : 2 * padded;
    rows.q = take(scratch, filled, rows.q_stride, &at);
    if (form->block > 0)
        rows.scale = take(scratch, filled * (cols / form->block), sizeof(float), &at);
    if (form->tier == QLLM_TIER_INT8)
        rows.block_sums = take(scratch, filled * (cols / form->block), sizeof(int32_t), &at);
    return rows;
}

/* Everything a thread needs. */
typedef struct linear_job {
    const qllm_cpu_ops *ops;
    const qllm_linear_part *parts;
    int n_parts;
    int64_t part_units[QLLM_LINEAR_PARTS]; /* items of the split that each part has */
    int64_t unit;                          /* tiles per item */
    form form;
    qllm_rows rows;
    rounded_rows rounded;
    float threshold;
} linear_job;

static void round_into_panel(const linear_job *job, int64_t r)
{
    int64_t rows = job->rows.panel, cols = job->rows.cols, block = job->form.block;
    const float *x = job->rows.x + r * job->rows.stride;
    int8_t *panel = (int8_t *)job->rounded.q + r / rows * rows * job->rounded.q_stride;
    if (job->form.tier == QLLM_TIER_BF16X2) {
        job->ops->pairs_activation(x, cols, job->form.distance, rows,
                                   (uint16_t *)(void *)panel + r % rows * QLLM_GROUP);
        return;
    }
    job->ops->panel_activation(x, cols, block, rows, panel + r % rows * block,
                               job->rounded.scale + r / rows * rows * (cols / block) + r % rows);
}

/* LLM.int8(): column k of row r, of 64 columns that stand together. */
static int8_t *int8_at(const linear_job *job, int64_t r, int64_t k)
{
    int64_t rows = job->rows.panel > 0 ? job->rows.panel : 1;
    return (int8_t *)job->rounded.q + r / rows * rows * job->rounded.q_stride +
           (k / QLLM_INT8_PAD * rows + r % rows) * QLLM_INT8_PAD + k % QLLM_INT8_PAD;
}

static void interleave_row(const linear_job *job, int64_t r)
{
    int64_t m = job->rows.m, cols = job->rows.cols, f = r / QLLM_X_PANEL * QLLM_X_PANEL;
    int64_t n = m - f < QLLM_X_PANEL ? m - f : QLLM_X_PANEL;
    for (int64_t c = 0; c < cols; c += QLLM_X_COLUMNS) {
        const float *x = job->rows.x + r * job->rows.stride + c;
        float *to = (float *)job->rounded.q + qllm_x_panel(m, cols, f, c) + r - f;
        for (int64_t k = 0; k < QLLM_X_COLUMNS && c + k < cols; k++)
            to[k * n] = x[k];
    }
}

static void round_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const linear_job *job = context;
    const rounded_rows *to = &job->rounded;
    int64_t cols = job->rows.cols;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const float *x = job->rows.x + r * job->rows.stride;
        void *q = (uint8_t *)to->q + r * to->q_stride;
        if (job->form.panels)
            interleave_row(job, r);
        else if (job->form.tier == QLLM_TIER_EXACT)
            job->ops->int8_activation(x, cols, job->threshold, int8_at(job, r, 0),
                                      int8_at(job, r, QLLM_INT8_PAD) - int8_at(job, r, 0),
                                      &to->scale[r], to->outliers + r * cols, &to->n_outliers[r]);
        else if (job->rows.panel > 0)
            round_into_panel(job, r);
        else if (job->form.tier == QLLM_TIER_BF16)
            job->ops->bf16_activation(x, cols, q);
        else {
            int64_t blocks = cols / job->form.block;
            job->ops->block_activation(job->form.tier, x, cols, job->form.block, q,
                                       to->scale + r * blocks, to->block_sums + r * blocks);
        }
    }
}

/* bitsandbytes' form: a column with an outlier in any row is one in every row. */
static void share_outliers(const linear_job *job)
{
    const rounded_rows *int8 = &job->rounded;
    int64_t m = job->rows.m, cols = job->rows.cols;
    memset(int8->used, 0, (size_t)cols);
    for (int64_t r = 0; r < m; r++)
        for (int64_t j = 0; j < int8->n_outliers[r]; j++)
            int8->used[int8->outliers[r * cols + j]] = 1;
    for (int64_t r = 0; r < m; r++) {
        int8->n_outliers[r] = 0;
        for (int64_t k = 0; k < cols; k++)
            if (int8->used[k]) {
                *int8_at(job, r, k) = 0;
                int8->outliers[r * cols + int8->n_outliers[r]++] = (int32_t)k;
            }
    }
}

/* Items [begin, end) of all parts, one part behind the other. */
static void multiply_tiles(void *context, int64_t begin, int64_t end, int thread)
{
    const linear_job *job = context;
    int64_t start = 0;
    (void)thread;
    for (int i = 0; i < job->n_parts; i++) {
        const qllm_linear_part *part = &job->parts[i];
        int64_t stop = start + job->part_units[i], tiles = part->weight->tiles;
        int64_t from = begin > start ? begin : start, to = end < stop ? end : stop;
        int64_t last = (to - start) * job->unit;
        if (from < to)
            job->ops->linear(part->weight, part->bias, &job->rows, (from - start) * job->unit,
                             last < tiles ? last : tiles, part->y, part->y_stride);
        start = stop;
    }
}

static form form_of(const qllm_cpu_ops *ops, const qllm_packed *weight, qllm_compute compute)
{
    form out = {.tier = qllm_cpu_linear_tier(ops, weight, compute),
                .int8_weights = weight->layout == QLLM_LAYOUT_INT8};
    if (out.tier == QLLM_TIER_INT16 || out.tier == QLLM_TIER_INT8)
        out.block = qllm_activation_block(weight->blocksize);
    if (out.tier == QLLM_TIER_BF16X2)
        out.distance = qllm_pair_distance(weight->layout == QLLM_LAYOUT_BLOCKS);
    return out;
}

static bool is_small(const qllm_linear_part *parts, int n_parts, int64_t m)
{
    int64_t all = 0, weights = 0, products = 0;
    for (int i = 0; i < n_parts; i++)
        if (!qllm_checked_mul(parts[i].weight->rows, parts[i].weight->cols, &weights) ||
            !qllm_checked_mul(weights, m, &products) || !qllm_checked_add(all, products, &all))
            return false;
    return all < SMALL_JOB;
}

static void take_form(linear_job *job)
{
    job->rows.q = job->rounded.q;
    job->rows.q_stride = job->rounded.q_stride;
    job->rows.scale = job->rounded.scale;
    job->rows.block_sums = job->rounded.block_sums;
    job->rows.outliers = job->rounded.outliers;
    job->rows.n_outliers = job->rounded.n_outliers;
}

/* Memory for the rounded form, with zeros in the last panel, which may not be full. */
static void open_panels(linear_job *job, void *scratch)
{
    int64_t m = job->rows.m, cols = job->rows.cols, rows = 0, padded = m;
    bool by_panels = job->form.tier != QLLM_TIER_BF16 && !job->form.panels;
    if (by_panels && job->ops->panel_rows != NULL)
        rows = job->ops->panel_rows(job->form.tier, job->form.distance, m);
    if (rows > 0)
        padded = (m + rows - 1) / rows * rows;
    job->rows.panel = rows;
    job->rounded = divide_scratch(scratch, &job->form, cols, m, padded);
    if (padded == m)
        return;
    int64_t first = padded - rows;
    memset((int8_t *)job->rounded.q + first * job->rounded.q_stride, 0,
           (size_t)(rows * job->rounded.q_stride));
    if (job->form.block == 0)
        return;
    int64_t of_row = cols / job->form.block;
    memset(job->rounded.scale + first * of_row, 0, (size_t)(rows * of_row) * sizeof(float));
}

/* Whether a part runs the block kernel of tier exact. */
static bool wants_panels(const linear_job *job)
{
    bool bytes = false;
    if (job->form.tier != QLLM_TIER_EXACT || job->form.int8_weights)
        return false;
    for (int i = 0; i < job->n_parts; i++)
        bytes = bytes || job->parts[i].weight->layout == QLLM_LAYOUT_BYTES;
    return bytes || job->rows.m > QLLM_FEW_ROWS;
}

/* The rounded form of x, made by all threads where there are many rows. */
static void make_form(linear_job *job, qllm_threads *threads, bool small, bool int8_batch,
                      void *scratch)
{
    int64_t m = job->rows.m;
    job->rows.tier = job->form.tier;
    job->form.panels = wants_panels(job);
    if (job->form.tier == QLLM_TIER_EXACT && !job->form.int8_weights && !job->form.panels)
        return;
    open_panels(job, scratch);
    if (small || m <= BLOCK_ROWS)
        round_rows(job, 0, m, 0);
    else
        qllm_threads_run(threads, m, round_rows, job);
    if (job->form.int8_weights && int8_batch && job->threshold > 0.0f)
        share_outliers(job);
    take_form(job);
}

/* The tiles of all parts, when x is in its form. */
static void share_tiles(linear_job *job, qllm_threads *threads, bool small)
{
    int64_t tiles = 0, units = 0;
    for (int i = 0; i < job->n_parts; i++)
        tiles += job->parts[i].weight->tiles;
    if (job->rows.m > BLOCK_ROWS && tiles >= 2 * BLOCK_UNIT * qllm_threads_count(threads))
        job->unit = BLOCK_UNIT;
    for (int i = 0; i < job->n_parts; i++) {
        job->part_units[i] = (job->parts[i].weight->tiles + job->unit - 1) / job->unit;
        units += job->part_units[i];
    }
    if (small)
        multiply_tiles(job, 0, units, 0);
    else
        qllm_threads_run(threads, units, multiply_tiles, job);
}

/* Parts that take x in the same form. */
static void multiply(linear_job *job, qllm_threads *threads, const qllm_linear_options *options,
                     void *scratch)
{
    bool small = is_small(job->parts, job->n_parts, job->rows.m);
    make_form(job, threads, small, options->int8_batch, scratch);
    share_tiles(job, threads, small);
}

static bool same_form(const form *a, const form *b)
{
    return a->tier == b->tier && a->int8_weights == b->int8_weights && a->block == b->block &&
           a->distance == b->distance;
}

void qllm_cpu_linear(qllm_threads *threads, const qllm_cpu_ops *ops, const qllm_linear_part *parts,
                     int n_parts, const float *x, int64_t m, int64_t x_stride,
                     const qllm_linear_options *options, void *scratch)
{
    for (int first = 0, next; m > 0 && first < n_parts; first = next) {
        linear_job job = {.ops = ops, .parts = parts + first, .unit = 1,
                          .form = form_of(ops, parts[first].weight, options->compute),
                          .threshold = options->int8_threshold};
        for (next = first + 1; next < n_parts; next++) {
            form other = form_of(ops, parts[next].weight, options->compute);
            if (!same_form(&other, &job.form))
                break;
        }
        job.n_parts = next - first;
        job.rows = (qllm_rows){.x = x, .m = m, .cols = parts[first].weight->cols,
                               .stride = x_stride};
        multiply(&job, threads, options, scratch);
    }
}

void qllm_cpu_linear_int8(qllm_threads *threads, const qllm_cpu_ops *ops,
                          const qllm_linear_part *part, const qllm_cpu_linear_int8_rows *given,
                          void *scratch)
{
    int64_t m = given->m, cols = part->weight->cols;
    linear_job job = {.ops = ops, .parts = part, .n_parts = 1, .unit = 1,
                      .form = {.tier = QLLM_TIER_EXACT, .int8_weights = true}};
    if (m <= 0)
        return;
    job.rows = (qllm_rows){.x = given->x, .m = m, .cols = cols, .stride = cols,
                           .tier = QLLM_TIER_EXACT};
    open_panels(&job, scratch);
    for (int64_t r = 0; r < m; r++) {
        for (int64_t k = 0; k < cols; k += QLLM_INT8_PAD) {
            int64_t n = cols - k < QLLM_INT8_PAD ? cols - k : QLLM_INT8_PAD;
            memset(int8_at(&job, r, k) + n, 0, (size_t)(QLLM_INT8_PAD - n));
            memcpy(int8_at(&job, r, k), given->q + r * cols + k, (size_t)n);
        }
        job.rounded.scale[r] = given->absmax[r] / 127.0f;
        job.rounded.n_outliers[r] = given->n_outliers;
        for (int64_t i = 0; i < given->n_outliers; i++)
            job.rounded.outliers[r * cols + i] = (int32_t)given->outliers[i];
    }
    take_form(&job);
    share_tiles(&job, threads, is_small(part, 1, m));
}
