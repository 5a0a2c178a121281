/* Functions of headers that the host and a GPU both call, so that a formula stands in one place. */
#ifndef QLLM_CORE_BOTH_H
#define QLLM_CORE_BOTH_H

#if defined(__CUDACC__)
#define QLLM_BOTH __host__ __device__
#else
#define QLLM_BOTH
#endif

#endif
