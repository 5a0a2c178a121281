/* Stacks and the switch between them; and the order in which the threads of a block run: a warp
 * until each lane has ended or stands at the block's barrier, then the next. */
#include "fibers.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
enum { STACK_BYTES = 256 << 10 };
#else
enum { STACK_BYTES = 64 << 10 };
#endif

__thread gpu_index threadIdx, blockIdx, blockDim, gridDim;
__thread unsigned char *gpu_emulated_shared;
__thread worker *gpu_worker;

/* -------------------------------------------------------------------------------- switching */

static void lane_main();

/* The hot ends of all stacks would fall into the same sets of the first cache. */
static char *stack_top(const lane *l)
{
    return l->fiber_.stack + STACK_BYTES - l->index * 7 % 64 * 64;
}

#if defined(QLLM_EMULATE_UCONTEXT)

static void fiber_prepare(lane *l)
{
    getcontext(&l->fiber_.context);
    l->fiber_.context.uc_stack.ss_sp = l->fiber_.stack;
    l->fiber_.context.uc_stack.ss_size = static_cast<size_t>(stack_top(l) - l->fiber_.stack);
    l->fiber_.context.uc_link = NULL;
    makecontext(&l->fiber_.context, lane_main, 0);
}

static void stack_switch(fiber *from, fiber *to)
{
    swapcontext(&from->context, &to->context);
}

#else

extern "C" void qllm_emulate_switch(void **from, void *to);

/* Saves what a function must preserve on the old stack and takes it from the new one. */
asm(R"(
    .text
    .p2align 4
    .hidden qllm_emulate_switch
    .globl qllm_emulate_switch
    .type qllm_emulate_switch, @function
qllm_emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size qllm_emulate_switch, . - qllm_emulate_switch
)");

/* As if lane_main had been called and had switched away at once: six registers below its address,
 * above it the return address that it never uses. */
static void fiber_prepare(lane *l)
{
    void **top = reinterpret_cast<void **>(stack_top(l));
    *--top = NULL;
    *--top = reinterpret_cast<void *>(lane_main);
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    l->fiber_.stack_pointer = top;
}

static void stack_switch(fiber *from, fiber *to)
{
    qllm_emulate_switch(&from->stack_pointer, to->stack_pointer);
}

#endif

#if defined(__SANITIZE_ADDRESS__)
/* The thread's own stack; asked for once, since the answer takes long. */
static void own_stack(const void **bottom, size_t *size)
{
    static __thread void *known;
    static __thread size_t known_size;
    if (known == NULL) {
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &known, &known_size);
        pthread_attr_destroy(&attributes);
    }
    *bottom = known;
    *size = known_size;
}
#endif

/* `ends`: who switches away does not come back.  AddressSanitizer is told of each new stack. */
static void fiber_switch(fiber *from, fiber *to, bool ends)
{
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom = to->stack;
    size_t size = STACK_BYTES;
    if (bottom == NULL)
        own_stack(&bottom, &size);
    void *fake = NULL;
    __sanitizer_start_switch_fiber(ends ? NULL : &fake, bottom, size);
    stack_switch(from, to);
    __sanitizer_finish_switch_fiber(fake, NULL, NULL);
#else
    (void)ends;
    stack_switch(from, to);
#endif
}

/* ---------------------------------------------------------------------------------- running */

/* The lane that runs after `me`: the next in order, round the warp. */
static int next_lane(unsigned ready, int me, bool reversed)
{
    unsigned later = reversed ? ready & ((1u << me) - 1) : ready & ~((2u << me) - 1);
    unsigned among = later != 0 ? later : ready;
    return reversed ? 31 - __builtin_clz(among) : __builtin_ctz(among);
}

static void run_lane(worker *w, fiber *from, lane *next, bool ends)
{
    w->running = next;
    threadIdx.x = static_cast<unsigned>(next->index);
    fiber_switch(from, &next->fiber_, ends);
}

/* The running lane waits or has ended: on with its warp, else back to the block. */
static void leave(worker *w, bool ends)
{
    lane *me = w->running;
    const warp *p = warp_of(w, me);
    if (p->ready != 0)
        run_lane(w, &me->fiber_, &p->lanes[next_lane(p->ready, me->index % GPU_WARP, w->reversed)],
                 ends);
    else
        fiber_switch(&me->fiber_, &w->scheduler, ends);
}

static void lane_main()
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
#endif
    worker *w = gpu_worker;
    w->kernel->body();
    warp_of(w, w->running)->ready &= ~bit_of(w->running);
    leave(w, true);
    __builtin_unreachable();
}

/* ----------------------------------------------------------------------------- what goes wrong */

static void fail_at(worker *w, const lane *l, const char *file, int line, const char *format,
                    va_list arguments)
{
    char what[256];
    vsnprintf(what, sizeof what, format, arguments);
    const char *slash = strrchr(file, '/');
    snprintf(w->message, sizeof w->message,
             "kernel %s, block (%u, %u, %u), thread %d, %s:%d: %s", w->kernel->name, blockIdx.x,
             blockIdx.y, blockIdx.z, l->index, slash ? slash + 1 : file, line, what);
    w->failed = true;
}

static bool fail(worker *w, const lane *l, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The lane waits; false. */
static bool fail(worker *w, const lane *l, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fail_at(w, l, l->arrival->file, l->arrival->line, format, arguments);
    va_end(arguments);
    return false;
}

void gpu_emulate_fail(const char *file, int line, const char *format, ...)
{
    worker *w = gpu_worker;
    va_list arguments;
    va_start(arguments, format);
    fail_at(w, w->running, file, line, format, arguments);
    va_end(arguments);
    fiber_switch(&w->running->fiber_, &w->scheduler, true);
    __builtin_unreachable();
}

/* No lane of the warp can go on: says what the first that waits for lanes waits for. */
static bool fail_warp(worker *w, const warp *p)
{
    const lane *first = &p->lanes[__builtin_ctz(p->at_warp)];
    const gpu_arrival &call = *first->arrival;
    unsigned missing = call.mask & ~p->at_warp;
    if (missing == 0) { /* all wait, but not for the same */
        for (unsigned rest = call.mask; rest != 0; rest &= rest - 1) {
            const lane *l = &p->lanes[__builtin_ctz(rest)];
            if (l->arrival->line != call.line || l->arrival->mask != call.mask)
                return fail(w, first, "waits with lanes 0x%08x for thread %d, which waits in line "
                            "%d with lanes 0x%08x", call.mask, l->index, l->arrival->line,
                            l->arrival->mask);
        }
    }
    const lane *l = &p->lanes[missing != 0 ? __builtin_ctz(missing) : 0];
    if (missing & p->at_block)
        return fail(w, first, "waits with lanes 0x%08x for thread %d, which waits in line %d for "
                    "the block", call.mask, p->lanes[__builtin_ctz(missing & p->at_block)].index,
                    p->lanes[__builtin_ctz(missing & p->at_block)].arrival->line);
    return fail(w, first, "waits with lanes 0x%08x for thread %d, which has ended", call.mask,
                l->index);
}

/* ------------------------------------------------------------------------------------ waiting */

static bool agree(const warp *p, const gpu_arrival &arrival)
{
    for (unsigned rest = arrival.mask; rest != 0; rest &= rest - 1) {
        const gpu_arrival &other = *p->lanes[__builtin_ctz(rest)].arrival;
        if (other.mask != arrival.mask || other.line != arrival.line || other.kind != arrival.kind)
            return false;
    }
    return true;
}

int gpu_emulated_lane()
{
    return gpu_worker->running->index % GPU_WARP;
}

uint64_t gpu_emulate_collective(const gpu_arrival &arrival)
{
    worker *w = gpu_worker;
    lane *me = w->running;
    warp *p = warp_of(w, me);
    if (!(arrival.mask & bit_of(me)))
        gpu_emulate_fail(arrival.file, arrival.line, "calls with lanes 0x%08x, of which it is none",
                         arrival.mask);
    me->arrival = &arrival;
    p->ready &= ~bit_of(me);
    p->at_warp |= bit_of(me);
    if ((arrival.mask & ~p->at_warp) == 0 && agree(p, arrival)) {
        warp_perform(p, arrival);
        p->at_warp &= ~arrival.mask;
        p->ready |= arrival.mask;
    } else {
        leave(w, false);
    }
    return me->result;
}

void gpu_emulate_barrier(const gpu_arrival &arrival)
{
    worker *w = gpu_worker;
    lane *me = w->running;
    warp *p = warp_of(w, me);
    me->arrival = &arrival;
    p->ready &= ~bit_of(me);
    p->at_block |= bit_of(me);
    leave(w, false);
}

void gpu_wait_for_previous()
{
    gpu_worker->waited_for_previous = true;
}

/* -------------------------------------------------------------------------- asynchronous copies */

void gpu_copy_async16(void *shared, const void *global, const char *file, int line)
{
    gpu_emulate_aligned(shared, 16, file, line);
    gpu_emulate_aligned(global, 16, file, line);
    lane *me = gpu_worker->running;
    memset(shared, 0xff, 16);
    me->copies.push_back({shared, global, me->group});
}

void gpu_copy_async_commit()
{
    gpu_worker->running->group++;
}

void gpu_emulate_copy_wait(int groups)
{
    lane *me = gpu_worker->running;
    size_t kept = 0;
    for (const pending_copy &copy : me->copies) {
        if (copy.group < me->group - groups)
            memcpy(copy.to, copy.from, 16);
        else
            me->copies[kept++] = copy;
    }
    me->copies.resize(kept);
}

/* ------------------------------------------------------------------------------------- a block */

static bool prepare_lane(worker *w, lane *l, int index)
{
    if (l->fiber_.stack == NULL) {
        size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void *memory = mmap(NULL, STACK_BYTES + guard, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
            snprintf(w->message, sizeof w->message, "kernel %s: no memory for stacks",
                     w->kernel->name);
            return false;
        }
        l->fiber_.stack = static_cast<char *>(memory) + guard;
    }
#if defined(__SANITIZE_ADDRESS__) /* what an abandoned run left there */
    __asan_unpoison_memory_region(l->fiber_.stack, STACK_BYTES);
#endif
    l->index = index;
    l->group = 0;
    l->copies.clear();
    fiber_prepare(l);
    return true;
}

/* True when all that live stand at one barrier, which lets them go. */
static bool release_block(worker *w, int warps)
{
    const lane *first = NULL;
    for (int i = 0; i < warps; i++) {
        for (unsigned rest = w->warps[i].at_block; rest != 0; rest &= rest - 1) {
            const lane *l = &w->warps[i].lanes[__builtin_ctz(rest)];
            if (first == NULL)
                first = l;
            if (l->arrival->line != first->arrival->line)
                return fail(w, first, "waits for the block, and thread %d waits for it in line %d",
                            l->index, l->arrival->line);
        }
    }
    for (int i = 0; i < warps; i++) {
        w->warps[i].ready = w->warps[i].at_block;
        w->warps[i].at_block = 0;
    }
    return true;
}

static bool run_warps(worker *w, int warps)
{
    for (;;) {
        unsigned living = 0;
        for (int i = 0; i < warps; i++) {
            warp *p = &w->warps[w->reversed ? warps - 1 - i : i];
            if (p->ready != 0)
                run_lane(w, &w->scheduler,
                         &p->lanes[w->reversed ? 31 - __builtin_clz(p->ready)
                                               : __builtin_ctz(p->ready)], false);
            if (w->failed || (p->at_warp != 0 && !fail_warp(w, p)))
                return false;
            living |= p->at_block;
        }
        if (living == 0)
            return true;
        if (!release_block(w, warps))
            return false;
    }
}

bool worker_run(worker *w, gpu_index block)
{
    const gpu_emulated_kernel *kernel = w->kernel;
    int warps = kernel->threads / GPU_WARP;
    gpu_worker = w;
    gpu_emulated_shared = w->shared;
    threadIdx = {0, 0, 0};
    blockIdx = block;
    blockDim = {static_cast<unsigned>(kernel->threads), 1, 1};
    gridDim = {kernel->grid.x, kernel->grid.y, kernel->grid.z};
    w->failed = false;
    for (int i = 0; i < kernel->threads; i++)
        if (!prepare_lane(w, &w->lanes[i], i))
            return false;
    for (int i = 0; i < warps; i++)
        w->warps[i] = {&w->lanes[i * GPU_WARP], GPU_FULL_WARP, 0, 0};
    memset(w->shared, 0xff, kernel->shared);
    bool done = run_warps(w, warps);
    gpu_worker = NULL;
    return done;
}

static std::mutex workers_mutex;
static std::vector<worker *> &idle_workers()
{
    static auto *idle = new std::vector<worker *>; /* lives as long as the process */
    return *idle;
}

worker *worker_take()
{
    std::lock_guard<std::mutex> lock(workers_mutex);
    if (idle_workers().empty())
        return new worker();
    worker *w = idle_workers().back();
    idle_workers().pop_back();
    return w;
}

void worker_give(worker *w)
{
    std::lock_guard<std::mutex> lock(workers_mutex);
    idle_workers().push_back(w);
}
