/* What happens to the rows x before a linear layer: the norm, then rounding to bf16, or to int8
 * with the outliers set apart as qllm_int8_activation (core/quant.h) does.  The same functions fill
 * a panel in shared memory inside a linear kernel, and one in device memory for many rows. */
#ifndef QLLM_KERNELS_LINEAR_BEFORE_H
#define QLLM_KERNELS_LINEAR_BEFORE_H

#include <math.h>

#include "linear_args.h"

enum { LINEAR_THREADS = 32 * GPU_SLICES };

/* Shared scratch: a value for each row and each warp. */
enum { LINEAR_BLOCK_ROWS = 8, LINEAR_WORK = LINEAR_BLOCK_ROWS * GPU_SLICES };

GPU_DEVICE inline const float *linear_x(const gpu_linear_input &in, int row)
{
    int64_t from = row >= in.rows ? -1 : in.row_of == NULL ? row : in.row_of[row];
    return from < 0 ? NULL : in.x + from * in.stride;
}

/* `value`, element k of a row, after the norm. */
GPU_DEVICE inline float linear_normed(const gpu_linear_input &in, float value, int k,
                                      const linear_row &found)
{
    float scale = gpu_load(in.scale + k);
    if (in.norm == GPU_NORM_RMS)
        return scale * (value * found.inverse);
    value = (value - found.mean) * found.inverse;
    return in.bias == NULL ? value * scale : gpu_fma(value, scale, gpu_load(in.bias + k));
}

/* Elements k .. k + N - 1 of a row x after the norm; zeros behind its end. */
template <int N>
GPU_DEVICE inline void linear_values(const linear_args &a, const float *x, int k,
                                     const linear_row &found, float *v)
{
GPU_UNROLL
    for (int j = 0; j < N; j++) /* not gpu_load: the launch before may have written it */
        v[j] = x != NULL && k + j < a.cols ? x[k + j] : 0.0f;
    if (x == NULL || a.input.norm == GPU_NORM_NONE)
        return;
GPU_UNROLL
    for (int j = 0; j < N; j++)
        if (k + j < a.cols)
            v[j] = linear_normed(a.input, v[j], k + j, found);
}

/* A warp's share, for all lanes, of the sum of x, x^2 or (x - mean)^2 over a row: lane l of warp w
 * adds elements (256 j + 32 w + l) 4 .. + 3 for ascending j, lanes are added in a butterfly. */
enum { LINEAR_SUM, LINEAR_SQUARES };

GPU_DEVICE inline float linear_row_sum(const float *x, int cols, int kind, float mean)
{
    float sum = 0.0f;
    bool whole = x != NULL && cols % 4 == 0 && (uintptr_t)x % 16 == 0;
    for (int first = (int)threadIdx.x * 4; x != NULL && first < cols; first += LINEAR_THREADS * 4) {
        float v[4] = {mean, mean, mean, mean};
        if (whole) {
            float4 loaded = *(const float4 *)(const void *)(x + first);
            v[0] = loaded.x, v[1] = loaded.y, v[2] = loaded.z, v[3] = loaded.w;
        } else {
            for (int i = 0; i < 4 && first + i < cols; i++)
                v[i] = x[first + i];
        }
        for (int i = 0; i < 4; i++) {
            float d = v[i] - mean;
            sum = kind == LINEAR_SUM ? sum + v[i] : gpu_fma(d, d, sum);
        }
    }
    for (int m = 16; m > 0; m /= 2)
        sum += gpu_shfl_xor(GPU_FULL_WARP, sum, m);
    return sum;
}

/* The mean, or the factor of the norm, of `count` rows from `first` on: the shares of all warps,
 * added in ascending order. */
GPU_DEVICE inline void linear_row_sums(const linear_args &a, char *panel, float *work, int first,
                                       int count, int kind)
{
    int warp = threadIdx.x / 32;
    for (int r = 0; r < count; r++) {
        float mean = kind == LINEAR_SQUARES && a.input.norm == GPU_NORM_LAYER
                         ? linear_row_at(panel, first + r)->mean : 0.0f;
        float sum = linear_row_sum(linear_x(a.input, first + r), a.cols, kind, mean);
        if (threadIdx.x % 32 == 0)
            work[r * GPU_SLICES + warp] = sum;
    }
    gpu_sync_block();
    if ((int)threadIdx.x < count) {
        float total = 0.0f, n = (float)a.cols;
        for (int w = 0; w < GPU_SLICES; w++)
            total += work[threadIdx.x * GPU_SLICES + w];
        linear_row *row = linear_row_at(panel, first + (int)threadIdx.x);
        if (kind == LINEAR_SUM)
            row->mean = total / n;
        else
            row->inverse = 1.0f / sqrtf(total / n + a.input.eps);
    }
    gpu_sync_block();
}

GPU_DEVICE inline void linear_statistics(const linear_args &a, char *panel, float *work, int first,
                                         int count)
{
    int kind = a.input.norm == GPU_NORM_LAYER ? LINEAR_SUM : LINEAR_SQUARES;
GPU_NO_UNROLL
    for (; a.input.norm != GPU_NORM_NONE && kind <= LINEAR_SQUARES; kind++)
        linear_row_sums(a, panel, work, first, count, kind);
}

/* Eight values as bf16 at a time. */
GPU_DEVICE inline void linear_round_bf16(const linear_args &a, char *panel, int first, int count)
{
    int pieces = a.across * (GPU_TILE_COLS / 8);
    for (int i = threadIdx.x; i < count * pieces; i += LINEAR_THREADS) {
        int row = first + i / pieces, k = i % pieces * 8;
        const float *x = linear_x(a.input, row);
        linear_row found = *linear_row_at(panel, row);
        float v[8];
        linear_values<8>(a, x, k, found, v);
        uint4 packed = {gpu_pack_bf16(v[0], v[1]), gpu_pack_bf16(v[2], v[3]),
                        gpu_pack_bf16(v[4], v[5]), gpu_pack_bf16(v[6], v[7])};
        *(uint4 *)(void *)(panel + a.panel.values + row * a.panel.stride + k * 2) = packed;
    }
}

GPU_DEVICE inline bool linear_is_outlier(float x, float threshold)
{
    return threshold > 0.0f && !(fabsf(x) < threshold);
}

GPU_DEVICE inline char *linear_masks(const linear_args &a, char *panel, int row)
{
    return panel + a.panel.masks + row * a.panel.mask_stride;
}

/* One span of 256 columns of a row: its bits, and the bits of its largest magnitude that is no
 * outlier (NaN above infinity). */
GPU_DEVICE inline uint32_t linear_mark_span(const linear_args &a, char *panel, int row, int span)
{
    const float *x = linear_x(a.input, row);
    linear_row found = *linear_row_at(panel, row);
    uint32_t *masks = (uint32_t *)(void *)linear_masks(a, panel, row);
    uint32_t largest = 0, words = 0;
    int lane = threadIdx.x % 32;
    for (int i = 0; i < LINEAR_SPAN / 32; i++) {
        int k = span * LINEAR_SPAN + i * 32 + lane;
        float v;
        linear_values<1>(a, x, k, found, &v);
        bool is_outlier = linear_is_outlier(v, a.input.threshold);
        uint32_t outliers = gpu_ballot(GPU_FULL_WARP, is_outlier);
        uint32_t bits = gpu_bits_from_float(v) & 0x7fffffffu;
        largest = !is_outlier && bits > largest ? bits : largest;
        words |= outliers != 0 ? 1u << i : 0u;
        if (lane == 0)
            masks[span * (LINEAR_SPAN / 32) + i] = outliers;
    }
    if (lane == 0)
        ((uint8_t *)(masks + a.panel.spans * (LINEAR_SPAN / 32)))[span] = (uint8_t)words;
    for (int m = 16; m > 0; m /= 2) {
        uint32_t other = gpu_shfl_xor(GPU_FULL_WARP, largest, m);
        largest = other > largest ? other : largest;
    }
    return largest;
}

/* Four values as int8 at a time. */
GPU_DEVICE inline void linear_round_int8(const linear_args &a, char *panel, const float *work,
                                         int first, int count)
{
    int pieces = a.across * (GPU_TILE_COLS / 4);
    for (int i = threadIdx.x; i < count * pieces; i += LINEAR_THREADS) {
        int row = first + i / pieces, k = i % pieces * 4;
        const float *x = linear_x(a.input, row);
        linear_row *found = linear_row_at(panel, row);
        float absmax = work[i / pieces * GPU_SLICES], factor = 127.0f / absmax;
        bool is_finite = absmax - absmax == 0.0f;
        bool usable = is_finite && factor - factor == 0.0f;
        uint32_t packed = 0;
        float v[4];
        linear_values<4>(a, x, k, *found, v);
GPU_UNROLL
        for (int j = 0; j < 4; j++) {
            bool is_apart = !usable || linear_is_outlier(v[j], a.input.threshold);
            int q = is_apart ? 0 : (int)rintf(v[j] * factor);
            packed |= (uint32_t)(q & 255) << 8 * j;
        }
        *(uint32_t *)(void *)(panel + a.panel.values + row * a.panel.stride + k) = packed;
        if (k == 0)
            found->scale = usable      ? absmax / 127.0f
                           : is_finite ? 0.0f
                                       : gpu_float_from_bits(0x7fc00000u);
    }
}

GPU_DEVICE inline void linear_find_outliers(const linear_args &a, char *panel, float *work,
                                            int first, int count)
{
    int warp = threadIdx.x / 32;
    for (int r = 0; r < count; r++) {
        uint32_t largest = 0;
        for (int span = warp; span < a.panel.spans; span += GPU_SLICES) {
            uint32_t bits = linear_mark_span(a, panel, first + r, span);
            largest = bits > largest ? bits : largest;
        }
        if (threadIdx.x % 32 == 0)
            work[r * GPU_SLICES + warp] = gpu_float_from_bits(largest);
    }
    gpu_sync_block();
    uint32_t largest = 0;
    for (int w = 0; (int)threadIdx.x < count && w < GPU_SLICES; w++) {
        uint32_t bits = gpu_bits_from_float(work[threadIdx.x * GPU_SLICES + w]);
        largest = bits > largest ? bits : largest;
    }
    if ((int)threadIdx.x < count)
        work[threadIdx.x * GPU_SLICES] = gpu_float_from_bits(largest);
    gpu_sync_block();
}

/* By a whole block, for at most LINEAR_BLOCK_ROWS rows.  `work` (LINEAR_WORK) in shared memory.
 * The caller synchronizes before the panel is read. */
template <bool INT8>
GPU_DEVICE inline void linear_prepare(const linear_args &a, char *panel, float *work, int first,
                                      int count)
{
    linear_statistics(a, panel, work, first, count);
    if (INT8) {
        linear_find_outliers(a, panel, work, first, count);
        linear_round_int8(a, panel, work, first, count);
    } else
        linear_round_bf16(a, panel, first, count);
}

#endif
