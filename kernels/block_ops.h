/* What all threads of a block find out together: every thread calls, and every thread gets the
 * result.  None of it depends on the order in which threads run. */
#ifndef QLLM_KERNELS_BLOCK_OPS_H
#define QLLM_KERNELS_BLOCK_OPS_H

#include <stdint.h>

#include "gpu.h"

enum { GPU_MAX_WARPS = 32 };

/* Room in shared memory for the functions below. */
struct gpu_block_room {
    uint64_t slots[GPU_MAX_WARPS];
};

GPU_DEVICE inline int gpu_lane()
{
    return (int)threadIdx.x % GPU_WARP;
}

GPU_DEVICE inline int gpu_warp()
{
    return (int)threadIdx.x / GPU_WARP;
}

struct gpu_larger {
    template <typename T> GPU_DEVICE T operator()(T a, T b) const { return b > a ? b : a; }
};

struct gpu_smaller {
    template <typename T> GPU_DEVICE T operator()(T a, T b) const { return b < a ? b : a; }
};

/* The largest or smallest value of all threads: T of 4 or 8 bytes, without NaN. */
template <typename T, typename Choice>
GPU_DEVICE GPU_NO_INLINE T gpu_block_choose(gpu_block_room *room, T value, Choice choice)
{
    T *slots = (T *)(void *)room->slots;
    for (int distance = GPU_WARP / 2; distance > 0; distance /= 2)
        value = choice(value, gpu_shfl_xor(GPU_FULL_WARP, value, distance));
    if (gpu_lane() == 0)
        slots[gpu_warp()] = value;
    gpu_sync_block();
    value = slots[0];
    for (int w = 1; w < (int)blockDim.x / GPU_WARP; w++)
        value = choice(value, slots[w]);
    gpu_sync_block(); /* the slots are free again */
    return value;
}

/* The sum of the values of the threads before this one, and of all in *total. */
static GPU_DEVICE GPU_NO_INLINE uint64_t gpu_block_sum_before(gpu_block_room *room,
                                                              uint64_t value, uint64_t *total)
{
    uint64_t sum = value, before = 0, all = 0;
    for (int distance = 1; distance < GPU_WARP; distance *= 2) {
        uint64_t other = gpu_shfl(GPU_FULL_WARP, sum,
                                  gpu_lane() < distance ? gpu_lane() : gpu_lane() - distance);
        sum += gpu_lane() < distance ? 0 : other;
    }
    if (gpu_lane() == GPU_WARP - 1)
        room->slots[gpu_warp()] = sum;
    gpu_sync_block();
    for (int w = 0; w < (int)blockDim.x / GPU_WARP; w++) {
        before += w < gpu_warp() ? room->slots[w] : 0;
        all += room->slots[w];
    }
    gpu_sync_block();
    *total = all;
    return before + sum - value;
}

/* qllm_lane_sum of core/logit_ops.h over the 16 lanes of each half of a warp, to all of them. */
GPU_DEVICE inline double gpu_half_warp_sum(double sum)
{
    int lane = gpu_lane() % 16;
    for (int step = 8; step > 0; step /= 2) /* what comes into lanes from `step` on is not used */
        sum += gpu_shfl_down(GPU_FULL_WARP, sum, step);
    return gpu_shfl(GPU_FULL_WARP, sum, gpu_lane() - lane);
}

#endif
