/* What draws (sampler.cu) and statistics (logit_stats.cu) share on the host. */
#include "sampler.h"

#include <string.h>

void gpu_sampler_clear(gpu_sampler *sampler)
{
    gpu_free(sampler->memory);
    gpu_free_host(sampler->host);
    *sampler = {sampler->device, sampler->most_bytes, NULL, 0, NULL, 0};
}

qllm_status gpu_sampler_reserve(gpu_sampler *sampler, int64_t bytes, int64_t host_bytes,
                                qllm_error *error)
{
    if (bytes <= sampler->bytes && host_bytes <= sampler->host_bytes)
        return QLLM_OK;
    gpu_sampler_clear(sampler);
    qllm_status status = gpu_alloc(sampler->device, bytes, &sampler->memory, GPU_SCRATCH,
                                   "the sampler", error);
    if (status == QLLM_OK)
        status = gpu_alloc_host(host_bytes, &sampler->host, "the sampler", error);
    if (status != QLLM_OK) {
        gpu_sampler_clear(sampler);
        return status;
    }
    sampler->bytes = bytes;
    sampler->host_bytes = host_bytes;
    return QLLM_OK;
}

qllm_status gpu_sampler_refuse(int64_t row, qllm_status status, qllm_error *error)
{
    char text[QLLM_ERROR_CAPACITY];
    if (error == NULL)
        return status;
    memcpy(text, error->text, sizeof text);
    return qllm_fail(error, status, "row %lld: %s", (long long)row, text);
}
