#define _POSIX_C_SOURCE 200809L /* clock_gettime, pthread_sigmask */
#include "cpu/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/alloc.h"
#include "cpu/processors.h"

/* How a pool stays out of everybody's way.  Measured on two virtual processors of a Zen 4 server
 * under Linux 6.18, with jobs of 16 to 80 us:
 *
 * A worker that sleeps is often woken on the core where the caller runs, and stays there behind it:
 * the pool is then slower than one thread, for seconds.  A worker that is pinned to one core is in
 * the same place when the caller, whom nobody pins, moves there, and it cannot go elsewhere when
 * another process takes its core.  So workers are kept off one core only, that of the caller, and
 * the system places them on the others: on two cores that is pinning, on many it leaves room for
 * other processes with the same mask.
 *
 * When another process shares a worker's core, the worker loses it in turns of some milliseconds,
 * mostly in the middle of a chunk, and everybody waits.  A worker therefore offers the core
 * (sched_yield) every half millisecond between two jobs, where nobody waits for it: with a busy
 * process beside it a step took 10 ms, without the offer 15, on one thread alone 13.
 *
 * When two Python threads run two models, each with a pool, four threads are on two cores, and both
 * models run at two thirds of the speed of one thread.  So the jobs that are under way in this
 * process share the processors: each uses its part of the threads, and for a millisecond after, so
 * that workers do not fall asleep and wake between two jobs of the other. */
enum {
    SPIN_NANOSECONDS = 200000,   /* a worker then sleeps; see wait_for_job */
    CALLER_NANOSECONDS = 50000,  /* the caller's, for workers that finish their last chunk */
    OFFER_NANOSECONDS = 500000,
    NARROW_NANOSECONDS = 1000000,
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
    pthread_mutex_t lock;    /* guards falling asleep and waking */
    pthread_cond_t wake;
    _Atomic bool asleep;
    _Alignas(LINE_BYTES) _Atomic int64_t next; /* chunk of the part that nobody has taken yet */
    _Atomic bool inside;     /* it may touch the job */
} worker;

/* The state of a pool in one number: generation << 32 | open << 31 | width.  The generation grows
 * by one with each job, which is for the first `width` threads.  A worker says that it is inside
 * and then looks whether the job is open; the caller closes the job and then looks who is inside:
 * one of them always sees the other.  A worker that comes late finds the job closed and touches
 * nothing of it; the caller waits for nobody but those inside. */
enum { GENERATION_SHIFT = 32 };
static const uint64_t JOB_OPEN = (uint64_t)1 << 31;

struct qllm_threads {
    int count;                  /* the caller included */
    qllm_team team;             /* its functions are NULL for a pool with threads of its own */
    int usable;                 /* processors that the jobs of this process share */
    worker *workers;            /* (count) */
    int started;                /* how many of them run, without the caller */
    bool tried;                 /* the workers have been started, or some could not be */
    _Atomic int process;        /* number of forks when the state below was made; -1 while remade */
    pthread_mutex_t turn;       /* one job at a time; guards what follows up to `job` */
    int width;                  /* threads that work at present */
    int64_t narrow_until;
    qllm_affinity mask;         /* where the workers were placed, and the core they were kept off */
    int core;
    job job;                    /* written while closed and nobody is inside */
    _Atomic uint64_t state;
    _Atomic bool stop;
    pthread_mutex_t lock;       /* for the caller that waits for workers inside */
    pthread_cond_t done;
    _Atomic bool caller_waits;
};

/* Jobs under way in this process, of all pools. */
static _Atomic int jobs_running = 0;

/* Forks that led to this process.  A child has none of its parent's threads, and its copies of
 * their locks may be held by nobody; the pool compares this number and starts afresh. */
static _Atomic int forks = 0;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void count_fork(void)
{
    atomic_fetch_add(&forks, 1);
    atomic_store(&jobs_running, 0); /* those were of threads that are not here */
}

static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, count_fork);
}

int qllm_threads_available(void)
{
    qllm_processors processors;
    qllm_processors_get(&processors);
    return qllm_processors_usable(&processors);
}

int qllm_threads_default(void)
{
    qllm_processors processors;
    qllm_processors_get(&processors);
    return qllm_processors_default(&processors);
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
                         "threads from 1 to 999999999, or leave it unset to use one per core, %d "
                         "here", text, qllm_threads_default());
    *n = (int)value;
    return QLLM_OK;
}

qllm_status qllm_threads_resolve(int n, int *count, qllm_error *error)
{
    if (n < 0)
        return qllm_fail(error, QLLM_VALUE, "threads is %d; expected 1 or more, or 0 to use one "
                         "per core, %d here", n, qllm_threads_default());
    if (n == 0 && threads_from_environment(&n, error) != QLLM_OK)
        return QLLM_VALUE;
    int most = n == 0 ? qllm_threads_default() : qllm_threads_available();
    *count = n == 0 || n > most ? most : n;
    return QLLM_OK;
}

static void make_locks(qllm_threads *pool)
{
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (int i = 0; i < pool->count; i++) {
        pthread_mutex_init(&pool->workers[i].lock, NULL);
        pthread_cond_init(&pool->workers[i].wake, NULL);
    }
}

static void destroy_locks(qllm_threads *pool)
{
    for (int i = 0; i < pool->count; i++) {
        pthread_mutex_destroy(&pool->workers[i].lock);
        pthread_cond_destroy(&pool->workers[i].wake);
    }
    pthread_mutex_destroy(&pool->turn);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->done);
}

static qllm_status create(int n, qllm_threads **out, qllm_error *error)
{
    void *memory;
    *out = NULL;
    qllm_status status = qllm_alloc(&memory, 1, sizeof(qllm_threads), "a thread pool", error);
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
    pool->count = pool->width = n;
    pool->usable = qllm_threads_available();
    pool->core = -1;
    atomic_init(&pool->process, atomic_load(&forks));
    make_locks(pool);
    *out = pool;
    return QLLM_OK;
}

qllm_status qllm_threads_create(int n, qllm_threads **out, qllm_error *error)
{
    *out = NULL;
    qllm_status status = qllm_threads_resolve(n, &n, error);
    return status == QLLM_OK ? create(n, out, error) : status;
}

qllm_status qllm_threads_create_in(const qllm_team *team, int n, qllm_threads **out,
                                   qllm_error *error)
{
    qllm_status status = create(n, out, error);
    if (status == QLLM_OK)
        (*out)->team = *team;
    return status;
}

int qllm_threads_count(const qllm_threads *threads)
{
    return threads->count;
}

const qllm_team *qllm_threads_team(const qllm_threads *threads)
{
    return threads->team.parallel != NULL ? &threads->team : NULL;
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

/* ------------------------------------------------------------------------------------- workers */

static uint32_t generation(uint64_t state)
{
    return (uint32_t)(state >> GENERATION_SHIFT);
}

static int width_of(uint64_t state)
{
    return (int)(state & (JOB_OPEN - 1));
}

static bool is_called(const worker *self, uint64_t state, uint32_t seen)
{
    return generation(state) != seen && self->index < width_of(state);
}

/* The caller changes the generation before it looks who sleeps, and a worker says that it sleeps
 * before it looks at the generation, so one of them always sees the other. */
static void wake(worker *sleeper)
{
    if (!atomic_load(&sleeper->asleep))
        return;
    pthread_mutex_lock(&sleeper->lock);
    pthread_cond_signal(&sleeper->wake);
    pthread_mutex_unlock(&sleeper->lock);
}

/* Waking takes some microseconds of the thread that does it, so every one wakes two. */
static void wake_next(qllm_threads *pool, int index, int width)
{
    for (int i = 2 * index + 1; i <= 2 * index + 2 && i < width; i++)
        wake(&pool->workers[i]);
}

static void sleep_until_called(worker *self, uint32_t seen)
{
    pthread_mutex_lock(&self->lock);
    atomic_store(&self->asleep, true);
    while (!is_called(self, atomic_load(&self->pool->state), seen))
        pthread_cond_wait(&self->wake, &self->lock);
    atomic_store(&self->asleep, false);
    pthread_mutex_unlock(&self->lock);
}

/* Spins for as long as a program takes between two tokens (sampling, text, the interpreter), since
 * to wake costs 30 to 100 us; then sleeps.  Sleeps at once when a job begins without this worker:
 * others need the core.  *offered is when it last offered the core to others. */
static void wait_for_job(worker *self, uint32_t seen, int64_t *offered)
{
    int64_t now = nanoseconds(), limit = now + SPIN_NANOSECONDS;
    do {
        if (now - *offered > OFFER_NANOSECONDS) {
            sched_yield();
            *offered = now = nanoseconds();
        }
        for (int i = 0; i < 32; i++) {
            uint64_t state = atomic_load_explicit(&self->pool->state, memory_order_acquire);
            if (generation(state) != seen) {
                if (!is_called(self, state, seen))
                    sleep_until_called(self, seen);
                return;
            }
            pause_briefly();
        }
        now = nanoseconds();
    } while (now < limit);
    sleep_until_called(self, seen);
    *offered = nanoseconds();
}

/* Does its share of the job if it is still open; returns the generation that it has seen. */
static uint32_t join_job(worker *self)
{
    qllm_threads *pool = self->pool;
    atomic_store(&self->inside, true);
    uint64_t state = atomic_load(&pool->state);
    if ((state & JOB_OPEN) != 0 && self->index < width_of(state)) {
        wake_next(pool, self->index, width_of(state));
        run_parts(pool, self->index);
    }
    atomic_store(&self->inside, false);
    if (atomic_load(&pool->caller_waits)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->lock);
    }
    return generation(state);
}

static void *worker_main(void *argument)
{
    worker *self = argument;
    uint32_t seen = 0; /* the pool started its workers before its first job */
    int64_t offered = nanoseconds();
    do {
        wait_for_job(self, seen, &offered);
        seen = join_job(self); /* perhaps the last generation, after one that it came late for */
    } while (!atomic_load(&self->pool->stop));
    return NULL;
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

/* ---------------------------------------------------------------------------------- the caller */

/* Follows the caller: its core when it has moved to another, and its affinity mask, looked at where
 * that costs little: before workers are woken, and while the mask leaves room for fewer threads
 * than there are. */
static void place_workers(qllm_threads *pool)
{
    int core = qllm_processors_core();
    bool look = core != pool->core || (pool->mask.count > 0 && pool->mask.count < pool->count);
    qllm_affinity mask;
    for (int i = 1; i <= pool->started && !look; i++)
        look = atomic_load_explicit(&pool->workers[i].asleep, memory_order_relaxed);
    if (!look)
        return;
    qllm_affinity_get(&mask);
    bool same = core == pool->core && memcmp(&mask, &pool->mask, sizeof mask) == 0;
    pool->mask = mask;
    pool->core = core;
    for (int i = 1; i <= pool->started && !same && mask.count > 0; i++)
        qllm_affinity_keep_off(pool->workers[i].thread, &mask, core);
}

/* How many threads the next job is for, with so many jobs under way in this process. */
static int choose_width(qllm_threads *pool, int jobs)
{
    int most = pool->started + 1, share = pool->usable / jobs;
    if (pool->mask.count > 0 && pool->mask.count < most)
        most = pool->mask.count;
    if (share < 1)
        share = 1;
    if (share < most) {
        if (share < pool->width || pool->width > most)
            pool->width = share;
        pool->narrow_until = nanoseconds() + NARROW_NANOSECONDS;
    } else if (pool->width != most && (pool->width > most || nanoseconds() > pool->narrow_until)) {
        pool->width = most;
    }
    return pool->width;
}

/* The next generation, when nobody is inside: an open job or, at the end of the pool, none. */
static void start_generation(qllm_threads *pool, int width, uint64_t open)
{
    uint64_t next = (uint64_t)(generation(atomic_load(&pool->state)) + 1u) << GENERATION_SHIFT;
    atomic_store(&pool->state, next | open | (uint64_t)width);
    wake_next(pool, 0, width);
}

static bool nobody_inside(qllm_threads *pool)
{
    for (int i = 1; i <= pool->started; i++)
        if (atomic_load(&pool->workers[i].inside))
            return false;
    return true;
}

static void close_job(qllm_threads *pool)
{
    atomic_fetch_and(&pool->state, ~JOB_OPEN);
    if (nobody_inside(pool))
        return;
    int64_t limit = nanoseconds() + CALLER_NANOSECONDS;
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
            pool->core = -1;
            pool->width = pool->count;
            for (int i = 0; i < pool->count; i++) {
                atomic_store(&pool->workers[i].asleep, false);
                atomic_store(&pool->workers[i].inside, false);
            }
            atomic_store(&pool->state, 0);
            atomic_store(&pool->caller_waits, false);
            atomic_store(&pool->process, now);
            return;
        }
        pause_briefly();
        before = atomic_load(&pool->process);
    }
}

/* False: another job of this pool is under way, and there is one processor for each job. */
static bool take_turn(qllm_threads *pool, int jobs)
{
    if (pthread_mutex_trylock(&pool->turn) == 0)
        return true;
    if (pool->usable / jobs <= 1)
        return false;
    pthread_mutex_lock(&pool->turn);
    return true;
}

static void prepare_parts(qllm_threads *pool, const job *job, int parts)
{
    pool->job = *job;
    pool->job.parts = parts;
    for (int i = 0; i < parts; i++)
        atomic_store_explicit(&pool->workers[i].next, 0, memory_order_relaxed);
}

static void work_in_team(void *data)
{
    qllm_threads *pool = data;
    int thread = pool->team.thread_num();
    if (thread < pool->job.parts)
        run_parts(pool, thread);
}

static void run_job_in_team(qllm_threads *pool, const job *job)
{
    int threads = pool->team.max_threads();
    if (threads <= 1 || atomic_load(&pool->process) != atomic_load(&forks)) {
        job->work(job->context, 0, job->n, 0);
        return;
    }
    prepare_parts(pool, job, threads < pool->count ? threads : pool->count);
    pool->team.parallel(work_in_team, pool, (unsigned)threads, 0);
}

static void run_job(qllm_threads *pool, const job *job, int jobs)
{
    if (!pool->tried)
        start_workers(pool);
    place_workers(pool);
    int width = choose_width(pool, jobs);
    if (width == 1) {
        job->work(job->context, 0, job->n, 0);
        return;
    }
    prepare_parts(pool, job, width);
    start_generation(pool, width, JOB_OPEN);
    run_parts(pool, 0);
    close_job(pool);
}

void qllm_threads_run(qllm_threads *threads, int64_t n,
                      void (*work)(void *context, int64_t begin, int64_t end, int thread),
                      void *context)
{
    const job job = {n, work, context, 1};
    if (n <= 0)
        return;
    if (qllm_threads_team(threads) == NULL)
        notice_fork(threads);
    int jobs = atomic_fetch_add(&jobs_running, 1) + 1;
    if (threads->count > 1 && n > 1 && take_turn(threads, jobs)) {
        if (qllm_threads_team(threads) != NULL)
            run_job_in_team(threads, &job);
        else
            run_job(threads, &job, jobs);
        pthread_mutex_unlock(&threads->turn);
    } else {
        work(context, 0, n, 0);
    }
    atomic_fetch_sub(&jobs_running, 1);
}

void qllm_threads_destroy(qllm_threads *threads)
{
    if (threads == NULL)
        return;
    notice_fork(threads);
    atomic_store(&threads->stop, true);
    start_generation(threads, threads->count, 0);
    for (int i = 1; i <= threads->started; i++) {
        wake(&threads->workers[i]);
        pthread_join(threads->workers[i].thread, NULL);
    }
    destroy_locks(threads);
    qllm_free(threads->workers);
    qllm_free(threads);
}
