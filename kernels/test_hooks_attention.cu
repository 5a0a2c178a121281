/* For tests: attention over pages that are given as one array. */
#include "attention.h"
#include "test_hooks.h"

namespace {

/* In the order of the array that tests pass. */
typedef struct attention_sizes {
    int64_t rows, heads, kv_heads, head_dim, window, q_stride, q_group, out_stride, max_pages;
    int64_t pages, page_values, page_offset, bias_stride, form, times;
} attention_sizes;

gpu_attention attention_of(const attention_sizes *s, float scale)
{
    gpu_attention a = {};
    a.rows = (int)s->rows;
    a.heads = (int)s->heads;
    a.kv_heads = (int)s->kv_heads;
    a.head_dim = (int)s->head_dim;
    a.scale = scale;
    a.window = (int)s->window;
    a.q_stride = s->q_stride;
    a.q_group = s->q_group;
    a.out_stride = s->out_stride;
    a.max_pages = (int)s->max_pages;
    a.page_offset = s->page_offset;
    a.bias_stride = s->bias_stride;
    return a;
}

/* The device's table of pages: page i at memory + i * page_values. */
qllm_status make_table(gpu_device *device, const attention_sizes *s, uint16_t *memory, void **out,
                       qllm_error *error)
{
    void *host = NULL;
    qllm_status status = gpu_alloc(device, s->pages * (int64_t)sizeof(void *), out, GPU_SCRATCH,
                                   "a test's table of pages", error);
    if (status == QLLM_OK)
        status = gpu_alloc_host(s->pages * (int64_t)sizeof(void *), &host, "a test's table", error);
    for (int64_t i = 0; status == QLLM_OK && i < s->pages; i++)
        ((void **)host)[i] = memory + i * s->page_values;
    if (status == QLLM_OK)
        status = gpu_copy_in(*out, host, s->pages * (int64_t)sizeof(void *), NULL, error);
    if (status == QLLM_OK)
        status = gpu_stream_wait(NULL, error);
    gpu_free_host(host);
    return status;
}

} // namespace

/* `times` launches after one beginning, as the layers of a step have it. */
GPU_EXPORT qllm_status gpu_test_attention(const float *q, uint16_t *memory,
                                          const int32_t *page_index, const int32_t *positions,
                                          const float *bias, float *out, const int64_t *sizes,
                                          float scale, qllm_error *error)
{
    const attention_sizes *s = (const attention_sizes *)(const void *)sizes;
    gpu_attention a = attention_of(s, scale);
    gpu_device *device;
    void *table = NULL;
    qllm_status status = gpu_test_device(&device, error);
    if (status == QLLM_OK)
        status = make_table(device, s, memory, &table, error);
    if (status == QLLM_OK)
        status = gpu_alloc(device, gpu_attention_scratch(&a), &a.scratch, GPU_SCRATCH,
                           "a test's scratch", error);
    a.q = q;
    a.out = out;
    a.positions = positions;
    a.page_index = page_index;
    a.page_base = (void *const *)table;
    a.bias = bias;
    if (status == QLLM_OK)
        status = gpu_attention_begin(&a, NULL, 0, NULL, error);
    for (int64_t i = 0; status == QLLM_OK && i < s->times; i++)
        status = gpu_attend(device, &a, (gpu_attention_form)s->form, NULL, error);
    if (status == QLLM_OK)
        status = gpu_stream_wait(NULL, error);
    gpu_free(a.scratch);
    gpu_free(table);
    return status;
}

/* The form that is chosen for the rows, as *form. */
GPU_EXPORT qllm_status gpu_test_attention_form(const int64_t *sizes, int64_t sequences,
                                               int64_t *form, qllm_error *error)
{
    gpu_attention a = attention_of((const attention_sizes *)(const void *)sizes, 1.0f);
    (void)error;
    *form = gpu_attention_choose(&a, (int)sequences);
    return QLLM_OK;
}
