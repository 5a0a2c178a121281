/* Linear layers alone, for tensors that other libraries hold on the device: the linear_* functions
 * of core/backend.h, over the kernels that decoders run. */
#ifndef QLLM_KERNELS_LINEAR_ENTRY_H
#define QLLM_KERNELS_LINEAR_ENTRY_H

#include "runtime.h"

extern "C" {
#include "core/backend.h"
}

/* Fills in those functions. */
void gpu_linear_entries(qllm_backend *table);

/* QLLM_UNSUPPORTED for a compute mode that there are no kernels for. */
qllm_status gpu_check_compute(qllm_compute compute, qllm_error *error);

#endif
