/* Draws of tokens from logits that are on the device, with the bits of core/sampler.h: the same
 * formulas, filters and orders of summation, a block of threads for each draw. */
#ifndef QLLM_KERNELS_SAMPLER_H
#define QLLM_KERNELS_SAMPLER_H

#include "runtime.h"

extern "C" {
#include "core/backend.h"
#include "core/sampler.h"
}

constexpr int64_t GPU_SAMPLER_BYTES = 128 << 20;

/* Memory of draws and statistics: on the device, and of the host for what is copied there and back.
 * At first {device}; it grows on demand and is kept. */
typedef struct gpu_sampler {
    gpu_device *device;
    int64_t most_bytes; /* at once, unless a single row needs more; 0: GPU_SAMPLER_BYTES */
    void *memory;
    int64_t bytes;
    void *host;
    int64_t host_bytes;
} gpu_sampler;

void gpu_sampler_clear(gpu_sampler *sampler);

/* At least so many bytes of each; what was in them is lost. */
qllm_status gpu_sampler_reserve(gpu_sampler *sampler, int64_t bytes, int64_t host_bytes,
                                qllm_error *error);

static inline int64_t gpu_sampler_most(const gpu_sampler *sampler)
{
    return sampler->most_bytes > 0 ? sampler->most_bytes : GPU_SAMPLER_BYTES;
}

/* n draws, each from row draws[i].row - first of logits (rows, vocab), device float32; waits for
 * them.  Errors of a draw as qllm_sample's, of the first that fails, whose index goes to *failed, else
 * -1; `out` is then not to be used. */
qllm_status gpu_sampler_draw(gpu_sampler *sampler, gpu_stream stream, const float *logits,
                             int64_t first, int64_t rows, int64_t vocab, const qllm_draw *draws,
                             int64_t n, qllm_sampled *out, int64_t *failed, qllm_error *error);

/* Puts "row i: " in front of an error. */
qllm_status gpu_sampler_refuse(int64_t row, qllm_status status, qllm_error *error);

#endif
