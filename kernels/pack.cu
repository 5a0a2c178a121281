/* Weights on the device: memory for them, and the way between standard bytes and tiles.  Bytes come
 * and go through a buffer of bounded size, a few rows at a time. */
#include "weight_parts.h"

extern "C" {
#include "core/alloc.h"
#include "core/checked.h"
#include "core/codebook.h"
#include "core/linear_ref.h"
}

#include <string.h>

namespace {

enum { THREADS = 256, PIECE = 4 }; /* a thread moves 4 bytes: 8, 4 or 2 values of a row */

/* Rows [first, first + rows) between tiles and standard bytes, which lie at `standard` from row
 * `first` on.  Into tiles, rows and columns behind the end become zeros. */
GPU_KERNEL void move_rows(uint8_t *tiled, uint8_t *standard, int kind, int64_t first, int64_t rows,
                          int64_t cols, bool into_tiles)
{
    int values = kind == GPU_TILE_4BIT ? 8 : kind == GPU_TILE_INT8 ? 4 : 2;
    int64_t across = gpu_tiles_across(cols), pieces = across * (GPU_TILE_COLS / values);
    int64_t padded = gpu_tiles_down(rows) * GPU_TILE_ROWS, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < padded * pieces;
         i += step) {
        int64_t row = i / pieces, col = i % pieces * values, left = row < rows ? cols - col : 0;
        uint8_t *tile = tiled + gpu_tile_offset(kind, across, first + row, col);
        uint8_t *bytes = standard + (row * cols + col) * PIECE / values;
        int n = left >= values ? PIECE : left <= 0 ? 0 : (int)left * PIECE / values;
        for (int j = 0; j < PIECE; j++)
            if (into_tiles)
                tile[j] = j < n ? bytes[j] : 0;
            else if (j < n)
                bytes[j] = tile[j];
    }
}

/* The same for the scales of blocks, of `size` bytes. */
GPU_KERNEL void move_scales(uint8_t *tiled, uint8_t *standard, int size, int64_t first,
                            int64_t rows, int64_t blocks, bool into_tiles)
{
    int64_t padded = gpu_tiles_down(rows) * GPU_TILE_ROWS, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < padded * blocks;
         i += step) {
        int64_t row = i / blocks;
        uint8_t *tile = tiled + gpu_tile_scale(blocks, first + row, i % blocks) * size;
        for (int j = 0; j < size; j++)
            if (into_tiles)
                tile[j] = row < rows ? standard[i * size + j] : 0;
            else if (row < rows)
                standard[i * size + j] = tile[j];
    }
}

int grid_for(int64_t threads)
{
    int64_t blocks = (threads + THREADS - 1) / THREADS;
    return blocks > 65536 ? 65536 : blocks < 1 ? 1 : (int)blocks;
}

/* One array that has tiles: `row_bytes` standard bytes for each row. */
typedef struct array {
    uint8_t *device;
    uint8_t *host;
    int64_t row_bytes;
    int size; /* of a scale; 0: the data */
} array;

qllm_gpu_error move_slab(const gpu_weight *w, const array *a, uint8_t *buffer, int64_t first,
                         int64_t rows, bool into_tiles, gpu_stream stream)
{
    int64_t padded = gpu_tiles_down(rows) * GPU_TILE_ROWS;
    if (a->size == 0)
        return GPU_LAUNCH(move_rows, grid_for(padded * a->row_bytes / PIECE), THREADS, 0, stream,
                          a->device, buffer, gpu_kind_of(w->format), first, rows, w->cols,
                          into_tiles);
    int64_t blocks = a->row_bytes / a->size;
    return GPU_LAUNCH(move_scales, grid_for(padded * blocks), THREADS, 0, stream, a->device, buffer,
                      a->size, first, rows, blocks, into_tiles);
}

/* All rows of an array, a slab of whole rows of tiles at a time. */
qllm_status move_array(gpu_device *device, const gpu_weight *w, const array *a, bool into_tiles,
                       gpu_stream stream, qllm_error *error)
{
    int64_t rows = gpu_slab_rows(w->rows, a->row_bytes);
    void *buffer;
    qllm_status status = gpu_alloc(device, rows * a->row_bytes, &buffer, GPU_SCRATCH,
                                   "a buffer for weights", error);
    qllm_gpu_error code = 0;
    for (int64_t first = 0; status == QLLM_OK && code == 0 && first < w->rows; first += rows) {
        int64_t n = w->rows - first < rows ? w->rows - first : rows;
        int64_t bytes = n * a->row_bytes;
        uint8_t *host = a->host + first * a->row_bytes, *slab = (uint8_t *)buffer;
        if (into_tiles)
            code = gpu_copy_in(slab, host, bytes, stream);
        if (code == 0)
            code = move_slab(w, a, slab, first, n, into_tiles, stream);
        if (code == 0 && !into_tiles)
            code = gpu_copy_out(host, slab, bytes, stream);
    }
    if (status == QLLM_OK && code == 0)
        code = gpu_stream_wait(stream);
    gpu_free(buffer);
    return status != QLLM_OK ? status : gpu_check(code, "moving a weight", error);
}

qllm_status copy(void *device, void *host, int64_t bytes, bool in, gpu_stream stream,
                 qllm_error *error)
{
    if (bytes == 0)
        return QLLM_OK;
    qllm_gpu_error code = in ? gpu_copy_in(device, host, bytes, stream)
                             : gpu_copy_out(host, device, bytes, stream);
    if (code == 0)
        code = gpu_stream_wait(stream);
    return gpu_check(code, "copying a weight", error);
}

qllm_status move_scales_of(gpu_device *device, const gpu_weight *w, void *host, void *scales,
                           int size, bool in, gpu_stream stream, qllm_error *error)
{
    if (!w->tiled) {
        qllm_qweight described = gpu_described(w);
        return copy(scales, host, qllm_qweight_blocks(&described) * size, in, stream, error);
    }
    array a = {(uint8_t *)scales, (uint8_t *)host, w->cols / w->blocksize * size, size};
    return move_array(device, w, &a, in, stream, error);
}

/* The scales of a weight, whichever it has. */
qllm_status move_all_scales(gpu_device *device, const gpu_weight *w, const qllm_qweight *host,
                            bool in, gpu_stream stream, qllm_error *error)
{
    qllm_status status = QLLM_OK;
    if (w->format == QLLM_FORMAT_INT8)
        return copy(w->absmax, host->absmax, w->rows * 4, in, stream, error);
    if (qllm_format_is_nested(w->format)) {
        status = move_scales_of(device, w, host->absmax_codes, w->absmax_codes, 1, in, stream,
                                error);
        if (status == QLLM_OK)
            status = copy(w->nested_absmax, host->nested_absmax,
                          qllm_qweight_nested_blocks(host) * 4, in, stream, error);
    } else if (qllm_format_is_4bit(w->format))
        status = move_scales_of(device, w, host->absmax, w->absmax, 4, in, stream, error);
    return status;
}

qllm_status move_data(gpu_device *device, const gpu_weight *w, const qllm_qweight *host, bool in,
                      gpu_stream stream, qllm_error *error)
{
    if (!w->tiled)
        return copy(w->data, host->data, host->data_bytes, in, stream, error);
    array a = {w->data, host->data, host->data_bytes / host->rows, 0};
    return move_array(device, w, &a, in, stream, error);
}

/* Device memory, counted; `zero` also clears it. */
qllm_status take(gpu_device *device, gpu_weight *w, void **out, int64_t bytes, int memory,
                 gpu_stream stream, qllm_error *error)
{
    qllm_status status = gpu_alloc(device, bytes, out, memory, "a weight", error);
    if (status == QLLM_OK)
        status = gpu_check(gpu_fill(*out, 0, bytes, stream), "clearing a weight", error);
    w->bytes += bytes;
    return status;
}

} // namespace

bool gpu_weight_tiles(qllm_format format, int64_t rows, int64_t cols, int64_t blocksize)
{
    if (rows < 1 || cols < 1 || rows > GPU_TILED_MOST_ROWS || cols > GPU_TILED_MOST_COLS)
        return false;
    if (qllm_format_is_4bit(format))
        return blocksize % GPU_TILE_COLS == 0 && cols % blocksize == 0;
    return format == QLLM_FORMAT_BF16 ||
           (format == QLLM_FORMAT_INT8 && cols <= QLLM_INT8_MAX_COLS);
}

qllm_qweight gpu_described(const gpu_weight *w)
{
    qllm_qweight described;
    qllm_qweight_describe(&described, w->format, w->rows, w->cols, w->blocksize, "", NULL);
    return described;
}

int gpu_kind_of(qllm_format format)
{
    if (qllm_format_is_4bit(format))
        return GPU_TILE_4BIT;
    if (format == QLLM_FORMAT_INT8)
        return GPU_TILE_INT8;
    return GPU_TILE_BF16;
}

int64_t gpu_slab_rows(int64_t rows, int64_t row_bytes)
{
    int64_t fit = GPU_SLAB_BYTES / (row_bytes > 0 ? row_bytes : 1) / GPU_TILE_ROWS * GPU_TILE_ROWS;
    if (fit < GPU_TILE_ROWS)
        fit = GPU_TILE_ROWS;
    return fit < rows ? fit : rows;
}

qllm_status gpu_weight_init(gpu_device *device, gpu_weight *out, const qllm_qweight *described,
                            bool tiled, int memory, gpu_stream stream, qllm_error *error)
{
    const qllm_qweight *d = described;
    memset(out, 0, sizeof *out);
    out->format = d->format;
    out->rows = d->rows, out->cols = d->cols, out->blocksize = d->blocksize;
    out->tiled = tiled && gpu_weight_tiles(d->format, d->rows, d->cols, d->blocksize);
    out->standard_tables = true;
    bool is_4bit = qllm_format_is_4bit(d->format), is_nested = qllm_format_is_nested(d->format);
    int64_t blocks = qllm_qweight_blocks(d), data = d->data_bytes;
    if (out->tiled) {
        data = gpu_tiled_bytes(gpu_kind_of(d->format), d->rows, d->cols);
        int64_t padded = gpu_tiles_down(d->rows) * GPU_TILE_ROWS;
        blocks = is_4bit ? padded * (d->cols / d->blocksize) : padded;
    }
    int64_t nested = (blocks + QLLM_NESTED_BLOCKSIZE - 1) / QLLM_NESTED_BLOCKSIZE;
    qllm_status status = take(device, out, (void **)&out->data, data, memory, stream, error);
    if (status == QLLM_OK && !is_nested && !qllm_format_is_float(d->format))
        status = take(device, out, (void **)&out->absmax, blocks * 4, memory, stream, error);
    if (status == QLLM_OK && is_nested)
        status = take(device, out, (void **)&out->absmax_codes, blocks, memory, stream, error);
    if (status == QLLM_OK && is_nested)
        status = take(device, out, (void **)&out->nested_absmax, nested * 4, memory, stream, error);
    if (status == QLLM_OK && is_4bit)
        status = take(device, out, (void **)&out->tables, (16 + 256) * 4, memory, stream, error);
    if (status != QLLM_OK)
        gpu_weight_clear(out);
    return status;
}

qllm_status gpu_weight_set_scales(gpu_device *device, gpu_weight *weight, const qllm_qweight *host,
                                  gpu_stream stream, qllm_error *error)
{
    float tables[16 + 256];
    memcpy(tables, host->code, sizeof host->code);
    memcpy(tables + 16, host->nested_code, sizeof host->nested_code);
    qllm_qweight standard = gpu_described(weight);
    weight->standard_tables =
        memcmp(standard.code, host->code, sizeof host->code) == 0 &&
        memcmp(standard.nested_code, host->nested_code, sizeof host->nested_code) == 0;
    weight->offset = host->offset;
    qllm_status status = move_all_scales(device, weight, host, true, stream, error);
    if (status == QLLM_OK && weight->tables != NULL)
        status = copy(weight->tables, tables, sizeof tables, true, stream, error);
    return status;
}

qllm_status gpu_weight_set(gpu_device *device, gpu_weight *out, const qllm_qweight *weight,
                           bool tiled, int memory, gpu_stream stream, qllm_error *error)
{
    qllm_status status = gpu_weight_init(device, out, weight, tiled, memory, stream, error);
    if (status == QLLM_OK)
        status = move_data(device, out, weight, true, stream, error);
    if (status == QLLM_OK)
        status = gpu_weight_set_scales(device, out, weight, stream, error);
    if (status != QLLM_OK)
        gpu_weight_clear(out);
    return status;
}

qllm_status gpu_weight_get(gpu_device *device, const gpu_weight *weight, qllm_qweight *out,
                           gpu_stream stream, qllm_error *error)
{
    float tables[16 + 256];
    qllm_status status = qllm_qweight_init(out, weight->format, weight->rows, weight->cols,
                                           weight->blocksize, "a weight", error);
    if (status == QLLM_OK)
        status = move_data(device, weight, out, false, stream, error);
    if (status == QLLM_OK)
        status = move_all_scales(device, weight, out, false, stream, error);
    if (status == QLLM_OK && weight->tables != NULL) {
        status = copy(weight->tables, tables, sizeof tables, false, stream, error);
        memcpy(out->code, tables, sizeof out->code);
        memcpy(out->nested_code, tables + 16, sizeof out->nested_code);
    }
    out->offset = weight->offset;
    if (status != QLLM_OK)
        qllm_qweight_clear(out);
    return status;
}

void gpu_weight_clear(gpu_weight *weight)
{
    gpu_free(weight->data);
    gpu_free(weight->absmax);
    gpu_free(weight->absmax_codes);
    gpu_free(weight->nested_absmax);
    gpu_free(weight->tables);
    gpu_free(weight->bias);
    memset(weight, 0, sizeof *weight);
}
