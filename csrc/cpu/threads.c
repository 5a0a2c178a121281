#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "cpu/threads.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include "core/alloc.h"

enum {
    SPIN_NANOSECONDS = 50000, /* then sleep: others may share these processors */
    STACK_BYTES = 1 << 20,
    PART_CHUNKS = 4, /* so much of a part can be left to others, at most, when its thread is late */
    LINE_BYTES = 64
};

typedef struct job {
    int64_t n;
    void (*work)(void *context, int64_t begin, int64_t end, int thread);
    void *context;
    int parts;
} job;

/* A thread and its part of the job; the first one is the caller. */
typedef struct worker {
    struct qllm_threads *pool;
    pthread_t thread;
    int index;
    _Alignas(LINE_BYTES) _Atomic int64_t next; /* chunk of the part that nobody has taken yet */
} worker;

/* The state of a pool in one number: generation << 32 | open << 31 | workers inside.  The
 * generation grows by one with each job.  While the job is open, workers enter by adding one; the
 * caller closes it when no chunk is left, and then waits for those inside alone. A worker that
 * comes late finds the job closed, and nothing of it is touched. */
enum { GENERATION_SHIFT = 32 };
static const uint64_t JOB_OPEN = (uint64_t)1 << 31;

struct qllm_threads {
    int count;                  /* the caller included */
    worker *workers;            /* (count) */
    int started;                /* how many of them run, without the caller */
    bool tried;                 /* the workers have been started, or some could not be */
    _Atomic int process;        /* number of forks when the state below was made; -1 while remade */
    pthread_mutex_t turn;       /* one job at a time */
    pthread_mutex_t lock;       /* guards sleeping and waking */
    pthread_cond_t wake, done;
    job job;                    /* written while closed and nobody is inside */
    _Atomic uint64_t state;
    _Atomic bool sleeping;      /* a worker may wait for `wake` */
    _Atomic bool caller_waits;
    _Atomic bool stop;
};

/* Forks that led to this process.  A child has none of its parent's threads, and its copies of
 * their locks may be held by nobody; the pool compares this number and starts afresh. */
static _Atomic int forks = 0;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void count_fork(void)
{
    atomic_fetch_add(&forks, 1);
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, count_fork);
}

static int processors_allowed(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < 4096 ? (int)online : 1;
}

/* The quota of a cgroup of version 2, "max 100000" or "150000 100000" (microseconds of processor
 * time per period), as processors rounded up; 0 where there is none. */
static int processors_in_quota(void)
{
    char text[64];
    int file = open("/sys/fs/cgroup/cpu.max", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length <= 0)
        return 0;
    text[length] = '\0';
    char *end;
    long long quota = strtoll(text, &end, 10); /* "max" gives 0 */
    long long period = strtoll(end, NULL, 10);
    if (quota <= 0 || period <= 0)
        return 0;
    long long processors = quota / period + (quota % period != 0);
    return processors < 4096 ? (int)processors : 0;
}

int qllm_threads_available(void)
{
    int allowed = processors_allowed(), quota = processors_in_quota();
    if (quota > 0 && quota < allowed)
        allowed = quota;
    return allowed > 0 ? allowed : 1;
}

/* QLLM_THREADS: a decimal number from 1, digits only; 0 where it is not set. */
static qllm_status threads_from_environment(int *n, qllm_error *error)
{
    const char *text = getenv("QLLM_THREADS");
    *n = 0;
    if (text == NULL || text[0] == '\0')
        return QLLM_OK;
    size_t length = strspn(text, "0123456789");
    long value = length < 10 ? strtol(text, NULL, 10) : 0;
    if (text[length] != '\0' || value < 1)
        return qllm_fail(error, QLLM_VALUE, "QLLM_THREADS is '%.40s'; expected a whole number of "
                         "threads from 1 to 999999999, or leave it unset to use all %d available",
                         text, qllm_threads_available());
    *n = (int)value;
    return QLLM_OK;
}

static void make_locks(qllm_threads *pool)
{
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
}

qllm_status qllm_threads_resolve(int n, int *count, qllm_error *error)
{
    if (n < 0)
        return qllm_fail(error, QLLM_VALUE, "threads is %d; expected 1 or more, or 0 to use all %d "
                         "available", n, qllm_threads_available());
    if (n == 0 && threads_from_environment(&n, error) != QLLM_OK)
        return QLLM_VALUE;
    int available = qllm_threads_available();
    *count = n == 0 || n > available ? available : n;
    return QLLM_OK;
}

qllm_status qllm_threads_create(int n, qllm_threads **out, qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_threads_resolve(n, &n, error);
    if (status != QLLM_OK)
        return status;
    status = qllm_alloc(&memory, 1, sizeof(qllm_threads), "a thread pool", error);
    if (status != QLLM_OK)
        return status;
    qllm_threads *pool = memory;
    status = qllm_alloc(&memory, n, sizeof(worker), "the threads of a pool", error);
    if (status != QLLM_OK) {
        qllm_free(pool);
        return status;
    }
    pthread_once(&fork_once, watch_forks);
    pool->workers = memory;
    pool->count = n;
    atomic_init(&pool->process, atomic_load(&forks));
    make_locks(pool);
    *out = pool;
    return QLLM_OK;
}

int qllm_threads_count(const qllm_threads *threads)
{
    return threads->count;
}

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Where part i of [0, n) begins; parts are contiguous and differ by at most one item. */
static int64_t part_begin(int64_t n, int64_t parts, int64_t i)
{
    int64_t rest = n % parts;
    return n / parts * i + (i < rest ? i : rest);
}

/* Works through the chunks of one part that nobody has taken. */
static void run_part(qllm_threads *pool, int part, int thread)
{
    const job *job = &pool->job;
    _Atomic int64_t *next = &pool->workers[part].next;
    int64_t begin = part_begin(job->n, job->parts, part);
    int64_t n = part_begin(job->n, job->parts, part + 1) - begin;
    int64_t chunks = n < PART_CHUNKS ? n : PART_CHUNKS;
    while (atomic_load_explicit(next, memory_order_relaxed) < chunks) {
        int64_t i = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
        if (i < chunks)
            job->work(job->context, begin + part_begin(n, chunks, i),
                      begin + part_begin(n, chunks, i + 1), thread);
    }
}

/* A thread's own part first, from one end to the other: memory is read in one stream, and by the
 * same processor in the next job over the same weights.  Then what is left of the others'. */
static void run_parts(qllm_threads *pool, int thread)
{
    int parts = pool->job.parts;
    for (int i = 0; i < parts; i++)
        run_part(pool, (thread + i) % parts, thread);
}

static uint32_t generation(uint64_t state)
{
    return (uint32_t)(state >> GENERATION_SHIFT);
}

static void spin_until_generation(qllm_threads *pool, uint32_t seen)
{
    int64_t limit = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if (generation(atomic_load_explicit(&pool->state, memory_order_acquire)) != seen)
                return;
            pause_briefly();
        }
    } while (nanoseconds() < limit);
}

/* A worker says that it sleeps before it looks at the generation, and the caller changes the
 * generation before it looks for sleepers, so one of them always sees the other. */
static void wait_for_job(qllm_threads *pool, uint32_t seen)
{
    spin_until_generation(pool, seen);
    if (generation(atomic_load(&pool->state)) != seen)
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->sleeping, true);
    while (generation(atomic_load(&pool->state)) == seen) {
        pthread_cond_wait(&pool->wake, &pool->lock);
        atomic_store(&pool->sleeping, true);
    }
    pthread_mutex_unlock(&pool->lock);
}

/* Goes inside the job unless it is closed already; *seen is then its generation. */
static bool enter_job(qllm_threads *pool, uint32_t *seen)
{
    uint64_t state = atomic_load(&pool->state);
    do {
        *seen = generation(state);
        if ((state & JOB_OPEN) == 0)
            return false;
    } while (!atomic_compare_exchange_weak(&pool->state, &state, state + 1));
    return true;
}

static bool is_last_inside(uint64_t state)
{
    return (state & (2 * JOB_OPEN - 1)) == 1;
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    qllm_threads *pool = self->pool;
    uint32_t seen = 0; /* the pool started its workers before its first job */
    for (;;) {
        wait_for_job(pool, seen);
        if (atomic_load(&pool->stop))
            return NULL;
        if (!enter_job(pool, &seen))
            continue;
        run_parts(pool, self->index);
        if (is_last_inside(atomic_fetch_sub(&pool->state, 1)) &&
            atomic_load(&pool->caller_waits)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

/* The next generation, when nobody is inside: an open job or, at the end of the pool, none. */
static void start_generation(qllm_threads *pool, uint64_t open)
{
    uint64_t next = (uint64_t)(generation(atomic_load(&pool->state)) + 1u) << GENERATION_SHIFT;
    atomic_store(&pool->state, next | open);
    if (!atomic_load(&pool->sleeping))
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->sleeping, false);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static bool nobody_inside(qllm_threads *pool)
{
    return (atomic_load(&pool->state) & (JOB_OPEN - 1)) == 0;
}

static void close_job(qllm_threads *pool)
{
    atomic_fetch_and(&pool->state, ~JOB_OPEN);
    int64_t limit = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if (nobody_inside(pool))
                return;
            pause_briefly();
        }
    } while (nanoseconds() < limit);
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_waits, true);
    while (!nobody_inside(pool))
        pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_waits, false);
    pthread_mutex_unlock(&pool->lock);
}

/* In a child of fork: new locks, and workers at the next job. One thread remakes, others wait. */
static void notice_fork(qllm_threads *pool)
{
    int now = atomic_load(&forks), before = atomic_load(&pool->process);
    while (before != now) {
        if (before != -1 && atomic_compare_exchange_strong(&pool->process, &before, -1)) {
            make_locks(pool);
            pool->started = 0;
            pool->tried = false;
            atomic_store(&pool->state, 0);
            atomic_store(&pool->sleeping, false);
            atomic_store(&pool->caller_waits, false);
            atomic_store(&pool->process, now);
            return;
        }
        pause_briefly();
        before = atomic_load(&pool->process);
    }
}

/* Workers take no signals: those are for the program's own threads.  Where the system gives fewer
 * threads than asked for, the pool works with those it got. */
static void start_workers(qllm_threads *pool)
{
    sigset_t all, old;
    pthread_attr_t attributes;
    pool->tried = true;
    if (pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (int i = 1; i < pool->count; i++) {
        pool->workers[i].pool = pool;
        pool->workers[i].index = i;
        if (pthread_create(&pool->workers[i].thread, &attributes, worker_main,
                           &pool->workers[i]) != 0)
            break;
        pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
}

void qllm_threads_run(qllm_threads *threads, int64_t n,
                      void (*work)(void *context, int64_t begin, int64_t end, int thread),
                      void *context)
{
    if (n <= 0)
        return;
    if (threads->count == 1 || n == 1) {
        work(context, 0, n, 0);
        return;
    }
    notice_fork(threads);
    pthread_mutex_lock(&threads->turn);
    if (!threads->tried)
        start_workers(threads);
    threads->job = (job){n, work, context, threads->started + 1};
    for (int i = 0; i <= threads->started; i++)
        atomic_store_explicit(&threads->workers[i].next, 0, memory_order_relaxed);
    if (threads->started > 0)
        start_generation(threads, JOB_OPEN);
    run_parts(threads, 0);
    if (threads->started > 0)
        close_job(threads);
    pthread_mutex_unlock(&threads->turn);
}

void qllm_threads_destroy(qllm_threads *threads)
{
    if (threads == NULL)
        return;
    notice_fork(threads);
    atomic_store(&threads->stop, true);
    start_generation(threads, 0);
    for (int i = 1; i <= threads->started; i++)
        pthread_join(threads->workers[i].thread, NULL);
    pthread_mutex_destroy(&threads->turn);
    pthread_mutex_destroy(&threads->lock);
    pthread_cond_destroy(&threads->wake);
    pthread_cond_destroy(&threads->done);
    qllm_free(threads->workers);
    qllm_free(threads);
}
