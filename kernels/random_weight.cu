/* The weights of core/random_weight.h, written where they are to stay. */
#include "weight_parts.h"

extern "C" {
#include "core/random_weight.h"
}

#include <string.h>

namespace {

enum { THREADS = 256 };

struct filling {
    qllm_random_recipe recipe;
    qllm_format format;
    int kind;   /* of tiles; -1: standard bytes */
    int64_t cols;
    int64_t n;  /* bytes of 4-bit data, elements of other formats */
    uint8_t *data;
};

/* Where byte (4-bit) or element i of the standard data lies. */
GPU_DEVICE inline uint8_t *place_of(const filling &f, int64_t i, int size, int values)
{
    if (f.kind < 0)
        return f.data + i * size;
    int64_t first = i * values;
    return f.data + gpu_tile_offset(f.kind, gpu_tiles_across(f.cols), first / f.cols,
                                    first % f.cols);
}

GPU_KERNEL void fill_data(filling f)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < f.n; i += step) {
        float value = qllm_random_value(&f.recipe, i);
        switch (f.format) {
        case QLLM_FORMAT_F32: *(float *)(void *)place_of(f, i, 4, 1) = value; break;
        case QLLM_FORMAT_F16:
            *(uint16_t *)(void *)place_of(f, i, 2, 1) = qllm_float_to_f16(value);
            break;
        case QLLM_FORMAT_BF16:
            *(uint16_t *)(void *)place_of(f, i, 2, 1) = qllm_float_to_bf16(value);
            break;
        case QLLM_FORMAT_INT8: *place_of(f, i, 1, 1) = qllm_random_int8(&f.recipe, i); break;
        default: *place_of(f, i, 1, 2) = qllm_random_byte(&f.recipe, i);
        }
    }
}

/* Scales in standard order; `blocks` of a row when they lie as tiles do, else 0. */
GPU_KERNEL void fill_scales(qllm_random_recipe recipe, int array, float middle, int64_t n,
                            int64_t blocks, float *scales)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        int64_t to = blocks > 0 ? gpu_tile_scale(blocks, i / blocks, i % blocks) : i;
        scales[to] = qllm_random_scale(&recipe, array, middle, i);
    }
}

GPU_KERNEL void fill_codes(qllm_random_recipe recipe, int64_t n, int64_t blocks, uint8_t *codes)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        int64_t to = blocks > 0 ? gpu_tile_scale(blocks, i / blocks, i % blocks) : i;
        codes[to] = (uint8_t)qllm_random_word(recipe.seed, QLLM_RANDOM_CODES, i);
    }
}

int grid_for(int64_t n)
{
    int64_t blocks = (n + THREADS - 1) / THREADS;
    return blocks > 65536 ? 65536 : blocks < 1 ? 1 : (int)blocks;
}

qllm_gpu_error fill_arrays(gpu_weight *w, const qllm_qweight *described,
                           const qllm_random_recipe &recipe, gpu_stream stream)
{
    bool is_4bit = qllm_format_is_4bit(w->format);
    filling f = {recipe, w->format, w->tiled ? gpu_kind_of(w->format) : -1, w->cols,
                 is_4bit ? described->data_bytes : w->rows * w->cols, w->data};
    int64_t blocks = w->tiled && is_4bit ? w->cols / w->blocksize : 0;
    int64_t scales = w->format == QLLM_FORMAT_INT8 ? w->rows : qllm_qweight_blocks(described);
    int64_t nested = qllm_qweight_nested_blocks(described);
    qllm_gpu_error code = GPU_LAUNCH(fill_data, grid_for(f.n), THREADS, 0, stream, f);
    if (code == 0 && w->absmax != NULL)
        code = GPU_LAUNCH(fill_scales, grid_for(scales), THREADS, 0, stream, recipe,
                          (int)QLLM_RANDOM_ABSMAX, recipe.absmax, scales, blocks, w->absmax);
    if (code == 0 && w->absmax_codes != NULL)
        code = GPU_LAUNCH(fill_codes, grid_for(scales), THREADS, 0, stream, recipe, scales, blocks,
                          w->absmax_codes);
    if (code == 0 && w->nested_absmax != NULL)
        code = GPU_LAUNCH(fill_scales, grid_for(nested), THREADS, 0, stream, recipe,
                          (int)QLLM_RANDOM_NESTED, recipe.nested, nested, (int64_t)0,
                          w->nested_absmax);
    return code;
}

} // namespace

qllm_status gpu_weight_random(gpu_device *device, gpu_weight *out, const qllm_qweight *described,
                              uint64_t seed, bool tiled, int memory, gpu_stream stream,
                              qllm_error *error)
{
    const qllm_random_recipe recipe = qllm_random_recipe_of(described->format, described->cols,
                                                            seed);
    float tables[16 + 256];
    memcpy(tables, described->code, sizeof described->code);
    memcpy(tables + 16, described->nested_code, sizeof described->nested_code);
    qllm_status status = gpu_weight_init(device, out, described, tiled, memory, stream, error);
    if (status != QLLM_OK)
        return status;
    out->offset = recipe.offset;
    qllm_gpu_error code = fill_arrays(out, described, recipe, stream);
    if (code == 0 && out->tables != NULL)
        code = gpu_copy_in(out->tables, tables, sizeof tables, stream);
    if (code == 0)
        code = gpu_stream_wait(stream);
    status = gpu_check(code, "making a random weight", error);
    if (status != QLLM_OK)
        gpu_weight_clear(out);
    return status;
}
