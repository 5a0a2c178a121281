/* What happens to the sums of a linear layer: the slices are added in ascending order, then comes
 * the bias and what gpu_after says. */
#ifndef QLLM_KERNELS_LINEAR_AFTER_H
#define QLLM_KERNELS_LINEAR_AFTER_H

#include "linear_before.h"
#include "pages.h"

extern "C" {
#include "core/elementary.h"
#include "decoder/config.h"
}

/* An output of a block: slot of its tiles, row of the tile, row of x. */
typedef struct linear_place {
    int row, token;
} linear_place;

/* The fragments of the sums: element (c, lane) of the accumulators of a tile and 8 tokens. */
GPU_DEVICE inline linear_place linear_place_of(int c, int lane)
{
    linear_place p = {lane / 4 + c / 2 * 8, lane % 4 * 2 + c % 2};
    return p;
}

GPU_DEVICE inline int linear_lowest_bit(uint32_t bits)
{
    return gpu_popcount(~bits & (bits - 1));
}

/* Adds to y the outliers of a row of x, ascending: core/linear_ref.h. */
GPU_DEVICE inline float linear_add_outliers(const linear_args &a, char *panel,
                                            const linear_matrix &weight, int row, int token,
                                            float scale, float y)
{
    const uint32_t *masks = (const uint32_t *)(const void *)linear_masks(a, panel, token);
    const uint8_t *words = (const uint8_t *)(masks + a.panel.spans * (LINEAR_SPAN / 32));
    const int8_t *data = (const int8_t *)weight.data;
    const float *x = linear_x(a.input, token);
    linear_row found = *linear_row_at(panel, token);
    for (int span = 0; span < a.panel.spans; span++) {
        for (uint32_t word = words[span]; word != 0; word &= word - 1) {
            int first = span * (LINEAR_SPAN / 32) + linear_lowest_bit(word);
            for (uint32_t bits = masks[first]; bits != 0; bits &= bits - 1) {
                int k = first * 32 + linear_lowest_bit(bits);
                float code = (float)data[gpu_tile_offset(GPU_TILE_INT8, a.across, row, k)];
                float value;
                linear_values<1>(a, x, k, found, &value);
                y = gpu_fma(value, code * scale, y);
            }
        }
    }
    return y;
}

/* The output (row, token) of a weight from the sum of all slices, with outliers and bias. */
template <int FORM>
GPU_DEVICE inline float linear_output(const linear_args &a, char *panel,
                                      const linear_matrix &weight, int row, int token, float sum,
                                      int32_t integer_sum)
{
    float y = sum;
    if (FORM == LINEAR_INT8) {
        float scale = weight.absmax[row] * (1.0f / 127.0f);
        y = (float)integer_sum * (linear_row_at(panel, token)->scale * scale);
        if (a.input.threshold > 0.0f)
            y = linear_add_outliers(a, panel, weight, row, token, scale, y);
    }
    return weight.bias == NULL ? y : y + weight.bias[row];
}

GPU_DEVICE inline float linear_act(int activation, float x)
{
    switch (activation) {
    case QLLM_ACT_SILU: return qllm_siluf(x);
    case QLLM_ACT_GELU: return qllm_geluf(x);
    default: return qllm_gelu_tanhf(x);
    }
}

/* Elements at[0] + i and at[1] + i of a head, already rotated. */
GPU_DEVICE inline void linear_store_head(const linear_args &a, const linear_unit &unit, int i,
                                         int token, float first, float second)
{
    const gpu_heads &h = a.output.heads;
    int64_t d = h.head_dim;
    bool both = unit.tile[1] >= 0;
    if (unit.kind == LINEAR_QUERY) {
        float *q = h.q + token * h.q_stride + unit.head * d + i;
        q[unit.at[0]] = first;
        if (both)
            q[unit.at[1]] = second;
        return;
    }
    int position = h.positions[token];
    int32_t page = h.page_index[(int64_t)token * h.max_pages + position / GPU_PAGE];
    if (page < 0)
        return;
    int64_t at = h.page_offset + unit.head * 2 * GPU_PAGE * d + position % GPU_PAGE * d +
                 (unit.kind == LINEAR_VALUE ? GPU_PAGE * d : 0) + i;
    uint16_t *stored = (uint16_t *)h.page_base[page] + at;
    stored[unit.at[0]] = gpu_float_to_bf16(first);
    if (both)
        stored[unit.at[1]] = gpu_float_to_bf16(second);
}

/* A query, key or value: elements i of the two tiles of a unit, before rotation. */
GPU_DEVICE inline void linear_turn_head(const linear_args &a, const linear_unit &unit, int i,
                                        int token, float first, float second)
{
    const gpu_heads &h = a.output.heads;
    if (unit.kind != LINEAR_VALUE && unit.at[0] < h.half) {
        int64_t angle = (int64_t)h.positions[token] * h.half + unit.at[0] + i;
        float cos = gpu_load(h.cos + angle), sin = gpu_load(h.sin + angle), old = first;
        first = gpu_fma(old, cos, -(second * sin));
        second = gpu_fma(second, cos, old * sin);
    }
    linear_store_head(a, unit, i, token, first, second);
}

/* Whether what a unit's tile h gives goes through the activation; and whether each of its tiles has
 * an output of its own. */
GPU_DEVICE inline bool linear_is_activated(const linear_args &a, const linear_unit &unit, int h)
{
    gpu_after after = a.output.after;
    return after == GPU_AFTER_ACT || (after == GPU_AFTER_GATE && h == 0) ||
           (after == GPU_AFTER_HEADS_ACT && unit.kind == LINEAR_OTHER);
}

GPU_DEVICE inline bool linear_is_apart(const linear_args &a, const linear_unit &unit)
{
    return unit.kind == LINEAR_OTHER && a.output.after != GPU_AFTER_GATE;
}

/* Output (row, token) of a weight. */
GPU_DEVICE inline void linear_store(const linear_args &a, int weight, int row, int token, float v)
{
    const gpu_linear_output &out = a.output;
    float *y = out.y[weight] + token * out.stride[weight] + row;
    *y = out.after == GPU_AFTER_ADD ? *y + v : v;
}

/* What row i of a unit's two tiles gives together; without a second one, `second` is no number that
 * is used. */
GPU_DEVICE inline void linear_store_pair(const linear_args &a, const linear_unit &unit, int i,
                                         int token, float first, float second)
{
    if (a.output.after == GPU_AFTER_GATE)
        linear_store(a, 0, unit.tile[0] * GPU_TILE_ROWS + i, token, first * second);
    else
        linear_turn_head(a, unit, i, token, first, second);
}

#endif
