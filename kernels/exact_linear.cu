/* Linear layers of compute="exact" (core/linear_ref.h).
 *
 * Float-valued weights.  Lane g of a warp forms the sums p_g of its own group of QLLM_GROUP
 * columns, for ROWS rows of W and INPUTS rows of x one after the other, in tiles of 32 groups; then
 * lane (row, input) continues the chain of its output over the 32 groups.
 *
 * int8.  One block for each row of x finds its scale, codes and outlier columns; then lanes share
 * the columns of an exact integer sum, and lane (row, input) adds the outliers by ascending
 * column. */
#include "exact.h"

extern "C" {
#include "core/checked.h"
#include "core/linear_ref.h"
#include "core/quant.h"
}

namespace {

enum {
    WARPS = 4,
    THREADS = WARPS * GPU_WARP,
    TILE = GPU_WARP * QLLM_GROUP, /* columns */
    X_STRIDE = QLLM_GROUP + 4,    /* of a group of x: aligned, and lanes meet in no memory bank */
    P_STRIDE = GPU_WARP + 1,
    INT8_THREADS = 256,
    INT8_WARPS = INT8_THREADS / GPU_WARP,
    INT8_PAD = 64                 /* rows of codes are whole multiples of it */
};

/* How the values of a group are read. */
enum kind {
    KIND_F32,
    KIND_F16,
    KIND_BF16,
    KIND_BLOCKS, /* 4-bit, cols % blocksize == 0: values of the table, the absmax apart */
    KIND_4BIT    /* 4-bit, blocks run across row ends: dequantized values */
};

/* Rows of W that a warp works on, for INPUTS rows of x. */
GPU_BOTH constexpr int rows_for(int inputs)
{
    return inputs == 1 ? 4 : 8;
}

/* ---------------------------------------------------------------------- float-valued weights */

GPU_DEVICE inline float block_absmax(const gpu_weight &weight, int64_t block)
{
    return gpu_block_absmax(weight, block, block);
}

template <kind KIND>
GPU_DEVICE inline float float_value(const uint8_t *data, int64_t i)
{
    if constexpr (KIND == KIND_F32)
        return gpu_load(reinterpret_cast<const float *>(data) + i);
    uint16_t half = gpu_load(reinterpret_cast<const uint16_t *>(data) + i);
    return KIND == KIND_F16 ? gpu_half_to_float(half) : qllm_bf16_to_float(half);
}

/* Elements first .. first + count - 1 of a float format. */
template <kind KIND>
GPU_DEVICE inline void read_floats(const uint8_t *data, int64_t first, int count, float *w)
{
    constexpr int size = KIND == KIND_F32 ? 4 : 2, per = 16 / size;
    const uint8_t *at = data + first * size;
    if (count == QLLM_GROUP && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        GPU_UNROLL
        for (int k = 0; k < QLLM_GROUP; k += per) {
            uint4 line = gpu_load(reinterpret_cast<const uint4 *>(at + k * size));
            const uint32_t words[4] = {line.x, line.y, line.z, line.w};
            GPU_UNROLL
            for (int j = 0; j < per; j++) {
                if constexpr (KIND == KIND_F32) {
                    w[k + j] = qllm_float_from_bits(words[j]);
                } else {
                    uint16_t half = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
                    w[k + j] = KIND == KIND_F16 ? gpu_half_to_float(half)
                                                : qllm_bf16_to_float(half);
                }
            }
        }
        return;
    }
    GPU_UNROLL
    for (int k = 0; k < QLLM_GROUP; k++)
        w[k] = k < count ? float_value<KIND>(data, first + k) : 0.0f;
}

/* A whole group inside one block. */
GPU_DEVICE inline void read_codes(const uint8_t *data, const float *code, int64_t first, float *w)
{
    uint4 line = gpu_load(reinterpret_cast<const uint4 *>(data + first / 2));
    const uint32_t words[4] = {line.x, line.y, line.z, line.w};
    GPU_UNROLL
    for (int k = 0; k < QLLM_GROUP; k++) {
        int shift = k % 8 / 2 * 8 + (k % 2 == 0 ? 4 : 0);
        w[k] = code[(words[k / 8] >> shift) & 15u];
    }
}

/* Elements that may begin in the middle of a byte and lie in two blocks. */
GPU_DEVICE inline void read_dequantized(const gpu_weight &weight, int shift, const float *code,
                                        int64_t first, int count, float *w)
{
    int64_t block = first >> shift;
    float absmax = block_absmax(weight, block);
    float next = block_absmax(weight, (first + count - 1) >> shift);
    GPU_UNROLL
    for (int k = 0; k < QLLM_GROUP; k++) {
        int64_t i = first + k;
        uint8_t byte = k < count ? gpu_load(weight.data + i / 2) : 0;
        w[k] = code[i % 2 == 0 ? byte >> 4 : byte & 15] * (i >> shift == block ? absmax : next);
    }
}

template <int INPUTS>
struct tile {
    float code[16];
    alignas(16) float x[INPUTS][GPU_WARP * X_STRIDE];
    float p[WARPS][rows_for(INPUTS) * INPUTS * P_STRIDE];
    float scale[WARPS][rows_for(INPUTS) * P_STRIDE];
};

/* The columns [first, first + TILE) of the block's rows of x, as far as there are any. */
template <int INPUTS>
GPU_DEVICE inline void load_tile(tile<INPUTS> *shared, const gpu_exact_rows &in, int64_t cols,
                                 int64_t first)
{
    GPU_NO_UNROLL
    for (int i = 0; i < INPUTS; i++) {
        int row = static_cast<int>(blockIdx.y) * INPUTS + i;
        const float *x = in.x + row * in.stride + first;
        for (int k = static_cast<int>(threadIdx.x); k < TILE; k += THREADS)
            if (row < in.rows && first + k < cols)
                shared->x[i][k / QLLM_GROUP * X_STRIDE + k % QLLM_GROUP] = gpu_load(x + k);
    }
}

/* One lane's group of one row of W with every row of x: p and the scale of the group. */
template <kind KIND, int INPUTS>
GPU_DEVICE inline void sum_group(const gpu_weight &weight, int shift, tile<INPUTS> *shared,
                                 int64_t row, int64_t column, int r)
{
    int warp = static_cast<int>(threadIdx.x) / GPU_WARP, lane = threadIdx.x % GPU_WARP;
    int64_t first = row * weight.cols + column, left = weight.cols - column;
    int count = left < QLLM_GROUP ? static_cast<int>(left) : static_cast<int>(QLLM_GROUP);
    float w[QLLM_GROUP], p[INPUTS];
    if constexpr (KIND == KIND_BLOCKS) {
        read_codes(weight.data, shared->code, first, w);
        shared->scale[warp][r * P_STRIDE + lane] = block_absmax(weight, first >> shift);
    } else if constexpr (KIND == KIND_4BIT)
        read_dequantized(weight, shift, shared->code, first, count, w);
    else
        read_floats<KIND>(weight.data, first, count, w);
    GPU_UNROLL
    for (int i = 0; i < INPUTS; i++)
        p[i] = 0.0f;
    GPU_UNROLL
    for (int k = 0; k < QLLM_GROUP; k += 4)
        GPU_UNROLL
        for (int i = 0; i < INPUTS; i++) {
            const float4 x = *reinterpret_cast<const float4 *>(&shared->x[i][lane * X_STRIDE + k]);
            p[i] = k + 0 < count ? gpu_fma(w[k], x.x, p[i]) : p[i];
            p[i] = k + 1 < count ? gpu_fma(w[k + 1], x.y, p[i]) : p[i];
            p[i] = k + 2 < count ? gpu_fma(w[k + 2], x.z, p[i]) : p[i];
            p[i] = k + 3 < count ? gpu_fma(w[k + 3], x.w, p[i]) : p[i];
        }
    GPU_UNROLL
    for (int i = 0; i < INPUTS; i++)
        shared->p[warp][(i * rows_for(INPUTS) + r) * P_STRIDE + lane] = p[i];
}

/* `shift`: blocksize is 1 << shift. */
template <kind KIND, int INPUTS>
GPU_KERNEL void GPU_KERNEL_BOUNDS(THREADS, 2)
multiply(gpu_weight weight, int shift, gpu_exact_rows in, float *y, int64_t y_stride)
{
    constexpr int ROWS = rows_for(INPUTS);
    GPU_SHARED(tile<INPUTS>, shared);
    int warp = static_cast<int>(threadIdx.x) / GPU_WARP, lane = threadIdx.x % GPU_WARP;
    int64_t row = (static_cast<int64_t>(blockIdx.x) * WARPS + warp) * ROWS;
    float sum = 0.0f; /* of row + lane % ROWS and input lane / ROWS */
    if ((KIND == KIND_BLOCKS || KIND == KIND_4BIT) && threadIdx.x < 16)
        shared->code[threadIdx.x] = gpu_load(weight.tables + threadIdx.x);
    for (int64_t first = 0; first < weight.cols; first += TILE) {
        int64_t left = weight.cols - first;
        int groups = left < TILE ? static_cast<int>((left + QLLM_GROUP - 1) / QLLM_GROUP)
                                 : static_cast<int>(GPU_WARP);
        gpu_sync_block();
        load_tile(shared, in, weight.cols, first);
        gpu_sync_block();
        for (int r = 0; r < ROWS && row + r < weight.rows; r++)
            if (lane < groups)
                sum_group<KIND, INPUTS>(weight, shift, shared, row + r, first + lane * QLLM_GROUP,
                                        r);
        gpu_sync_warp();
        if (lane < ROWS * INPUTS && row + lane % ROWS < weight.rows)
            for (int g = 0; g < groups; g++) {
                float scale = KIND == KIND_BLOCKS
                                  ? shared->scale[warp][lane % ROWS * P_STRIDE + g] : 1.0f;
                sum = gpu_fma(scale, shared->p[warp][lane * P_STRIDE + g], sum);
            }
    }
    int64_t output = row + lane % ROWS;
    int input = static_cast<int>(blockIdx.y) * INPUTS + lane / ROWS;
    if (lane < ROWS * INPUTS && output < weight.rows && input < in.rows)
        y[input * y_stride + output] =
            weight.bias != NULL ? sum + gpu_load(weight.bias + output) : sum;
}

/* ----------------------------------------------------------------------------------- int8 */

/* The parts of the scratch memory. */
struct int8_rows {
    int64_t stride;       /* of a row of q: cols, up to a multiple of INT8_PAD */
    int8_t *q;            /* (rows, stride), zeros behind cols */
    float *scale;         /* (rows) */
    int32_t *n_outliers;  /* (rows) */
    int32_t *outliers;    /* (rows, stride), ascending */
    uint8_t *used;        /* (cols) per-batch form: columns that are outliers in any row */
};

/* Advances *at by count * size, rounded up to whole lines; false when that does not fit. */
bool reserve(int64_t count, int64_t size, int64_t *at)
{
    int64_t part;
    return qllm_checked_mul(count, size, &part) && qllm_checked_round_up(part, 256, &part) &&
           qllm_checked_add(*at, part, at);
}

/* Divides the memory at `base` (NULL to count alone); returns its bytes, or -1. */
int64_t divide(uint8_t *base, int64_t rows, int64_t cols, int8_rows *out)
{
    const int64_t sizes[5] = {1, sizeof(float), sizeof(int32_t), sizeof(int32_t), 1};
    int64_t elements, at[6] = {0};
    if (!qllm_checked_round_up(cols, INT8_PAD, &out->stride) ||
        !qllm_checked_mul(rows, out->stride, &elements))
        return -1;
    const int64_t counts[5] = {elements, rows, rows, elements, cols};
    for (int i = 0; i < 5; i++) {
        at[i + 1] = at[i];
        if (!reserve(counts[i], sizes[i], &at[i + 1]))
            return -1;
    }
    if (base != NULL) {
        out->q = reinterpret_cast<int8_t *>(base);
        out->scale = reinterpret_cast<float *>(base + at[1]);
        out->n_outliers = reinterpret_cast<int32_t *>(base + at[2]);
        out->outliers = reinterpret_cast<int32_t *>(base + at[3]);
        out->used = base + at[4];
    }
    return at[5];
}

/* The columns that are an outlier in any row. */
GPU_KERNEL void mark_columns(gpu_exact_rows in, int64_t cols, uint8_t *used)
{
    int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    bool any = false;
    for (int i = 0; k < cols && i < in.rows; i++)
        any = qllm_is_int8_outlier(gpu_load(in.x + i * in.stride + k), in.threshold) || any;
    if (k < cols)
        used[k] = any;
}

struct int8_counts {
    uint32_t largest[INT8_WARPS];
    int32_t outliers[INT8_WARPS];
};

/* Whether column k of a row goes to the float32 part. */
GPU_DEVICE inline bool is_apart(const int8_rows &out, float x, float threshold, int64_t k)
{
    return out.used != NULL ? gpu_load(out.used + k) != 0 : qllm_is_int8_outlier(x, threshold);
}

/* qllm_int8_activation of row blockIdx.x.  A warp has the columns [begin, end); `used` NULL: the
 * form by rows. */
GPU_KERNEL void round_row(gpu_exact_rows in, int64_t cols, int8_rows out)
{
    GPU_SHARED(int8_counts, counts);
    int warp = static_cast<int>(threadIdx.x) / GPU_WARP, lane = threadIdx.x % GPU_WARP;
    int64_t i = blockIdx.x, part = (out.stride / GPU_WARP + INT8_WARPS - 1) / INT8_WARPS * GPU_WARP;
    int64_t begin = warp * part, end = begin + part < out.stride ? begin + part : out.stride;
    const float *x = in.x + i * in.stride;
    uint32_t largest = 0;
    int32_t before = 0;
    for (int64_t k = begin + lane; k < end; k += GPU_WARP) {
        float value = k < cols ? gpu_load(x + k) : 0.0f;
        uint32_t bits = qllm_bits_from_float(value) & 0x7fffffffu;
        if (!qllm_is_int8_outlier(value, in.threshold) && bits > largest)
            largest = bits;
        bool apart = k < cols && is_apart(out, value, in.threshold, k);
        before += gpu_popcount(gpu_ballot(GPU_FULL_WARP, apart));
    }
    for (int m = GPU_WARP / 2; m > 0; m /= 2) {
        uint32_t other = gpu_shfl_xor(GPU_FULL_WARP, largest, m);
        largest = other > largest ? other : largest;
    }
    if (lane == 0) {
        counts->largest[warp] = largest;
        counts->outliers[warp] = before;
    }
    gpu_sync_block();
    int32_t place = 0, all = 0;
    for (int w = 0; w < INT8_WARPS; w++) {
        largest = counts->largest[w] > largest ? counts->largest[w] : largest;
        place += w < warp ? counts->outliers[w] : 0;
        all += counts->outliers[w];
    }
    float factor, scale = qllm_int8_scale(largest, &factor);
    for (int64_t k = begin + lane; k < end; k += GPU_WARP) {
        float value = k < cols ? gpu_load(x + k) : 0.0f;
        bool apart = k < cols && is_apart(out, value, in.threshold, k);
        unsigned mask = gpu_ballot(GPU_FULL_WARP, apart);
        out.q[i * out.stride + k] = apart ? 0 : qllm_int8_code(value, factor);
        if (apart)
            out.outliers[i * out.stride + place + gpu_popcount(mask & ((1u << lane) - 1u))] =
                static_cast<int32_t>(k);
        place += gpu_popcount(mask);
    }
    if (threadIdx.x == 0) {
        out.scale[i] = scale;
        out.n_outliers[i] = all;
    }
}

/* Four bytes of a row of W from column k on, 0 behind its end. */
GPU_DEVICE inline int bytes_at(const uint8_t *data, int64_t k, int64_t cols)
{
    uint32_t word = 0;
    for (int b = 0; b < 4; b++)
        word |= k + b < cols ? static_cast<uint32_t>(gpu_load(data + k + b)) << (8 * b) : 0u;
    return static_cast<int>(word);
}

/* This lane's part of the integer sums of one row of W with INPUTS rows of codes. */
template <int INPUTS>
GPU_DEVICE inline void sum_bytes(const uint8_t *data, int64_t cols, const int8_rows &x, int input,
                                 int rows, int *sum)
{
    int lane = static_cast<int>(threadIdx.x) % GPU_WARP;
    bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols % 16 == 0;
    for (int64_t k = lane * 16; k < cols; k += GPU_WARP * 16) {
        int w[4];
        if (aligned) {
            uint4 line = gpu_load(reinterpret_cast<const uint4 *>(data + k));
            w[0] = static_cast<int>(line.x), w[1] = static_cast<int>(line.y);
            w[2] = static_cast<int>(line.z), w[3] = static_cast<int>(line.w);
        } else
            for (int j = 0; j < 4; j++)
                w[j] = bytes_at(data, k + 4 * j, cols);
        GPU_UNROLL
        for (int i = 0; i < INPUTS; i++) {
            if (input + i >= rows)
                continue;
            const int4 q = gpu_load(
                reinterpret_cast<const int4 *>(x.q + (input + i) * x.stride + k));
            sum[i] = gpu_dot4(w[0], q.x, sum[i]);
            sum[i] = gpu_dot4(w[1], q.y, sum[i]);
            sum[i] = gpu_dot4(w[2], q.z, sum[i]);
            sum[i] = gpu_dot4(w[3], q.w, sum[i]);
        }
    }
}

/* The float32 part of one output, from its integer sum on. */
GPU_DEVICE inline float add_outliers(const gpu_weight &weight, const gpu_exact_rows &in,
                                     const int8_rows &x, int64_t row, int input, int sum)
{
    const int8_t *data = reinterpret_cast<const int8_t *>(weight.data) + row * weight.cols;
    float scale = gpu_load(weight.absmax + row) * (1.0f / 127.0f);
    float result = static_cast<float>(sum) * (gpu_load(x.scale + input) * scale);
    for (int32_t j = 0; j < gpu_load(x.n_outliers + input); j++) {
        int32_t k = gpu_load(x.outliers + input * x.stride + j);
        result = gpu_fma(gpu_load(in.x + input * in.stride + k),
                         static_cast<float>(gpu_load(data + k)) * scale, result);
    }
    return weight.bias != NULL ? result + gpu_load(weight.bias + row) : result;
}

template <int INPUTS>
struct partial_sums {
    int of[WARPS][rows_for(INPUTS) * INPUTS * P_STRIDE];
};

template <int INPUTS>
GPU_KERNEL void GPU_KERNEL_BOUNDS(THREADS, 2)
multiply_int8(gpu_weight weight, gpu_exact_rows in, int8_rows x, float *y, int64_t y_stride)
{
    constexpr int ROWS = rows_for(INPUTS);
    GPU_SHARED(partial_sums<INPUTS>, partial);
    int warp = static_cast<int>(threadIdx.x) / GPU_WARP, lane = threadIdx.x % GPU_WARP;
    int64_t row = (static_cast<int64_t>(blockIdx.x) * WARPS + warp) * ROWS;
    int input = static_cast<int>(blockIdx.y) * INPUTS;
    for (int r = 0; r < ROWS && row + r < weight.rows; r++) {
        int sum[INPUTS] = {0};
        sum_bytes<INPUTS>(weight.data + (row + r) * weight.cols, weight.cols, x, input, in.rows,
                          sum);
        GPU_UNROLL
        for (int i = 0; i < INPUTS; i++)
            partial->of[warp][(i * ROWS + r) * P_STRIDE + lane] = sum[i];
    }
    gpu_sync_warp();
    row += lane % ROWS;
    input += lane / ROWS;
    if (lane >= ROWS * INPUTS || row >= weight.rows || input >= in.rows)
        return;
    int sum = 0;
    for (int i = 0; i < GPU_WARP; i++)
        sum += partial->of[warp][lane * P_STRIDE + i];
    y[input * y_stride + row] = add_outliers(weight, in, x, row, input, sum);
}

/* ------------------------------------------------------------------------------ launching */

dim3 grid_for(const gpu_weight *weight, int rows, int inputs)
{
    int64_t per_block = WARPS * rows_for(inputs);
    return dim3(static_cast<unsigned>((weight->rows + per_block - 1) / per_block),
                static_cast<unsigned>((rows + inputs - 1) / inputs));
}

template <kind KIND, int INPUTS>
qllm_gpu_error launch(const gpu_weight *weight, int shift, const gpu_exact_rows *x, float *y,
                      int64_t y_stride, gpu_stream stream)
{
    return GPU_LAUNCH((multiply<KIND, INPUTS>), grid_for(weight, x->rows, INPUTS), THREADS,
                      sizeof(tile<INPUTS>), stream, *weight, shift, *x, y, y_stride);
}

template <kind KIND>
qllm_gpu_error launch(const gpu_weight *weight, const gpu_exact_rows *x, float *y,
                      int64_t y_stride, gpu_stream stream)
{
    int shift = 0;
    while (int64_t{1} << shift < weight->blocksize)
        shift++;
    if constexpr (KIND != KIND_4BIT) /* which is rare */
        if (x->rows == 1)
            return launch<KIND, 1>(weight, shift, x, y, y_stride, stream);
    return launch<KIND, 4>(weight, shift, x, y, y_stride, stream);
}

template <int INPUTS>
qllm_gpu_error launch_int8(const gpu_weight *weight, const gpu_exact_rows *x,
                           const int8_rows &rounded, float *y, int64_t y_stride, gpu_stream stream)
{
    return GPU_LAUNCH(multiply_int8<INPUTS>, grid_for(weight, x->rows, INPUTS), THREADS,
                      sizeof(partial_sums<INPUTS>), stream, *weight, *x, rounded, y, y_stride);
}

qllm_gpu_error launch_int8(const gpu_weight *weight, const gpu_exact_rows *x, float *y,
                           int64_t y_stride, gpu_stream stream)
{
    int8_rows rounded;
    qllm_gpu_error code = 0;
    divide(static_cast<uint8_t *>(x->scratch), x->rows, weight->cols, &rounded);
    if (x->batch && x->threshold > 0.0f)
        code = GPU_LAUNCH(mark_columns, static_cast<int>((weight->cols + 127) / 128), 128, 0,
                          stream, *x, weight->cols, rounded.used);
    else
        rounded.used = NULL;
    if (code == 0)
        code = GPU_LAUNCH(round_row, x->rows, INT8_THREADS, sizeof(int8_counts), stream, *x,
                          weight->cols, rounded);
    if (code != 0)
        return code;
    return x->rows == 1 ? launch_int8<1>(weight, x, rounded, y, y_stride, stream)
                        : launch_int8<4>(weight, x, rounded, y, y_stride, stream);
}

} // namespace

int64_t gpu_exact_multiply_scratch(int64_t rows, int64_t cols)
{
    int8_rows parts;
    return divide(NULL, rows, cols, &parts);
}

qllm_gpu_error gpu_exact_multiply(const gpu_weight *weight, const gpu_exact_rows *x, float *y,
                                  int64_t y_stride, gpu_stream stream)
{
    if (x->rows == 0 || weight->rows == 0)
        return 0;
    switch (weight->format) {
    case QLLM_FORMAT_F32: return launch<KIND_F32>(weight, x, y, y_stride, stream);
    case QLLM_FORMAT_F16: return launch<KIND_F16>(weight, x, y, y_stride, stream);
    case QLLM_FORMAT_BF16: return launch<KIND_BF16>(weight, x, y, y_stride, stream);
    case QLLM_FORMAT_INT8: return launch_int8(weight, x, y, y_stride, stream);
    default:
        return weight->cols % weight->blocksize == 0
                   ? launch<KIND_BLOCKS>(weight, x, y, y_stride, stream)
                   : launch<KIND_4BIT>(weight, x, y, y_stride, stream);
    }
}

qllm_status gpu_exact_linear(const qllm_decoder *decoder, const gpu_weight *weight, const float *x,
                             int64_t x_stride, int rows, float *y, int64_t y_stride,
                             qllm_error *error)
{
    const gpu_exact_rows in = {x, x_stride, rows, decoder->int8_threshold, decoder->int8_batch,
                               decoder->scratch.extra};
    return gpu_check(gpu_exact_multiply(weight, &in, y, y_stride, decoder->stream),
                     "a linear layer", error);
}

int64_t gpu_exact_linear_scratch(const qllm_decoder *decoder, int64_t rows)
{
    int64_t most = 0;
    for (int64_t i = 0; i < decoder->slots; i++) {
        const gpu_weight *weight = &decoder->linears[i];
        if (weight->data == NULL || weight->tiled || weight->format != QLLM_FORMAT_INT8)
            continue;
        int64_t bytes = gpu_exact_multiply_scratch(rows, weight->cols);
        if (bytes < 0)
            return -1;
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* As linear_name of the CPU, with the device in the place of the instruction set. */
const char *gpu_exact_linear_name(qllm_format format)
{
    static const char *const names[QLLM_FORMAT_COUNT] = {
        "f32 " GPU_BACKEND_NAME ", exact",    "f16 " GPU_BACKEND_NAME ", exact",
        "bf16 " GPU_BACKEND_NAME ", exact",   "nf4 " GPU_BACKEND_NAME ", exact",
        "fp4 " GPU_BACKEND_NAME ", exact",    "nf4-dq " GPU_BACKEND_NAME ", exact",
        "fp4-dq " GPU_BACKEND_NAME ", exact", "int8 " GPU_BACKEND_NAME ", exact",
    };
    return names[format];
}
