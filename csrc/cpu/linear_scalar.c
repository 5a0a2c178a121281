#include "cpu/lanes_scalar.h"

#include "cpu/kernels.h"
#include "cpu/linear_table.h"

void qllm_linear_scalar(const qllm_packed *weight, const float *bias, const qllm_rows *rows,
                    int64_t tile_begin, int64_t tile_end, float *y, int64_t y_stride)
{
    linear_any(weight, bias, rows, tile_begin, tile_end, y, y_stride);
}

const char *qllm_linear_name_scalar(const qllm_packed *weight, qllm_tier tier, int64_t m)
{
    return linear_any_name(weight, tier, m);
}
