/* Between the front of linear layers (linear.cu) and their kernels. */
#ifndef QLLM_KERNELS_LINEAR_LAUNCH_H
#define QLLM_KERNELS_LINEAR_LAUNCH_H

#include "linear_args.h"

/* What the shape of a launch depends on, and nothing in its results. */
typedef struct linear_shape {
    int processors;
    int shared_block; /* bytes of shared memory that a block can have */
    int shared_half;  /* ... when two share a processor */
} linear_shape;

/* Blocks that run at once when each has `shared` bytes. */
static inline int linear_blocks(const linear_shape &shape, int shared)
{
    return shape.processors * (shared <= shape.shared_half ? 2 : 1);
}

/* Whether the rows are prepared in shared memory, which then is `shared` bytes: for a few rows,
 * when that does not make blocks run alone that could run in twos. */
static inline bool linear_is_resident(const linear_shape &shape, int rows, int shared)
{
    enum { MOST = 8, TABLE = 66 * 1024 };
    int limit = TABLE <= shape.shared_half ? shape.shared_half : shape.shared_block;
    return rows <= MOST && shared <= limit;
}

/* Prepares all rows: a panel in input.scratch, `panel` of the arguments. */
qllm_gpu_error linear_launch_prepare(int form, const linear_args &args, gpu_stream stream);

/* Few rows, at most LINEAR_ROWS of them from args.first on, which are prepared; or, `resident`, at
 * most 8 from 0 on, whose panel each block prepares for itself. */
qllm_gpu_error linear_launch_skinny(int form, const linear_args &args, const linear_shape &shape,
                                    bool resident, gpu_stream stream);

/* Whether skinny should prepare the rows itself. */
bool linear_skinny_prepares(int form, const linear_args &args, const linear_shape &shape);

/* Any number of rows, which are prepared. */
qllm_gpu_error linear_launch_prefill(int form, const linear_args &args, const linear_shape &shape,
                                     gpu_stream stream);

#endif
