/* Quantization on the device, with the bits of core: quant_4bit.c, quant_int8.c and quant.c say why
 * each operation is what it is.  The second level of the -dq forms is computed by core on the host,
 * from the absmax values of the device. */
#include "weight_parts.h"

extern "C" {
#include "core/alloc.h"
#include "core/codebook.h"
#include "core/quant.h"
}

namespace {

enum { THREADS = 256, WARPS = THREADS / 32 };

const uint32_t infinity_bits = 0x7f800000u;

/* Values of a slab on the device: elements [first, first + n) of the tensor. */
typedef struct slab {
    const uint8_t *values;
    qllm_dtype dtype;
    int64_t first, n;
    unsigned *refused; /* counts what qllm_quantize would refuse */
} slab;

/* Where the quantized values go. */
typedef struct target {
    uint8_t *data;
    bool tiled;
    int kind;
    int64_t cols;
} target;

GPU_DEVICE inline float value_at(const slab &s, int64_t i)
{
    if (s.dtype == QLLM_F32)
        return ((const float *)(const void *)s.values)[i];
    uint16_t bits = ((const uint16_t *)(const void *)s.values)[i];
    return s.dtype == QLLM_F16 ? gpu_half_to_float(bits) : qllm_bf16_to_float(bits);
}

/* Offset in the data of element i of the tensor, `size` bytes each; 4-bit: of its byte. */
GPU_DEVICE inline int64_t offset_of(const target &t, int64_t i, int size)
{
    if (t.tiled)
        return gpu_tile_offset(t.kind, gpu_tiles_across(t.cols), i / t.cols, i % t.cols);
    return size == 0 ? i / 2 : i * size;
}

GPU_DEVICE inline uint32_t largest_of_warp(uint32_t largest)
{
    for (int m = 16; m > 0; m /= 2) {
        uint32_t other = gpu_shfl_xor(GPU_FULL_WARP, largest, m);
        largest = other > largest ? other : largest;
    }
    return largest;
}

GPU_DEVICE inline uint32_t magnitude_bits(float x)
{
    return qllm_bits_from_float(x) & 0x7fffffffu;
}

/* One value at a time, to a float format. */
GPU_KERNEL void convert(slab s, target t, qllm_dtype to, uint32_t limit)
{
    int64_t step = (int64_t)gridDim.x * blockDim.x;
    int size = to == QLLM_F32 ? 4 : 2;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.n; i += step) {
        float x = value_at(s, i);
        if (magnitude_bits(x) >= limit)
            gpu_atomic_add(s.refused, 1u);
        uint8_t *out = t.data + offset_of(t, s.first + i, size);
        if (to == QLLM_F32)
            *(float *)(void *)out = x;
        else
            *(uint16_t *)(void *)out =
                to == QLLM_F16 ? qllm_float_to_f16(x) : qllm_float_to_bf16(x);
    }
}

/* qllm_encoder with its codes in 16 x 4 bits: an array that is indexed would lie in memory. */
typedef struct encoder_4bit {
    float thresholds[15];
    uint64_t codes;
} encoder_4bit;

encoder_4bit encoder_of(qllm_format format)
{
    bool is_fp4 = format == QLLM_FORMAT_FP4 || format == QLLM_FORMAT_FP4_DQ;
    qllm_encoder from = is_fp4 ? qllm_fp4_encoder() : qllm_nf4_encoder();
    encoder_4bit encoder = {{0}, 0};
    for (int i = 0; i < 15; i++)
        encoder.thresholds[i] = from.thresholds[i];
    for (int i = 0; i < 16; i++)
        encoder.codes |= (uint64_t)from.codes[i] << 4 * i;
    return encoder;
}

GPU_DEVICE inline int code_of(const encoder_4bit &encoder, float x)
{
    int below = 0;
GPU_UNROLL
    for (int i = 0; i < 15; i++)
        below += x > encoder.thresholds[i];
    return (int)(encoder.codes >> 4 * below) & 15;
}

/* A warp for each block of `blocksize` values; absmax of the whole tensor, in standard order. */
GPU_KERNEL void encode_4bit(slab s, target t, encoder_4bit encoder, int64_t blocksize,
                            int64_t elements, float *absmax)
{
    int lane = threadIdx.x % 32;
    int64_t blocks = (s.n + blocksize - 1) / blocksize, step = (int64_t)gridDim.x * WARPS;
    for (int64_t b = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; b < blocks; b += step) {
        int64_t first = b * blocksize, n = s.n - first < blocksize ? s.n - first : blocksize;
        uint32_t bits = 0;
        for (int64_t i = lane; i < n; i += 32) {
            uint32_t magnitude = magnitude_bits(value_at(s, first + i));
            bits = magnitude > bits ? magnitude : bits;
        }
        bits = largest_of_warp(bits);
        float largest = qllm_float_from_bits(bits);
        if (lane == 0)
            absmax[(s.first + first) / blocksize] = largest;
        if (bits >= infinity_bits) {
            if (lane == 0)
                gpu_atomic_add(s.refused, 1u);
            continue;
        }
        bool is_tail = s.first + first + blocksize > elements;
        float divisor = largest < 1e-38f ? 1e-38f : largest, reciprocal = 1.0f / divisor;
        for (int64_t i = 2 * lane; i < n; i += 64) {
            float x = value_at(s, first + i), y = i + 1 < n ? value_at(s, first + i + 1) : 0.0f;
            int high = code_of(encoder, is_tail ? x / divisor : x * reciprocal);
            int low = code_of(encoder, is_tail ? y / divisor : y * reciprocal);
            t.data[offset_of(t, s.first + first + i, 0)] = (uint8_t)(high << 4 | low);
        }
    }
}

/* A warp for each row. */
GPU_KERNEL void encode_int8(slab s, target t, float *absmax)
{
    int lane = threadIdx.x % 32;
    int64_t rows = s.n / t.cols, step = (int64_t)gridDim.x * WARPS;
    for (int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; r < rows; r += step) {
        int64_t first = r * t.cols;
        uint32_t bits = 0;
        for (int64_t k = lane; k < t.cols; k += 32) {
            uint32_t magnitude = magnitude_bits(value_at(s, first + k));
            bits = magnitude > bits ? magnitude : bits;
        }
        bits = largest_of_warp(bits);
        if (bits >= infinity_bits && lane == 0)
            gpu_atomic_add(s.refused, 1u);
        float largest = qllm_float_from_bits(bits);
        float half = qllm_f16_to_float(qllm_float_to_f16(largest));
        bool as_half = magnitude_bits(half) < infinity_bits && half != 0.0f;
        float scale = as_half ? half : largest, factor = 1.0f / scale * 127.0f;
        double wide_factor = 127.0 / (double)scale;
        if (lane == 0)
            absmax[s.first / t.cols + r] = scale;
        if (bits >= infinity_bits || scale == 0.0f)
            continue; /* the codes stay 0 */
        for (int64_t k = lane; k < t.cols; k += 32) {
            float x = value_at(s, first + k);
            float q = as_half ? qllm_f16_to_float(qllm_float_to_f16(x)) * factor
                              : (float)((double)x * wide_factor);
            t.data[offset_of(t, s.first + first + k, 1)] = (uint8_t)(int8_t)(int)rintf(q);
        }
    }
}

int grid_for(int64_t units, int64_t each)
{
    int64_t blocks = (units + each - 1) / each;
    return blocks > 65536 ? 65536 : blocks < 1 ? 1 : (int)blocks;
}

/* What a load holds while it runs. */
typedef struct loading {
    gpu_device *device;
    gpu_weight *weight;
    const qllm_tensor *values;
    const char *name;
    void *buffer;        /* device: a slab */
    unsigned *refused;   /* device */
    float *absmax;       /* device, standard order: 4-bit formats (all blocks) */
    gpu_stream stream;
} loading;

qllm_gpu_error quantize_slab(const loading *l, int64_t first, int64_t n)
{
    gpu_weight *w = l->weight;
    slab s = {(const uint8_t *)l->buffer, l->values->dtype, first, n, l->refused};
    target t = {w->data, w->tiled, gpu_kind_of(w->format), w->cols};
    if (qllm_format_is_4bit(w->format))
        return GPU_LAUNCH(encode_4bit, grid_for((n + w->blocksize - 1) / w->blocksize, WARPS),
                          THREADS, 0, l->stream, s, t,
                          encoder_of(w->format), w->blocksize, w->rows * w->cols, l->absmax);
    if (w->format == QLLM_FORMAT_INT8)
        return GPU_LAUNCH(encode_int8, grid_for(n / w->cols, WARPS), THREADS, 0, l->stream, s, t,
                          w->absmax);
    qllm_dtype to = qllm_format_dtype(w->format);
    return GPU_LAUNCH(convert, grid_for(n, THREADS), THREADS, 0, l->stream, s, t, to,
                      qllm_overflow_bits(to));
}

/* Elements of a slab: whole rows, and whole blocks of any size. */
int64_t slab_elements(const qllm_tensor *values, qllm_format format)
{
    int64_t size = qllm_dtype_size(values->dtype), row = values->cols;
    if (format == QLLM_FORMAT_INT8)
        return gpu_slab_rows(values->rows, row * size) * row;
    int64_t all = values->rows * row, fit = GPU_SLAB_BYTES / size;
    return fit < all ? fit : all;
}

qllm_status stream_values(loading *l, qllm_error *error)
{
    int64_t all = l->values->rows * l->values->cols, size = qllm_dtype_size(l->values->dtype);
    int64_t elements = slab_elements(l->values, l->weight->format);
    qllm_status status = gpu_alloc(l->device, elements * size, &l->buffer, GPU_SCRATCH,
                                   "a buffer for weights", error);
    qllm_gpu_error code = 0;
    for (int64_t first = 0; status == QLLM_OK && code == 0 && first < all; first += elements) {
        int64_t n = all - first < elements ? all - first : elements;
        code = gpu_copy_in(l->buffer, (const uint8_t *)l->values->data + first * size,
                           n * size, l->stream);
        if (code == 0)
            code = quantize_slab(l, first, n);
    }
    if (status == QLLM_OK && code == 0)
        code = gpu_stream_wait(l->stream);
    return status != QLLM_OK ? status : gpu_check(code, "quantizing a weight", error);
}

/* The error of core, if there is one: the device only counts. */
qllm_status check_refused(const loading *l, qllm_error *error)
{
    unsigned refused = 0;
    qllm_gpu_error code = gpu_copy_out(&refused, l->refused, sizeof refused, l->stream);
    if (code == 0)
        code = gpu_stream_wait(l->stream);
    if (code != 0)
        return gpu_check(code, "quantizing a weight", error);
    if (refused == 0)
        return QLLM_OK;
    qllm_status status = qllm_quantize_check(l->values, l->weight->format, l->name, error);
    if (status == QLLM_OK)
        status = qllm_fail(error, QLLM_VALUE, "%s: its values changed while they were read; load "
                           "it again", l->name);
    return status;
}

/* Scales of 4-bit formats, by way of the host, which computes the second level. */
qllm_status finish_scales(const loading *l, qllm_error *error)
{
    qllm_qweight host = gpu_described(l->weight);
    int64_t blocks = qllm_qweight_blocks(&host);
    void *absmax = NULL, *codes = NULL, *nested = NULL;
    bool is_nested = qllm_format_is_nested(host.format);
    qllm_status status = qllm_alloc(&absmax, blocks, 4, "the absmax values of a weight", error);
    if (status == QLLM_OK && is_nested)
        status = qllm_alloc(&codes, blocks, 1, "the absmax codes of a weight", error);
    if (status == QLLM_OK && is_nested)
        status = qllm_alloc(&nested, qllm_qweight_nested_blocks(&host), 4,
                            "the nested absmax of a weight", error);
    qllm_gpu_error code = 0;
    if (status == QLLM_OK && blocks > 0)
        code = gpu_copy_out(absmax, l->absmax, blocks * 4, l->stream);
    if (status == QLLM_OK && code == 0)
        code = gpu_stream_wait(l->stream);
    if (status == QLLM_OK)
        status = gpu_check(code, "quantizing a weight", error);
    host.absmax_codes = (uint8_t *)codes;
    host.nested_absmax = (float *)nested;
    if (status == QLLM_OK && is_nested)
        qllm_quantize_nested((const float *)absmax, &host);
    else
        host.absmax = (float *)absmax;
    if (status == QLLM_OK)
        status = gpu_weight_set_scales(l->device, l->weight, &host, l->stream, error);
    qllm_free(absmax);
    qllm_free(codes);
    qllm_free(nested);
    return status;
}

qllm_status run(loading *l, qllm_error *error)
{
    qllm_qweight described = gpu_described(l->weight);
    bool is_4bit = qllm_format_is_4bit(described.format);
    qllm_status status = gpu_alloc(l->device, sizeof *l->refused, (void **)&l->refused, GPU_SCRATCH,
                                   "a counter", error);
    if (status == QLLM_OK)
        status = gpu_check(gpu_fill(l->refused, 0, sizeof *l->refused, l->stream),
                           "quantizing a weight", error);
    if (status == QLLM_OK && is_4bit)
        status = gpu_alloc(l->device, qllm_qweight_blocks(&described) * 4, (void **)&l->absmax,
                           GPU_SCRATCH, "the absmax values of a weight", error);
    if (status == QLLM_OK)
        status = stream_values(l, error);
    if (status == QLLM_OK)
        status = check_refused(l, error);
    if (status == QLLM_OK && is_4bit)
        status = finish_scales(l, error);
    gpu_free(l->buffer);
    gpu_free(l->refused);
    gpu_free(l->absmax);
    return status;
}

} // namespace

qllm_status gpu_weight_load(gpu_device *device, gpu_weight *out, const qllm_tensor *values,
                            qllm_format format, int64_t blocksize, const char *name, bool tiled,
                            int memory, gpu_stream stream, qllm_error *error)
{
    qllm_qweight described;
    *out = gpu_weight();
    qllm_status status = qllm_tensor_check(values, name, error);
    if (status == QLLM_OK)
        status = qllm_qweight_describe(&described, format, values->rows, values->cols, blocksize,
                                       name, error);
    if (status == QLLM_OK)
        status = gpu_weight_init(device, out, &described, tiled, memory, stream, error);
    if (status != QLLM_OK)
        return status;
    loading l = {device, out, values, name, NULL, NULL, NULL, stream};
    status = run(&l, error);
    if (status != QLLM_OK)
        gpu_weight_clear(out);
    return status;
}
