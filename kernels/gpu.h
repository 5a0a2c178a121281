/* What a kernel needs of the language, for two compilers: nvcc, and g++ with the emulation of
 * emulate/.  Kernels are written once, with these names and plain C++17; inline PTX stands in this
 * file alone.
 *
 *   GPU_KERNEL void f(args)           a kernel; GPU_KERNEL_BOUNDS(threads, blocks) before its name
 *   GPU_DEVICE, GPU_BOTH              a function for the device, or for both sides
 *   GPU_CONSTANT                      a table in constant memory: GPU_CONSTANT float t[2] = {1, 2};
 *   GPU_UNROLL, GPU_NO_UNROLL         before a loop
 *   GPU_NO_INLINE                     a device function that a kernel has once, for all its calls
 *   GPU_SHARED(type, name);           type *name = the block's dynamic shared memory, aligned to
 *                                     128 bytes; once per kernel
 *   threadIdx.x, blockIdx, blockDim.x, gridDim    blocks have one dimension, of whole warps
 *   GPU_LAUNCH(kernel, grid, threads, shared_bytes, stream, args...)    an expression: 0 or an
 *       error code for gpu_check (runtime.h).  grid: a number or dim3; a name with commas in
 *       parentheses
 *   GPU_LAUNCH_DEPENDENT(...)         the same, but the kernel may start while the one before it in
 *       the stream still runs: it calls gpu_wait_for_previous() before it touches what that writes
 *
 * Between lanes of a warp (all lanes of `mask` call, on the same line of source):
 *   gpu_shfl(mask, v, lane), gpu_shfl_xor(mask, v, m), gpu_shfl_down(mask, v, d)   of 4 or 8 bytes
 *   gpu_ballot(mask, p), gpu_any(mask, p), gpu_all(mask, p), gpu_sync_warp(mask)
 *   gpu_mma_bf16(d, a, b)   d += a b, m16n8k16, bf16 with float32 sums, fragments as PTX lays them
 *   gpu_mma_s8(d, a, b)     d += a b, m16n8k32, int8 with int32 sums
 *   gpu_load_matrices(r, row)            ldmatrix.x4: lane 8 i + j points to row j (16 bytes of
 *   gpu_load_matrices_transposed(r, row) shared memory) of matrix i, 8 x 8 values of 16 bits
 * Between threads: gpu_sync_block(), gpu_fence(), gpu_atomic_add/max/min/or(p, v): the old value.
 * Memory: gpu_load_stream(const uint4 *) read once, gpu_load(p) read only while the kernel runs,
 *   gpu_copy_async16(shared, global), gpu_copy_async_commit(), gpu_copy_async_wait<N>(). */
#ifndef QLLM_KERNELS_GPU_H
#define QLLM_KERNELS_GPU_H

#include <math.h>
#include <stdint.h>
#include <string.h>

extern "C" {
#include "core/dtype.h"
}

typedef struct CUstream_st *gpu_stream; /* NULL: the default stream */
typedef int qllm_gpu_error;             /* 0: success; else see gpu_check */

enum { GPU_WARP = 32 };
constexpr unsigned GPU_FULL_WARP = 0xffffffffu;

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define GPU_KERNEL __global__
#define GPU_KERNEL_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define GPU_DEVICE __device__
#define GPU_BOTH __host__ __device__
#define GPU_CONSTANT static __constant__ const
#define GPU_UNROLL _Pragma("unroll")
#define GPU_NO_UNROLL _Pragma("unroll 1")
#define GPU_NO_INLINE __noinline__
#define GPU_SHARED(type, name)                                          \
    extern __shared__ __align__(128) unsigned char gpu_shared_memory[]; \
    type *name = reinterpret_cast<type *>(gpu_shared_memory)

/* ------------------------------------------------------------------------------ launching */

bool gpu_overlaps_launches(void); /* of the current device; driver.cu */

template <class... Parameters, class... Arguments>
qllm_gpu_error gpu_launch(bool dependent, void (*kernel)(Parameters...), dim3 grid, int threads,
                          size_t shared, gpu_stream stream, Arguments &&...arguments)
{
    if (shared > 48 * 1024) {
        cudaError_t code = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (code != cudaSuccess)
            return code;
    }
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = dependent && gpu_overlaps_launches();
    return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments &&>(arguments)...);
}

#define GPU_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    gpu_launch(false, kernel, grid, threads, shared_bytes, stream, ##__VA_ARGS__)
#define GPU_LAUNCH_DEPENDENT(kernel, grid, threads, shared_bytes, stream, ...) \
    gpu_launch(true, kernel, grid, threads, shared_bytes, stream, ##__VA_ARGS__)

__device__ inline void gpu_wait_for_previous()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void gpu_let_next_start()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* ------------------------------------------------------------- between threads and lanes */

__device__ inline void gpu_sync_block()
{
    __syncthreads();
}

__device__ inline void gpu_sync_warp(unsigned mask = GPU_FULL_WARP)
{
    __syncwarp(mask);
}

__device__ inline void gpu_fence()
{
    __threadfence();
}

/* The shuffles of CUDA take arithmetic types; these any of 4 or 8 bytes. */
#define GPU_SHUFFLE(name, primitive, argument)                             \
    template <class T>                                                     \
    __device__ inline T name(unsigned mask, T value, argument source)      \
    {                                                                      \
        static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");   \
        if constexpr (sizeof(T) == 4) {                                    \
            unsigned bits;                                                 \
            memcpy(&bits, &value, 4);                                      \
            bits = primitive(mask, bits, source);                          \
            memcpy(&value, &bits, 4);                                      \
        } else {                                                           \
            unsigned long long bits;                                       \
            memcpy(&bits, &value, 8);                                      \
            bits = primitive(mask, bits, source);                          \
            memcpy(&value, &bits, 8);                                      \
        }                                                                  \
        return value;                                                      \
    }
GPU_SHUFFLE(gpu_shfl, __shfl_sync, int)
GPU_SHUFFLE(gpu_shfl_xor, __shfl_xor_sync, int)
GPU_SHUFFLE(gpu_shfl_down, __shfl_down_sync, unsigned)
#undef GPU_SHUFFLE

__device__ inline unsigned gpu_ballot(unsigned mask, bool p)
{
    return __ballot_sync(mask, p);
}

__device__ inline bool gpu_any(unsigned mask, bool p)
{
    return __any_sync(mask, p);
}

__device__ inline bool gpu_all(unsigned mask, bool p)
{
    return __all_sync(mask, p);
}

template <class T>
__device__ inline T gpu_atomic_add(T *p, T v)
{
    return atomicAdd(p, v);
}

template <class T>
__device__ inline T gpu_atomic_max(T *p, T v)
{
    return atomicMax(p, v);
}

template <class T>
__device__ inline T gpu_atomic_min(T *p, T v)
{
    return atomicMin(p, v);
}

template <class T>
__device__ inline T gpu_atomic_or(T *p, T v)
{
    return atomicOr(p, v);
}

/* --------------------------------------------------------------------------------- memory */

__device__ inline uint4 gpu_load_stream(const uint4 *p)
{
    return __ldcs(p);
}

template <class T>
__device__ inline T gpu_load(const T *p)
{
    return __ldg(p);
}

__device__ inline void gpu_copy_async16(void *shared, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}

__device__ inline void gpu_copy_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits for this thread's copies, those of the latest N groups left out. */
template <int N>
__device__ inline void gpu_copy_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* ------------------------------------------------------------------------- matrix products */

__device__ inline void gpu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void gpu_mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void gpu_load_matrices(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

__device__ inline void gpu_load_matrices_transposed(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

/* ------------------------------------------------------------------------------- arithmetic */

__device__ inline float gpu_half_to_float(uint16_t h)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
    return value;
}

/* Two floats as bf16, `low` in the low half; to nearest, ties to even, NaN stays NaN. */
__device__ inline uint32_t gpu_pack_bf16(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/* Approximate within some ulp: of 2^x and of 1 / sqrt(x). */
__device__ inline float gpu_exp2_approx(float x)
{
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ inline float gpu_rsqrt_approx(float x)
{
    float value;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

/* The bytes that the four low nibbles of `selector` (0 .. 7) name, of b:a with a the low ones. */
__device__ inline uint32_t gpu_byte_perm(uint32_t a, uint32_t b, uint32_t selector)
{
    return __byte_perm(a, b, selector);
}

/* c + the sum of the products of four signed bytes each. */
__device__ inline int gpu_dot4(int a, int b, int c)
{
    int sum;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

__device__ inline int gpu_popcount(unsigned bits)
{
    return __popc(bits);
}

#else

#include "emulate/gpu_host.h"

#endif

/* ---------------------------------------------------------------------------- on both sides */

/* A division by a number that the host knows, in two instructions: of n >= 0 with n * by < 2^31. */
typedef struct gpu_divisor {
    int by;
    uint32_t factor; /* 2^31 / by, rounded up */
} gpu_divisor;

inline gpu_divisor gpu_divisor_of(int by)
{
    gpu_divisor d = {by, static_cast<uint32_t>(((int64_t{1} << 31) + by - 1) / by)};
    return d;
}

GPU_BOTH inline int gpu_quotient(int n, const gpu_divisor &d)
{
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * d.factor >> 31);
}

GPU_BOTH inline float gpu_fma(float a, float b, float c)
{
    return fmaf(a, b, c);
}

GPU_BOTH inline double gpu_fma(double a, double b, double c)
{
    return fma(a, b, c);
}

GPU_BOTH inline float gpu_float_from_bits(uint32_t bits)
{
    return qllm_float_from_bits(bits);
}

GPU_BOTH inline uint32_t gpu_bits_from_float(float value)
{
    return qllm_bits_from_float(value);
}

GPU_BOTH inline float gpu_bf16_to_float(uint16_t h)
{
    return qllm_bf16_to_float(h);
}

/* To nearest, ties to even, with the bits of core/dtype.h for NaN too. */
GPU_BOTH inline uint16_t gpu_float_to_bf16(float value)
{
    return qllm_float_to_bf16(value);
}

#endif
