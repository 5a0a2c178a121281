/* Linear layers alone.  The kernels of decoders read and write float32: rows and bias of 16 bits
 * are widened before them and rounded after them, CHUNK rows at a time. */
#include "linear_entry.h"

#include <inttypes.h>

#include "driver.h"
#include "exact.h"
#include "skinny.h"
#include "weight_parts.h"

extern "C" {
#include "core/alloc.h"
#include "core/checked.h"
}

struct qllm_device_linear {
    gpu_device device;
    gpu_weight weight;
    float threshold;
};

namespace {

enum { CHUNK = 512, THREADS = 256, ALIGNMENT = 256, MOST_BLOCKS = 1 << 16 };

/* The thread's current device may be another one while this lives; then it is again what it was. */
class visit {
public:
    visit() : known(gpu_driver_current(&before) == 0) {}
    ~visit()
    {
        int now = 0;
        if (known && gpu_driver_current(&now) == 0 && now != before)
            gpu_driver_use(before);
    }
    visit(const visit &) = delete;
    visit &operator=(const visit &) = delete;

private:
    int before = 0;
    bool known;
};

/* ------------------------------------------------------------------------------- the kernels */

/* n values to be rounded from one dtype to another. */
struct conversion {
    const void *from;
    void *to;
    int64_t n;
    qllm_dtype from_dtype, to_dtype;
};

GPU_DEVICE inline void convert_value(const conversion &c, int64_t i)
{
    uint16_t half = c.from_dtype == QLLM_F32 ? 0 : static_cast<const uint16_t *>(c.from)[i];
    float value = c.from_dtype == QLLM_F32   ? static_cast<const float *>(c.from)[i]
                  : c.from_dtype == QLLM_F16 ? qllm_f16_to_float(half)
                                             : qllm_bf16_to_float(half);
    if (c.to_dtype == QLLM_F32)
        static_cast<float *>(c.to)[i] = value;
    else
        static_cast<uint16_t *>(c.to)[i] = c.to_dtype == QLLM_F16 ? qllm_float_to_f16(value)
                                                                  : qllm_float_to_bf16(value);
}

/* Two arrays in one launch. */
GPU_KERNEL void convert(conversion a, conversion b)
{
    int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < a.n + b.n; i += step)
        if (i < a.n)
            convert_value(a, i);
        else
            convert_value(b, i - a.n);
}

/* Value (row, col); blocksize is 1 << shift. */
GPU_DEVICE inline float dequantized(const gpu_weight &w, int kind, int shift, int64_t row,
                                    int64_t col)
{
    int64_t i = row * w.cols + col, block = i >> shift;
    int64_t tile = w.tiled ? gpu_tile_offset(kind, gpu_tiles_across(w.cols), row, col) : 0;
    if (w.format == QLLM_FORMAT_F32)
        return reinterpret_cast<const float *>(w.data)[i];
    if (w.format == QLLM_FORMAT_F16)
        return qllm_f16_to_float(reinterpret_cast<const uint16_t *>(w.data)[i]);
    if (w.format == QLLM_FORMAT_BF16)
        return qllm_bf16_to_float(
            reinterpret_cast<const uint16_t *>(w.data)[w.tiled ? tile / 2 : i]);
    if (w.format == QLLM_FORMAT_INT8)
        return static_cast<float>(static_cast<int8_t>(w.data[w.tiled ? tile : i])) *
               (gpu_load(w.absmax + row) * (1.0f / 127.0f));
    int byte = w.data[w.tiled ? tile : i / 2];
    int64_t scale = w.tiled ? gpu_tile_scale(w.cols >> shift, row, col >> shift) : block;
    return gpu_load(w.tables + (i % 2 == 0 ? byte >> 4 : byte & 15)) *
           gpu_block_absmax(w, block, scale);
}

/* A block for each row from `first` on. */
GPU_KERNEL void dequantize_rows(gpu_weight w, int kind, int shift, int64_t first, float *out)
{
    for (int64_t col = threadIdx.x; col < w.cols; col += blockDim.x)
        out[blockIdx.x * w.cols + col] = dequantized(w, kind, shift, first + blockIdx.x, col);
}

/* ------------------------------------------------------------------------------- the scratch */

/* Its parts, NULL where a call needs none: a chunk of x and y and the bias as float32, and what
 * the kernels of the layer want. */
struct parts {
    float *x, *y, *bias;
    void *kernels;
};

int64_t chunk_of(const qllm_linear_call *call)
{
    return call->m < CHUNK ? call->m : static_cast<int64_t>(CHUNK);
}

int64_t kernel_scratch(const gpu_weight *w, int64_t rows)
{
    if (w->tiled)
        return gpu_linear_scratch(rows, w->cols);
    return w->format == QLLM_FORMAT_INT8 ? gpu_exact_multiply_scratch(rows, w->cols) : 0;
}

/* Divides the memory at call->scratch (`out` NULL: only counts); its bytes, or -1. */
int64_t divide(const gpu_weight *w, const qllm_linear_call *call, parts *out)
{
    bool half = call->dtype != QLLM_F32;
    bool half_bias = call->bias != NULL && call->bias_dtype != QLLM_F32;
    int64_t rows = chunk_of(call), at[5] = {0};
    const int64_t counts[4] = {half ? rows : 0, half ? rows : 0, half_bias ? 1 : 0, 1};
    const int64_t sizes[4] = {w->cols * 4, w->rows * 4, w->rows * 4, kernel_scratch(w, rows)};
    for (int i = 0; i < 4; i++) {
        int64_t bytes;
        if (sizes[i] < 0 || !qllm_checked_mul(counts[i], sizes[i], &bytes) ||
            !qllm_checked_round_up(bytes, ALIGNMENT, &bytes) ||
            !qllm_checked_add(at[i], bytes, &at[i + 1]))
            return -1;
    }
    uint8_t *base = static_cast<uint8_t *>(call->scratch);
    if (out != NULL) {
        out->x = half ? reinterpret_cast<float *>(base) : NULL;
        out->y = half ? reinterpret_cast<float *>(base + at[1]) : NULL;
        out->bias = half_bias ? reinterpret_cast<float *>(base + at[2]) : NULL;
        out->kernels = base + at[3];
    }
    return at[4];
}

/* ------------------------------------------------------------------------------- the product */

qllm_status launch_convert(const conversion &a, const conversion &b, gpu_stream stream,
                           qllm_error *error)
{
    int64_t blocks = (a.n + b.n + THREADS - 1) / THREADS;
    if (blocks == 0)
        return QLLM_OK;
    int grid = static_cast<int>(blocks < MOST_BLOCKS ? blocks : static_cast<int64_t>(MOST_BLOCKS));
    return gpu_check(GPU_LAUNCH(convert, grid, THREADS, 0, stream, a, b),
                     "the conversion of rows", error);
}

qllm_status multiply(const qllm_device_linear *layer, const gpu_weight *w, const float *x, int rows,
                     float *y, void *scratch, gpu_stream stream, qllm_error *error)
{
    if (!w->tiled) {
        const gpu_exact_rows in = {x, w->cols, rows, layer->threshold, false, scratch};
        return gpu_check(gpu_exact_multiply(w, &in, y, w->rows, stream), "a linear layer", error);
    }
    gpu_linear_input input = {};
    gpu_linear_output output = {};
    input.x = x;
    input.stride = w->cols;
    input.rows = rows;
    input.threshold = layer->threshold;
    input.scratch = scratch;
    output.after = GPU_AFTER_STORE;
    output.y[0] = y;
    output.stride[0] = w->rows;
    return gpu_linear(&layer->device, &w, 1, &input, &output, stream, error);
}

/* `rows` rows of the call from `first` on; `bias` widens it on the way. */
qllm_status run_chunk(const qllm_device_linear *layer, const gpu_weight *w,
                      const qllm_linear_call *call, const parts &part, const conversion &bias,
                      int64_t first, int rows, qllm_error *error)
{
    gpu_stream stream = static_cast<gpu_stream>(call->stream);
    int64_t size = qllm_dtype_size(call->dtype);
    const uint8_t *x = static_cast<const uint8_t *>(call->x) + first * w->cols * size;
    uint8_t *y = static_cast<uint8_t *>(call->y) + first * w->rows * size;
    bool half = call->dtype != QLLM_F32;
    const conversion none = {};
    const conversion in = {x, part.x, rows * w->cols, call->dtype, QLLM_F32};
    const conversion out = {part.y, y, rows * w->rows, QLLM_F32, call->dtype};
    qllm_status status = launch_convert(half ? in : none, bias, stream, error);
    if (status == QLLM_OK)
        status = multiply(layer, w, half ? part.x : reinterpret_cast<const float *>(x), rows,
                          half ? part.y : reinterpret_cast<float *>(y), part.kernels, stream,
                          error);
    if (status == QLLM_OK && half)
        status = launch_convert(out, none, stream, error);
    return status;
}

qllm_status run(const qllm_device_linear *layer, const qllm_linear_call *call, qllm_error *error)
{
    gpu_weight w = layer->weight; /* with the bias of the call */
    parts part;
    if (call->m <= 0 || w.rows == 0)
        return QLLM_OK;
    if (divide(&w, call, &part) < 0)
        return qllm_fail(error, QLLM_MEMORY, "x: the forms of %" PRId64 " rows are larger than can "
                         "be addressed; use a smaller batch", call->m);
    visit here;
    qllm_status status = gpu_device_use(&layer->device, error);
    conversion bias = {};
    if (part.bias != NULL)
        bias = {call->bias, part.bias, w.rows, call->bias_dtype, QLLM_F32};
    w.bias = part.bias != NULL ? part.bias
                               : static_cast<float *>(const_cast<void *>(call->bias));
    int64_t chunk = chunk_of(call);
    for (int64_t first = 0; status == QLLM_OK && first < call->m; first += chunk) {
        int64_t left = call->m - first;
        status = run_chunk(layer, &w, call, part, bias, first,
                           static_cast<int>(left < chunk ? left : chunk), error);
        bias.n = 0; /* it is there for the rest */
    }
    return status;
}

/* -------------------------------------------------------------------------------- the layer */

void destroy(qllm_device_linear *layer)
{
    if (layer == NULL)
        return;
    visit here;
    gpu_device_use(&layer->device, NULL);
    gpu_driver_wait();
    gpu_weight_clear(&layer->weight);
    qllm_free(layer);
}

qllm_status create(int index, const qllm_qweight *weight, qllm_compute compute, float threshold,
                   qllm_device_linear **out, qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = gpu_check_compute(compute, error);
    if (status == QLLM_OK)
        status = qllm_alloc(&memory, 1, sizeof(qllm_device_linear), "a linear layer", error);
    if (status != QLLM_OK)
        return status;
    qllm_device_linear *layer = static_cast<qllm_device_linear *>(memory);
    layer->threshold = threshold;
    visit here;
    status = gpu_device_open(index, &layer->device, error);
    if (status == QLLM_OK)
        status = gpu_weight_set(&layer->device, &layer->weight, weight,
                                compute == QLLM_COMPUTE_AUTO, GPU_WEIGHTS, NULL, error);
    if (status != QLLM_OK)
        qllm_free(layer);
    else
        *out = layer;
    return status;
}

int64_t nbytes(const qllm_device_linear *layer)
{
    return layer->weight.bytes;
}

const char *name(const qllm_device_linear *layer, int64_t m)
{
    const gpu_weight *w = &layer->weight;
    return w->tiled ? gpu_linear_name(w->format, m) : gpu_exact_linear_name(w->format);
}

int64_t scratch(const qllm_device_linear *layer, const qllm_linear_call *call)
{
    return call->m <= 0 ? 0 : divide(&layer->weight, call, NULL);
}

qllm_status dequantize(const qllm_device_linear *layer, int64_t first, int64_t n, float *out,
                       void *stream, qllm_error *error)
{
    const gpu_weight *w = &layer->weight;
    int shift = 0;
    if (first < 0 || n < 0 || n > w->rows || first > w->rows - n || n > INT32_MAX)
        return qllm_fail(error, QLLM_VALUE, "%" PRId64 " rows from row %" PRId64 " on were asked "
                         "for, but the weight has %" PRId64, n, first, w->rows);
    if (n == 0 || w->cols == 0)
        return QLLM_OK;
    while (int64_t{1} << shift < w->blocksize)
        shift++;
    visit here;
    qllm_status status = gpu_device_use(&layer->device, error);
    if (status != QLLM_OK)
        return status;
    return gpu_check(GPU_LAUNCH(dequantize_rows, static_cast<int>(n), THREADS, 0,
                                static_cast<gpu_stream>(stream), *w, gpu_kind_of(w->format), shift,
                                first, out), "dequantizing a weight", error);
}

} // namespace

qllm_status gpu_check_compute(qllm_compute compute, qllm_error *error)
{
    if (compute != QLLM_COMPUTE_INT8)
        return QLLM_OK;
    return qllm_fail(error, QLLM_UNSUPPORTED, "compute is 'int8', which device '%s' does not "
                     "offer; use 'auto' or 'exact'", GPU_BACKEND_NAME);
}

void gpu_linear_entries(qllm_backend *table)
{
    table->linear_create = create;
    table->linear_destroy = destroy;
    table->linear_nbytes = nbytes;
    table->linear_name = name;
    table->linear_scratch = scratch;
    table->linear = run;
    table->linear_dequantize = dequantize;
}
