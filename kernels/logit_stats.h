/* The statistics of core/logit_stats.h on the device, with its bits: two rows are sorted by one
 * block, then each temperature is summed by half a warp. */
#ifndef QLLM_KERNELS_LOGIT_STATS_H
#define QLLM_KERNELS_LOGIT_STATS_H

#include "sampler.h"

extern "C" {
#include "core/logit_stats.h"
}

/* ref, test (rows, vocab) float32 on the host; targets (rows) or NULL; out: each pointer (rows,
 * n_temperatures); same_top (rows).  Waits.  Errors of a row as qllm_logit_stats_row's, of the
 * first that fails, whose index goes to *failed, else -1; the results are then not to be used. */
qllm_status gpu_sampler_stats(gpu_sampler *sampler, gpu_stream stream, const float *ref,
                              const float *test, int64_t rows, int64_t vocab,
                              const double *temperatures, int64_t n_temperatures,
                              const int64_t *targets, const qllm_logit_stats *out,
                              uint8_t *same_top, int64_t *failed, qllm_error *error);

#endif
