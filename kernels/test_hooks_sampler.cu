/* For tests: draws and statistics without a decoder.  Memory comes from test_hooks.cu. */
#include "logit_stats.h"

GPU_EXPORT qllm_status gpu_test_device(gpu_device **out, qllm_error *error); /* test_hooks.cu */

/* gpu_sampler_draw from logits (rows, vocab) on the device, with gpu_sampler.most_bytes. */
GPU_EXPORT qllm_status gpu_test_draw(const float *logits, int64_t first, int64_t rows,
                                     int64_t vocab, const qllm_draw *draws, int64_t n,
                                     int64_t most_bytes, qllm_sampled *out, int64_t *failed,
                                     qllm_error *error)
{
    gpu_sampler sampler = {};
    qllm_status status = gpu_test_device(&sampler.device, error);
    sampler.most_bytes = most_bytes;
    if (status == QLLM_OK)
        status = gpu_sampler_draw(&sampler, NULL, logits, first, rows, vocab, draws, n, out,
                                  failed, error);
    gpu_sampler_clear(&sampler);
    return status;
}

/* gpu_sampler_stats of rows in host memory, the same. */
GPU_EXPORT qllm_status gpu_test_stats(const float *ref, const float *test, int64_t rows,
                                      int64_t vocab, const double *temperatures,
                                      int64_t n_temperatures, const int64_t *targets,
                                      int64_t most_bytes, const qllm_logit_stats *out,
                                      uint8_t *same_top, int64_t *failed, qllm_error *error)
{
    gpu_sampler sampler = {};
    qllm_status status = gpu_test_device(&sampler.device, error);
    sampler.most_bytes = most_bytes;
    if (status == QLLM_OK)
        status = gpu_sampler_stats(&sampler, NULL, ref, test, rows, vocab, temperatures,
                                   n_temperatures, targets, out, same_top, failed, error);
    gpu_sampler_clear(&sampler);
    return status;
}
