/* Between step.cu and step_buffers.cu: the memory of a step. */
#ifndef QLLM_KERNELS_STEP_H
#define QLLM_KERNELS_STEP_H

#include "decoder.h"

enum { GPU_ROW_ARRAYS = 4 };

/* Host and device memory of the same layout: the four arrays of a row each GPU_STEP_ROWS long, then
 * page_index as gpu_rows has it. */
struct gpu_step {
    int64_t bytes; /* of each */
    int32_t *host; /* pinned */
    int32_t *device;
};

/* What the chunks of a batch need at most. */
typedef struct gpu_needs {
    int64_t rows, wanted; /* powers of two */
    int64_t positions;    /* of the longest sequence */
    int64_t max_pages;    /* a power of two */
} gpu_needs;

/* All that a batch needs; logits only where it ends in them. */
qllm_status gpu_step_reserve(qllm_decoder *decoder, const gpu_needs *most, bool logits,
                             qllm_error *error);

#endif
