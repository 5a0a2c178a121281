/* gpu.h for g++: every thread of a block is a fiber, which runs until it waits for others.  A block
 * and its lanes take turns in a fixed order on one thread of the processor, so that a run repeats
 * itself; QLLM_EMULATE_ORDER=reversed lets the last go first, QLLM_EMULATE_THREADS=n deals blocks
 * to n threads.
 *
 * Stricter than a GPU on purpose.  Threads that could wait for ever (lanes of a mask that have
 * ended or stand elsewhere, two barriers of a block at a time) end the launch with an error that
 * names kernel, block, thread and line.  Shared memory starts as 0xFF bytes; what an asynchronous copy is
 * to fill becomes 0xFF until it is waited for. */
#ifndef QLLM_KERNELS_EMULATE_GPU_HOST_H
#define QLLM_KERNELS_EMULATE_GPU_HOST_H

#include <functional>
#include <tuple>
#include <type_traits>

#define GPU_KERNEL
#define GPU_KERNEL_BOUNDS(threads, blocks)
#define GPU_DEVICE
#define GPU_BOTH
#define GPU_CONSTANT static const
#define GPU_UNROLL
#define GPU_NO_UNROLL
#define GPU_NO_INLINE
#define GPU_SHARED(type, name) type *name = reinterpret_cast<type *>(gpu_emulated_shared)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

struct gpu_index { unsigned x, y, z; };
extern __thread gpu_index threadIdx, blockIdx, blockDim, gridDim;
extern __thread unsigned char *gpu_emulated_shared;

/* ------------------------------------------------------------------------------ launching */

struct gpu_emulated_kernel {
    const char *name;
    dim3 grid;
    int threads;
    size_t shared;
    bool dependent;
    std::function<void()> body; /* what each thread runs */
};

/* Runs all blocks; 0 or a code whose sentence gpu_check gives.  emulate/launch.cc */
qllm_gpu_error gpu_emulate_run(const gpu_emulated_kernel &kernel);

/* Does the work at once, or later, as the stream says.  emulate/driver.cc */
qllm_gpu_error gpu_emulate_submit(gpu_stream stream, std::function<qllm_gpu_error()> work);

/* An error that names the kernel, unless `pointer` is NULL or of the device or pinned. */
qllm_gpu_error gpu_emulate_argument(const char *kernel, int index, const void *pointer);

template <class T>
qllm_gpu_error gpu_emulate_argument_of(const char *kernel, int index, const T &value)
{
    if constexpr (std::is_pointer_v<T>)
        return gpu_emulate_argument(kernel, index, reinterpret_cast<const void *>(value));
    return 0;
}

template <class... Parameters, class... Arguments>
qllm_gpu_error gpu_launch(const char *name, bool dependent, void (*kernel)(Parameters...),
                          dim3 grid, int threads, size_t shared, gpu_stream stream,
                          Arguments &&...arguments)
{
    std::tuple<Parameters...> values(arguments...);
    qllm_gpu_error code = 0;
    int index = 0;
    std::apply([&](const auto &...value) {
        ((code = code != 0 ? code : gpu_emulate_argument_of(name, index++, value)), ...);
    }, values);
    if (code != 0)
        return code;
    gpu_emulated_kernel run = {name, grid, threads, shared, dependent,
                               [kernel, values] { std::apply(kernel, values); }};
    return gpu_emulate_submit(stream, [run] { return gpu_emulate_run(run); });
}

#define GPU_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
    gpu_launch(#kernel, false, kernel, grid, threads, shared_bytes, stream, ##__VA_ARGS__)
#define GPU_LAUNCH_DEPENDENT(kernel, grid, threads, shared_bytes, stream, ...) \
    gpu_launch(#kernel, true, kernel, grid, threads, shared_bytes, stream, ##__VA_ARGS__)

void gpu_wait_for_previous();

inline void gpu_let_next_start()
{
}

/* ------------------------------------------------------------- between threads and lanes */

enum gpu_collective {
    GPU_BLOCK_BARRIER,
    GPU_WARP_BARRIER,
    GPU_SHUFFLE,
    GPU_BALLOT,
    GPU_MMA_BF16,
    GPU_MMA_S8,
    GPU_LOAD_MATRICES,
    GPU_LOAD_MATRICES_TRANSPOSED
};

/* What a thread brings to a place where it waits for others, and where it is. */
struct gpu_arrival {
    gpu_collective kind;
    unsigned mask;
    const char *file;
    int line;
    uint64_t value;       /* shuffle: its value; ballot: 0 or 1 */
    int source;           /* shuffle: the lane whose value it wants */
    void *d;              /* its registers of a matrix */
    const void *a, *b;
};

/* Waits for all lanes of the mask; the shuffled value, or the ballot. */
uint64_t gpu_emulate_collective(const gpu_arrival &arrival);
void gpu_emulate_barrier(const gpu_arrival &arrival);

/* Ends the launch with an error of the calling thread, at that line. */
[[noreturn]] void gpu_emulate_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

int gpu_emulated_lane();

#define GPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void gpu_sync_block(GPU_HERE)
{
    gpu_emulate_barrier({GPU_BLOCK_BARRIER, 0, file, line, 0, 0, nullptr, nullptr, nullptr});
}

inline void gpu_sync_warp(unsigned mask = GPU_FULL_WARP, GPU_HERE)
{
    gpu_emulate_collective({GPU_WARP_BARRIER, mask, file, line, 0, 0, nullptr, nullptr, nullptr});
}

inline void gpu_fence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

template <class T>
T gpu_emulate_shuffle(unsigned mask, T value, int source, const char *file, int line)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = gpu_emulate_collective(
        {GPU_SHUFFLE, mask, file, line, bits, source, nullptr, nullptr, nullptr});
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
T gpu_shfl(unsigned mask, T value, int lane, GPU_HERE)
{
    return gpu_emulate_shuffle(mask, value, lane % GPU_WARP, file, line);
}

template <class T>
T gpu_shfl_xor(unsigned mask, T value, int m, GPU_HERE)
{
    return gpu_emulate_shuffle(mask, value, gpu_emulated_lane() ^ m, file, line);
}

template <class T>
T gpu_shfl_down(unsigned mask, T value, unsigned d, GPU_HERE)
{
    int lane = gpu_emulated_lane(), source = lane + static_cast<int>(d);
    return gpu_emulate_shuffle(mask, value, source < GPU_WARP ? source : lane, file, line);
}

inline unsigned gpu_ballot(unsigned mask, bool p, GPU_HERE)
{
    return static_cast<unsigned>(gpu_emulate_collective(
        {GPU_BALLOT, mask, file, line, p, 0, nullptr, nullptr, nullptr}));
}

inline bool gpu_any(unsigned mask, bool p, GPU_HERE)
{
    return gpu_ballot(mask, p, file, line) != 0;
}

inline bool gpu_all(unsigned mask, bool p, GPU_HERE)
{
    return gpu_ballot(mask, p, file, line) == mask;
}

template <class T>
T gpu_atomic_add(T *p, T v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}

template <class T>
T gpu_atomic_or(T *p, T v)
{
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}

template <class T>
T gpu_atomic_max(T *p, T v)
{
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

template <class T>
T gpu_atomic_min(T *p, T v)
{
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (v < old &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}

/* --------------------------------------------------------------------------------- memory */

inline void gpu_emulate_aligned(const void *p, size_t size, const char *file, int line)
{
    if (reinterpret_cast<uintptr_t>(p) % size != 0)
        gpu_emulate_fail(file, line, "%d bytes are not aligned", static_cast<int>(size));
}

inline uint4 gpu_load_stream(const uint4 *p, GPU_HERE)
{
    gpu_emulate_aligned(p, sizeof *p, file, line);
    return *p;
}

template <class T>
T gpu_load(const T *p, GPU_HERE)
{
    gpu_emulate_aligned(p, sizeof *p, file, line);
    return *p;
}

void gpu_copy_async16(void *shared, const void *global, GPU_HERE);
void gpu_copy_async_commit();
void gpu_emulate_copy_wait(int groups);

template <int N>
void gpu_copy_async_wait()
{
    gpu_emulate_copy_wait(N);
}

/* ------------------------------------------------------------------------- matrix products */

inline void gpu_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], GPU_HERE)
{
    gpu_emulate_collective({GPU_MMA_BF16, GPU_FULL_WARP, file, line, 0, 0, d, a, b});
}

inline void gpu_mma_s8(int32_t d[4], const uint32_t a[4], const uint32_t b[2], GPU_HERE)
{
    gpu_emulate_collective({GPU_MMA_S8, GPU_FULL_WARP, file, line, 0, 0, d, a, b});
}

inline void gpu_load_matrices(uint32_t r[4], const void *row, GPU_HERE)
{
    gpu_emulate_aligned(row, 16, file, line);
    gpu_emulate_collective({GPU_LOAD_MATRICES, GPU_FULL_WARP, file, line, 0, 0, r, row, nullptr});
}

inline void gpu_load_matrices_transposed(uint32_t r[4], const void *row, GPU_HERE)
{
    gpu_emulate_aligned(row, 16, file, line);
    gpu_emulate_collective(
        {GPU_LOAD_MATRICES_TRANSPOSED, GPU_FULL_WARP, file, line, 0, 0, r, row, nullptr});
}

/* ------------------------------------------------------------------------------- arithmetic */

inline float gpu_half_to_float(uint16_t h)
{
    return qllm_f16_to_float(h);
}

inline uint32_t gpu_pack_bf16(float low, float high)
{
    return qllm_float_to_bf16(low) | static_cast<uint32_t>(qllm_float_to_bf16(high)) << 16;
}

inline float gpu_exp2_approx(float x)
{
    return exp2f(x);
}

inline float gpu_rsqrt_approx(float x)
{
    return 1 / sqrtf(x);
}

inline uint32_t gpu_byte_perm(uint32_t a, uint32_t b, uint32_t selector)
{
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline int gpu_dot4(int a, int b, int c)
{
    for (int i = 0; i < 32; i += 8)
        c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return c;
}

inline int gpu_popcount(unsigned bits)
{
    return __builtin_popcount(bits);
}

#endif
