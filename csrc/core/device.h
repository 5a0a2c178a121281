/* QLLM_BOTH marks the small functions of core that kernels for a GPU call too, so that their source
 * is the same on both sides.  It means something to nvcc alone. */
#ifndef QLLM_CORE_DEVICE_H
#define QLLM_CORE_DEVICE_H

#if defined(__CUDACC__)
#define QLLM_BOTH __host__ __device__
#else
#define QLLM_BOTH
#endif

#endif
