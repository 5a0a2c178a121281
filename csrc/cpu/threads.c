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
    STACK_BYTES = 1 << 20
};

typedef struct job {
    int64_t n;
    void (*work)(void *context, int64_t begin, int64_t end, int thread);
    void *context;
    int parts;
} job;

typedef struct worker {
    struct qllm_threads *pool;
    pthread_t thread;
    int index;
} worker;

struct qllm_threads {
    int count;                  /* the caller included */
    worker *workers;            /* (count - 1) */
    int started;                /* how many of them run */
    bool tried;                 /* the workers have been started, or some could not be */
    _Atomic int process;        /* number of forks when the state below was made; -1 while remade */
    pthread_mutex_t turn;       /* one job at a time */
    pthread_mutex_t lock;       /* guards sleeping and waking */
    pthread_cond_t wake, done;
    job job;
    _Atomic uint32_t generation; /* grows by one with each job */
    _Atomic int sleepers;        /* workers that wait for `wake` */
    _Atomic int pending;         /* workers that have not finished the job */
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
    status = qllm_alloc(&memory, n - 1, sizeof(worker), "the threads of a pool", error);
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

/* Part `part` of the job; parts are contiguous and differ by at most one item. */
static void run_part(const job *job, int part)
{
    int64_t each = job->n / job->parts, rest = job->n % job->parts;
    int64_t begin = part * each + (part < rest ? part : rest);
    int64_t end = begin + each + (part < rest ? 1 : 0);
    if (begin < end)
        job->work(job->context, begin, end, part);
}

static void spin_until_generation(qllm_threads *pool, uint32_t seen)
{
    int64_t limit = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen)
                return;
            pause_briefly();
        }
    } while (nanoseconds() < limit);
}

/* A sleeper counts itself before it looks at the generation, and the caller changes the generation
 * before it looks for sleepers, so one of them always sees the other. */
static void wait_for_job(qllm_threads *pool, uint32_t seen)
{
    spin_until_generation(pool, seen);
    if (atomic_load(&pool->generation) != seen)
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->generation) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    qllm_threads *pool = self->pool;
    for (uint32_t seen = 0;; seen++) { /* the pool started its workers before its first job */
        wait_for_job(pool, seen);
        if (atomic_load(&pool->stop))
            return NULL;
        run_part(&pool->job, self->index + 1);
        if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->caller_waits)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

static void start_job(qllm_threads *pool)
{
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers) == 0)
        return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static void wait_until_done(qllm_threads *pool)
{
    int64_t limit = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&pool->pending, memory_order_acquire) == 0)
                return;
            pause_briefly();
        }
    } while (nanoseconds() < limit);
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_waits, true);
    while (atomic_load(&pool->pending) != 0)
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
            atomic_store(&pool->generation, 0);
            atomic_store(&pool->sleepers, 0);
            atomic_store(&pool->pending, 0);
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
    for (int i = 0; i < pool->count - 1; i++) {
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
    if (threads->started > 0) {
        atomic_store(&threads->pending, threads->started);
        start_job(threads);
    }
    run_part(&threads->job, 0);
    if (threads->started > 0)
        wait_until_done(threads);
    pthread_mutex_unlock(&threads->turn);
}

void qllm_threads_destroy(qllm_threads *threads)
{
    if (threads == NULL)
        return;
    notice_fork(threads);
    atomic_store(&threads->stop, true);
    start_job(threads);
    for (int i = 0; i < threads->started; i++)
        pthread_join(threads->workers[i].thread, NULL);
    pthread_mutex_destroy(&threads->turn);
    pthread_mutex_destroy(&threads->lock);
    pthread_cond_destroy(&threads->wake);
    pthread_cond_destroy(&threads->done);
    qllm_free(threads->workers);
    qllm_free(threads);
}
