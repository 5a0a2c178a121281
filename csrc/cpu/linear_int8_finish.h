/* The last step of a product with int8 weights.  Included by the kernels after a lanes_<set>.h. */
#ifndef QLLM_CPU_LINEAR_INT8_FINISH_H
#define QLLM_CPU_LINEAR_INT8_FINISH_H

#include "cpu/cpu_ops.h"
#include "cpu/packed_layout.h"

/* From the exact sum to the output: scales, outlier columns in float32, bias. */
static void finish_int8(const qllm_packed *packed, const float *bias, const qllm_rows *in,
                        int64_t tile, int64_t row, ilanes sum, float *y, int64_t y_stride)
{
    int64_t o = tile * QLLM_TILE_ROWS, left = packed->rows - o;
    int64_t n = left < QLLM_TILE_ROWS ? left : QLLM_TILE_ROWS;
    const uint8_t *base = qllm_packed_tile(packed, tile);
    const float *x = in->x + row * in->stride;
    lanes scale = lanes_mul(lanes_load(packed->row_absmax + o), lanes_set1(1.0f / 127.0f));
    lanes value = lanes_mul(lanes_from_int(sum), lanes_mul(lanes_set1(in->scale[row]), scale));
    for (int64_t j = 0; j < in->n_outliers[row]; j++) {
        int64_t k = in->outliers[row * in->cols + j];
        lanes w = lanes_int8_column(ilanes_load(base + k / 4 * QLLM_LINE), (int)(k % 4));
        value = lanes_fma(lanes_set1(x[k]), lanes_mul(w, scale), value);
    }
    if (bias != NULL)
        value = lanes_add(value, lanes_load_n(bias + o, n));
    lanes_store_n(y + row * y_stride + o, value, n);
}

#endif
