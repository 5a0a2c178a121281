/* A weight matrix in device memory: in tiles (layout.h) for the tensor cores, or as standard bytes
 * (core/qweight.h) for the exact kernels. */
#ifndef QLLM_KERNELS_WEIGHT_H
#define QLLM_KERNELS_WEIGHT_H

#include <stdint.h>

#include "runtime.h"

extern "C" {
#include "core/qweight.h"
}

/* Every pointer is device memory that the weight owns; arrays a format lacks are NULL. */
typedef struct gpu_weight {
    qllm_format format;
    int64_t rows, cols, blocksize;
    bool tiled;
    uint8_t *data;
    float *absmax;         /* nf4, fp4: of blocks; int8: of rows, padded to 16 when tiled */
    uint8_t *absmax_codes; /* nested forms */
    float *nested_absmax;  /* nested forms, standard order */
    float offset;
    float *tables;         /* 4-bit: code[16]; nested forms: nested_code[256] behind it */
    bool standard_tables;  /* those of core/codebook.h, not others that came with a checkpoint */
    float *bias;           /* (rows) or NULL: set by who owns the layer, freed with the weight */
    int64_t bytes;         /* of all of it but the bias */
} gpu_weight;

/* The absmax of block `block` in the standard order, which has place `at` in the weight's own. */
GPU_DEVICE inline float gpu_block_absmax(const gpu_weight &weight, int64_t block, int64_t at)
{
    if (weight.absmax_codes == NULL)
        return gpu_load(weight.absmax + at);
    const float *nested_code = weight.tables + 16;
    float scaled = gpu_load(nested_code + gpu_load(weight.absmax_codes + at)) *
                   gpu_load(weight.nested_absmax + block / QLLM_NESTED_BLOCKSIZE);
    return scaled + weight.offset;
}

/* What kernels over tiles can count to. */
enum { GPU_TILED_MOST_ROWS = 1 << 30, GPU_TILED_MOST_COLS = 1 << 20 };

/* Whether tiles can hold it, up to those sizes: bf16, int8 of at most QLLM_INT8_MAX_COLS columns, and 4-bit formats
 * whose blocksize is a multiple of 64 and divides the columns. */
bool gpu_weight_tiles(qllm_format format, int64_t rows, int64_t cols, int64_t blocksize);

/* Copies a weight to the device, in tiles when `tiled` and it fits.  `memory` is the class under
 * which the bytes are counted (runtime.h).  *out is overwritten; on failure it is empty. */
qllm_status gpu_weight_set(gpu_device *device, gpu_weight *out, const qllm_qweight *weight,
                           bool tiled, int memory, gpu_stream stream, qllm_error *error);

/* The same from unquantized values at any alignment, such as those of a mapped file: they stream
 * through a bounded buffer and are quantized on the device, with the bits and the errors of
 * qllm_quantize without allow_nonfinite.  `name` is the tensor's, for error sentences. */
qllm_status gpu_weight_load(gpu_device *device, gpu_weight *out, const qllm_tensor *values,
                            qllm_format format, int64_t blocksize, const char *name, bool tiled,
                            int memory, gpu_stream stream, qllm_error *error);

/* The weight of core/random_weight.h with the sizes of `described`; random_weight.cu. */
qllm_status gpu_weight_random(gpu_device *device, gpu_weight *out, const qllm_qweight *described,
                              uint64_t seed, bool tiled, int memory, gpu_stream stream,
                              qllm_error *error);

/* The standard bytes, as they were set; the caller clears. */
qllm_status gpu_weight_get(gpu_device *device, const gpu_weight *weight, qllm_qweight *out,
                           gpu_stream stream, qllm_error *error);

/* Frees the memory and empties the struct; nothing may be using it. */
void gpu_weight_clear(gpu_weight *weight);

#endif
