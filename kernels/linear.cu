/* The front of linear layers of compute="auto": what fits together, and which kernel takes it. */
#include <inttypes.h>

#include "linear_before.h"
#include "linear_launch.h"

extern "C" {
#include "decoder/config.h"
}

namespace {

enum {
    FEW_ROWS = 64,   /* that skinny.cu takes, LINEAR_ROWS at a time; more go to prefill.cu */
    CHUNK_ROWS = 512 /* rows that are prepared at once */
};

/* A block for each row of x. */
template <bool INT8>
GPU_KERNEL void GPU_KERNEL_BOUNDS(LINEAR_THREADS, 2) prepare_rows(const linear_args a)
{
    GPU_SHARED(float, work);
    gpu_let_next_start();
    gpu_wait_for_previous();
    linear_prepare<INT8>(a, (char *)a.input.scratch, work, (int)blockIdx.x, 1);
}

int form_of(qllm_format format)
{
    if (qllm_format_is_nested(format))
        return LINEAR_NESTED;
    if (qllm_format_is_4bit(format))
        return LINEAR_4BIT;
    return format == QLLM_FORMAT_INT8 ? LINEAR_INT8 : LINEAR_BF16;
}

linear_shape shape_of(const gpu_device *device)
{
    linear_shape shape;
    enum { RESERVED = 1024 }; /* of each block: a processor has room for the largest and that */
    shape.processors = device->multiprocessors;
    shape.shared_block = (int)device->shared_bytes;
    shape.shared_half = (int)(device->shared_bytes + RESERVED) / 2 - RESERVED;
    return shape;
}

linear_matrix matrix_of(const gpu_weight *w)
{
    linear_matrix m;
    m.data = (const uint4 *)(const void *)w->data;
    m.absmax = w->absmax;
    m.codes = w->absmax_codes;
    m.nested = w->nested_absmax;
    m.tables = w->tables;
    m.bias = w->bias;
    m.offset = w->offset;
    m.rows = (int)w->rows;
    return m;
}

bool same_kind(const gpu_weight *a, const gpu_weight *b)
{
    return a->format == b->format && a->cols == b->cols && a->blocksize == b->blocksize &&
           a->standard_tables && b->standard_tables;
}

bool heads_fit(const gpu_weight *const *weights, int n, const gpu_heads *h)
{
    int64_t q = (int64_t)h->heads * h->head_dim, kv = (int64_t)h->kv_heads * h->head_dim;
    if (h->head_dim % GPU_TILE_ROWS != 0 || h->half % GPU_TILE_ROWS != 0)
        return false;
    if (n == 1)
        return weights[0]->rows == q + 2 * kv;
    return n == 3 && weights[0]->rows == q && weights[1]->rows == kv && weights[2]->rows == kv;
}

bool has_heads(gpu_after after)
{
    return after == GPU_AFTER_HEADS || after == GPU_AFTER_HEADS_ACT;
}

int units_of(const linear_args *a)
{
    int units = a->head_units;
    if (a->output.after == GPU_AFTER_HEADS)
        return units;
    if (a->output.after == GPU_AFTER_HEADS_ACT)
        return units + (int)(gpu_tiles_down(a->weight[a->head_weights].rows) + 1) / 2;
    if (a->output.after == GPU_AFTER_GATE)
        return (int)gpu_tiles_down(a->weight[0].rows);
    for (int i = 0; i < a->n_weights; i++)
        units += (int)gpu_tiles_down(a->weight[i].rows);
    return units;
}

int log2_of(int64_t power)
{
    int log = 0;
    while (power >> (log + 1) != 0)
        log++;
    return log;
}

linear_args args_of(const gpu_weight *const *weights, int n, const gpu_linear_input *input,
                    const gpu_linear_output *output)
{
    linear_args a = {};
    const gpu_weight *w = weights[0];
    bool is_4bit = qllm_format_is_4bit(w->format);
    for (int i = 0; i < n; i++)
        a.weight[i] = matrix_of(weights[i]);
    a.n_weights = n;
    a.cols = (int)w->cols;
    a.across = (int)gpu_tiles_across(w->cols);
    a.blocks = is_4bit ? (int)(w->cols / w->blocksize) : 0;
    a.shift = is_4bit ? log2_of(w->blocksize / GPU_TILE_COLS) : 0;
    a.input = *input;
    a.output = *output;
    if (has_heads(output->after)) {
        const gpu_heads *h = &output->heads;
        a.head_pairs = gpu_divisor_of((h->head_dim / GPU_TILE_ROWS + 1) / 2);
        a.head_group = gpu_divisor_of(h->heads / h->kv_heads + 2);
        a.head_units = (h->heads + 2 * h->kv_heads) * a.head_pairs.by;
        a.head_weights = output->after == GPU_AFTER_HEADS ? n : n - 1;
    }
    a.units = units_of(&a);
    a.paired = has_heads(output->after) || output->after == GPU_AFTER_GATE;
    return a;
}

/* The arguments for rows [first, first + rows) of the call. */
linear_args part_of(const linear_args &all, int form, int first, int rows)
{
    linear_args a = all;
    gpu_heads *h = &a.output.heads;
    if (a.input.row_of != NULL)
        a.input.row_of += first;
    else
        a.input.x += first * a.input.stride;
    for (int i = 0; i < GPU_LINEAR_WEIGHTS; i++)
        if (a.output.y[i] != NULL)
            a.output.y[i] += first * a.output.stride[i];
    if (has_heads(a.output.after)) {
        h->q += first * h->q_stride;
        h->positions += first;
        h->page_index += (int64_t)first * h->max_pages;
    }
    a.rows = a.input.rows = rows;
    a.panel = linear_panel_of(form == LINEAR_INT8, rows, a.cols);
    return a;
}

/* Rows of a chunk, all of whose panel fits the scratch. */
qllm_gpu_error launch_chunk(int form, linear_args a, const linear_shape &shape, gpu_stream stream)
{
    if (linear_skinny_prepares(form, a, shape))
        return linear_launch_skinny(form, a, shape, true, stream);
    a.panel = linear_panel_of(form == LINEAR_INT8, linear_padded_rows(a.rows), a.cols);
    qllm_gpu_error code = linear_launch_prepare(form, a, stream);
    if (a.rows > FEW_ROWS)
        return code != 0 ? code : linear_launch_prefill(form, a, shape, stream);
    int rows = a.rows;
    for (; code == 0 && a.first < rows; a.first += LINEAR_ROWS) {
        a.rows = rows - a.first < LINEAR_ROWS ? rows - a.first : LINEAR_ROWS;
        code = linear_launch_skinny(form, a, shape, false, stream);
    }
    return code;
}

} // namespace

qllm_gpu_error linear_launch_prepare(int form, const linear_args &args, gpu_stream stream)
{
    enum { SHARED = LINEAR_WORK * sizeof(float) };
    return form == LINEAR_INT8
               ? GPU_LAUNCH_DEPENDENT(prepare_rows<true>, args.panel.rows, LINEAR_THREADS, SHARED,
                                      stream, args)
               : GPU_LAUNCH_DEPENDENT(prepare_rows<false>, args.panel.rows, LINEAR_THREADS, SHARED,
                                      stream, args);
}

bool gpu_linear_fits(const gpu_weight *const *weights, int n, const gpu_linear_output *output)
{
    if (n < 1 || n > GPU_LINEAR_WEIGHTS)
        return false;
    for (int i = 0; i < n; i++)
        if (!weights[i]->tiled || (n > 1 && !same_kind(weights[0], weights[i])))
            return false;
    if (output->after == GPU_AFTER_GATE)
        return n == 2 && weights[0]->rows == weights[1]->rows;
    if (output->after == GPU_AFTER_HEADS_ACT)
        return heads_fit(weights, n - 1, &output->heads);
    return output->after != GPU_AFTER_HEADS || heads_fit(weights, n, &output->heads);
}

int64_t gpu_linear_scratch(int64_t rows, int64_t cols)
{
    int most = linear_padded_rows(rows < CHUNK_ROWS ? (int)rows : CHUNK_ROWS);
    int bf16 = linear_panel_of(false, most, cols).bytes;
    int int8 = linear_panel_of(true, most, cols).bytes;
    return bf16 > int8 ? bf16 : int8;
}

qllm_status gpu_linear(const gpu_device *device, const gpu_weight *const *weights, int n,
                       const gpu_linear_input *input, const gpu_linear_output *output,
                       gpu_stream stream, qllm_error *error)
{
    if (!gpu_linear_fits(weights, n, output))
        return qllm_fail(error, QLLM_INTERNAL, "%d weights were given to one linear kernel that do "
                         "not fit together", n);
    int form = form_of(weights[0]->format);
    linear_args all = args_of(weights, n, input, output);
    linear_shape shape = shape_of(device);
    for (int first = 0; first < input->rows; first += CHUNK_ROWS) {
        int rows = input->rows - first < CHUNK_ROWS ? input->rows - first : CHUNK_ROWS;
        qllm_gpu_error code =
            launch_chunk(form, part_of(all, form, first, rows), shape, stream);
        if (code != 0)
            return gpu_check(code, "a linear layer", error);
    }
    return QLLM_OK;
}

const char *gpu_linear_name(qllm_format format, int64_t rows)
{
#define NAMES(format) {format " " GPU_BACKEND_NAME ", tensor cores, few rows", \
                       format " " GPU_BACKEND_NAME ", tensor cores, many rows"}
    static const char *const names[QLLM_FORMAT_COUNT][2] = {
        NAMES("f32"), NAMES("f16"), NAMES("bf16"), NAMES("nf4"), NAMES("fp4"), NAMES("nf4-dq"),
        NAMES("fp4-dq"), NAMES("int8"),
    };
#undef NAMES
    return names[format][rows > FEW_ROWS];
}
