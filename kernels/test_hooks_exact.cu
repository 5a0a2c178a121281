/* For tests: the kernels of exact.h one by one.  Pointers are device memory. */
#include "exact.h"
#include "test_hooks.h"

/* A weight of these arrays, as gpu_weight has them; `format` is a number of qllm_format. */
GPU_EXPORT qllm_status gpu_test_exact_linear(int64_t format, int64_t rows, int64_t cols,
                                             int64_t blocksize, uint8_t *data, float *absmax,
                                             uint8_t *absmax_codes, float *nested_absmax,
                                             float offset, float *tables, float *bias,
                                             const float *x, int64_t stride, int64_t m,
                                             float threshold, bool batch, float *y,
                                             int64_t y_stride, qllm_error *error)
{
    gpu_weight weight = {};
    weight.format = static_cast<qllm_format>(format);
    weight.rows = rows;
    weight.cols = cols;
    weight.blocksize = blocksize;
    weight.data = data;
    weight.absmax = absmax;
    weight.absmax_codes = absmax_codes;
    weight.nested_absmax = nested_absmax;
    weight.offset = offset;
    weight.tables = tables;
    weight.bias = bias;
    gpu_device *device;
    gpu_exact_rows in = {x, stride, static_cast<int>(m), threshold, batch, NULL};
    qllm_status status = gpu_test_device(&device, error);
    if (status == QLLM_OK)
        status = gpu_alloc(device, gpu_exact_multiply_scratch(m, cols), &in.scratch, GPU_SCRATCH,
                           "the scratch of a test", error);
    if (status == QLLM_OK)
        status = gpu_test_finish(gpu_exact_multiply(&weight, &in, y, y_stride, NULL), error);
    gpu_free(in.scratch);
    return status;
}

GPU_EXPORT qllm_status gpu_test_exact_embed(int64_t format, int64_t rows, int64_t cols,
                                            uint8_t *data, const int32_t *tokens, int64_t n,
                                            float *y, qllm_error *error)
{
    gpu_weight weight = {};
    weight.format = static_cast<qllm_format>(format);
    weight.rows = rows;
    weight.cols = cols;
    weight.data = data;
    return gpu_test_finish(gpu_exact_rows_of(&weight, tokens, static_cast<int>(n), y, NULL), error);
}

/* kind: of qllm_norm_kind */
GPU_EXPORT qllm_status gpu_test_exact_norm(int64_t kind, const float *weight, const float *bias,
                                           int64_t n, float eps, const float *x,
                                           const int32_t *row_of, int64_t rows, float *y,
                                           qllm_error *error)
{
    const gpu_exact_norm norm = {static_cast<qllm_norm_kind>(kind), weight, bias, n, eps};
    return gpu_test_finish(
        gpu_exact_norm_rows(&norm, x, row_of, static_cast<int>(rows), y, NULL), error);
}

/* kind: of qllm_activation */
GPU_EXPORT qllm_status gpu_test_exact_activate(int64_t kind, const float *gate, const float *up,
                                               int64_t n, float *y, qllm_error *error)
{
    return gpu_test_finish(
        gpu_exact_activate(static_cast<qllm_activation>(kind), gate, up, n, y, NULL), error);
}

GPU_EXPORT qllm_status gpu_test_exact_add(const float *a, int64_t n, float *x, qllm_error *error)
{
    return gpu_test_finish(gpu_exact_add(a, n, x, NULL), error);
}

/* Norm, rotation, pages and attention of `rows` rows of qkv; `heads` is host memory. */
GPU_EXPORT qllm_status gpu_test_exact_attention(const gpu_exact_heads *heads, float *qkv,
                                                int64_t rows, int64_t positions_end, float *out,
                                                qllm_error *error)
{
    qllm_gpu_error code = gpu_exact_place(heads, qkv, static_cast<int>(rows), NULL);
    if (code == 0)
        code = gpu_exact_attend(heads, qkv, static_cast<int>(rows),
                                static_cast<int>(positions_end), out, NULL);
    return gpu_test_finish(code, error);
}
