/* Two words to the compiler that the kernels need: a helper whose constant arguments must reach its
 * loops, and a loop of few, constant turns whose array of sums must become registers.  A build for
 * sanitizers defines QLLM_PLAIN_INLINE: with checks in every helper, forced inlining and unrolling
 * take minutes. */
#ifndef QLLM_CPU_INLINE_H
#define QLLM_CPU_INLINE_H

#if defined(QLLM_PLAIN_INLINE)
#define QLLM_INLINE static inline
#else
#define QLLM_INLINE static inline __attribute__((always_inline))
#endif

#if defined(QLLM_PLAIN_INLINE)
#define QLLM_UNROLL
#define QLLM_UNROLL_GROUP
#elif defined(__clang__)
#define QLLM_UNROLL _Pragma("clang loop unroll(full)")
#define QLLM_UNROLL_GROUP _Pragma("clang loop unroll_count(32)")
#else
#define QLLM_UNROLL _Pragma("GCC unroll 16")
#define QLLM_UNROLL_GROUP _Pragma("GCC unroll 32")
#endif

#endif
