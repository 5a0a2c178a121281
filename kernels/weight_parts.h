/* Between pack.cu and quantize_device.cu, which fill a weight from bytes or from values. */
#ifndef QLLM_KERNELS_WEIGHT_PARTS_H
#define QLLM_KERNELS_WEIGHT_PARTS_H

#include "layout.h"
#include "weight.h"

enum { GPU_SLAB_BYTES = 16 << 20 }; /* of a weight that are on their way at a time */

/* Rows of a slab: all of them, or as many whole rows of tiles as fit, at least one. */
int64_t gpu_slab_rows(int64_t rows, int64_t row_bytes);

/* gpu_tile_kind of a format that has tiles. */
int gpu_kind_of(qllm_format format);

/* Format, sizes and standard tables of a weight, without arrays. */
qllm_qweight gpu_described(const gpu_weight *weight);

/* Memory for a weight of that description, all zero, in tiles when it fits. */
qllm_status gpu_weight_init(gpu_device *device, gpu_weight *out, const qllm_qweight *described,
                            bool tiled, int memory, gpu_stream stream, qllm_error *error);

/* Everything but the data: scales, offset and tables of a weight on the host. */
qllm_status gpu_weight_set_scales(gpu_device *device, gpu_weight *weight, const qllm_qweight *host,
                                  gpu_stream stream, qllm_error *error);

#endif
