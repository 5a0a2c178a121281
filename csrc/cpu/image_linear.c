/* Products with an image, and the way of 16-bit values to float32 and back. */
#include <inttypes.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "cpu/image_open.h"

enum {
    PANEL = 512,     /* rows of 16-bit values that are float32 at a time */
    FEW_VALUES = 1 << 15 /* fewer are converted by the calling thread alone */
};

/* Rows of 16-bit values <-> float32. */
typedef struct conversion {
    const qllm_encode_ops *ops;
    qllm_dtype dtype;
    int64_t width; /* values of a row */
    uint8_t *halves;
    float *floats;
} conversion;

static void widen(void *context, int64_t begin, int64_t end, int thread)
{
    const conversion *job = context;
    (void)thread;
    job->ops->to_float(job->halves + 2 * begin * job->width, job->dtype,
                       (end - begin) * job->width, job->floats + begin * job->width);
}

static void narrow(void *context, int64_t begin, int64_t end, int thread)
{
    const conversion *job = context;
    (void)thread;
    job->ops->from_float(job->floats + begin * job->width, job->dtype, (end - begin) * job->width,
                         job->halves + 2 * begin * job->width);
}

static void convert(qllm_threads *threads, conversion *job, int64_t rows,
                    void (*work)(void *context, int64_t begin, int64_t end, int thread))
{
    if (rows * job->width < FEW_VALUES)
        work(job, 0, rows, 0);
    else
        qllm_threads_run(threads, rows, work, job);
}

/* The memory of a product: float32 forms where the arrays are of 16 bits, and the rounded rows. */
typedef struct workspace {
    void *memory;
    float *x, *y, *bias;
    void *scratch;
} workspace;

static bool reserve(int64_t count, int64_t size, int64_t *bytes)
{
    int64_t part;
    return qllm_checked_mul(count, size, &part) &&
           qllm_checked_round_up(part, QLLM_LINE, &part) && qllm_checked_add(*bytes, part, bytes);
}

static qllm_status allocate(const qllm_image_product *product, int64_t panel, workspace *out,
                            qllm_error *error)
{
    bool half = product->dtype != QLLM_F32;
    bool half_bias = product->bias != NULL && product->bias_dtype != QLLM_F32;
    int64_t scratch = qllm_cpu_linear_scratch(product->cols, panel);
    int64_t x = 0, y = 0, bias = 0, all = 0;
    bool fits = reserve(panel, product->cols * 4, &x) && reserve(panel, product->rows * 4, &y) &&
                reserve(product->rows, 4, &bias);
    x = half ? x : 0;
    y = half ? y : 0;
    bias = half_bias ? bias : 0;
    if (!fits || scratch < 0 || !qllm_checked_add(x + y, bias, &all) ||
        !qllm_checked_add(all, scratch, &all))
        return qllm_fail(error, QLLM_MEMORY, "x: the forms of %" PRId64 " rows that a product "
                         "needs are larger than can be addressed; use a smaller batch", panel);
    qllm_status status = qllm_alloc_scratch(&out->memory, all, 1, "the forms of the input", error);
    if (status != QLLM_OK)
        return status;
    uint8_t *base = out->memory;
    out->x = (float *)(void *)base;
    out->y = (float *)(void *)(base + x);
    out->bias = (float *)(void *)(base + x + y);
    out->scratch = base + x + y + bias;
    return QLLM_OK;
}

/* What multiplies n rows in float32; `first` is the first of them. */
typedef void panel_product(const void *context, const qllm_linear_part *part, const float *x,
                           int64_t first, int64_t n, void *scratch);

static qllm_status multiply(const qllm_multiplier *by, const qllm_image *image,
                            const qllm_image_product *product, panel_product *run,
                            const void *context, qllm_error *error)
{
    qllm_packed packed;
    workspace space;
    int64_t cols = product->cols, rows = product->rows, size = qllm_dtype_size(product->dtype);
    bool half = product->dtype != QLLM_F32;
    int64_t panel = half && product->m > PANEL ? PANEL : product->m;
    qllm_status status = qllm_image_open(image, &packed, error);
    if (status == QLLM_OK)
        status = qllm_check_product(packed.rows, packed.cols, cols, rows, error);
    if (status == QLLM_OK)
        status = allocate(product, panel, &space, error);
    if (status != QLLM_OK)
        return status;
    const float *bias = product->bias;
    if (product->bias != NULL && product->bias_dtype != QLLM_F32) {
        by->encode->to_float(product->bias, product->bias_dtype, rows, space.bias);
        bias = space.bias;
    }
    for (int64_t first = 0; first < product->m; first += panel) {
        int64_t n = product->m - first < panel ? product->m - first : panel;
        uint8_t *x = (uint8_t *)product->x, *y = (uint8_t *)product->y + first * rows * size;
        x = x == NULL ? NULL : x + first * cols * size;
        conversion in = {by->encode, product->dtype, cols, x, space.x};
        conversion out = {by->encode, product->dtype, rows, y, space.y};
        if (half && x != NULL)
            convert(by->threads, &in, n, widen);
        qllm_linear_part part = {&packed, bias, half ? space.y : (float *)(void *)y, rows};
        run(context, &part, half ? space.x : (const float *)(const void *)x, first, n,
            space.scratch);
        if (half)
            convert(by->threads, &out, n, narrow);
    }
    qllm_free(space.memory);
    return QLLM_OK;
}

/* x as it is ----------------------------------------------------------------------------------- */

typedef struct plain {
    const qllm_multiplier *by;
    const qllm_linear_options *options;
} plain;

static void multiply_plain(const void *context, const qllm_linear_part *part, const float *x,
                           int64_t first, int64_t n, void *scratch)
{
    const plain *job = context;
    int64_t cols = qllm_packed_cols(part->weight);
    (void)first;
    qllm_cpu_linear(job->by->threads, job->by->ops, part, 1, x, n, cols, job->options, scratch);
}

qllm_status qllm_image_linear(const qllm_multiplier *by, const qllm_image *image,
                              const qllm_image_product *product, qllm_error *error)
{
    plain job = {by, &product->options};
    return multiply(by, image, product, multiply_plain, &job, error);
}

/* x rounded by the caller ---------------------------------------------------------------------- */

typedef struct rounded {
    const qllm_multiplier *by;
    const qllm_rounded_x *x;
} rounded;

static void multiply_rounded(const void *context, const qllm_linear_part *part, const float *x,
                             int64_t first, int64_t n, void *scratch)
{
    const rounded *job = context;
    const qllm_rounded_x *from = job->x;
    int64_t cols = qllm_packed_cols(part->weight);
    qllm_cpu_linear_int8_rows rows = {
        .q = from->q + first * cols, .absmax = from->absmax + first, .outliers = from->outliers,
        .n_outliers = from->n_outliers, .x = x, .m = n,
    };
    qllm_cpu_linear_int8(job->by->threads, job->by->ops, part, &rows, scratch);
}

qllm_status qllm_image_linear_int8(const qllm_multiplier *by, const qllm_image *image,
                                   const qllm_image_product *product, const qllm_rounded_x *from,
                                   qllm_error *error)
{
    qllm_qweight like;
    rounded job = {by, from};
    qllm_status status = qllm_image_describe(image, &like, error);
    if (status != QLLM_OK)
        return status;
    if (like.format != QLLM_FORMAT_INT8)
        return qllm_fail(error, QLLM_VALUE, "the packed weight is %s; int8 was expected",
                         qllm_format_name(like.format));
    for (int64_t i = 0; i < from->n_outliers; i++)
        if (from->outliers[i] < 0 || from->outliers[i] >= like.cols ||
            (i > 0 && from->outliers[i] <= from->outliers[i - 1]))
            return qllm_fail(error, QLLM_VALUE, "outlier columns: number %" PRId64 " is %" PRId64
                             "; ascending columns from 0 to %" PRId64 " were expected", i,
                             from->outliers[i], like.cols - 1);
    return multiply(by, image, product, multiply_rounded, &job, error);
}

qllm_status qllm_image_linear_name(const qllm_cpu_ops *ops, const qllm_image *image, int64_t m,
                                   qllm_compute compute, const char **name, qllm_error *error)
{
    qllm_packed packed;
    qllm_status status = qllm_image_open(image, &packed, error);
    if (status == QLLM_OK)
        *name = ops->linear_name(&packed, qllm_cpu_linear_tier(ops, &packed, compute), m);
    return status;
}
