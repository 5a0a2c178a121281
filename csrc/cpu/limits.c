#include "cpu/limits.h"

#include <stdatomic.h>
#include <stddef.h>

#include "cpu/limits_tables.h"

enum { PIECE_TURNS = 1 << 12 }; /* some 10 to 50 microseconds of multiplying */

const qllm_limits *qllm_limits_get(qllm_isa isa)
{
#if defined(__x86_64__)
    if (isa == QLLM_ISA_AVX512_AMX)
        return &qllm_limits_avx512amx;
    if (isa >= QLLM_ISA_AVX512)
        return &qllm_limits_avx512;
    if (isa == QLLM_ISA_AVX2)
        return &qllm_limits_avx2;
#elif defined(__aarch64__)
    if (isa == QLLM_ISA_NEONDOT)
        return &qllm_limits_neondot;
    if (isa == QLLM_ISA_NEON)
        return &qllm_limits_neon;
#else
    (void)isa; /* the compiler's own vectors */
#endif
    return &qllm_limits_scalar;
}

const char *qllm_unit_name(qllm_unit unit)
{
    static const char *const names[QLLM_UNIT_COUNT] = {"f32", "int16", "int8", "bf16"};
    return names[unit];
}

const char *qllm_limits_instruction(const qllm_limits *limits, qllm_unit unit)
{
    if (unit == QLLM_UNIT_BF16 && !qllm_cpu_features_get()->avx512bf16)
        return NULL;
    return limits->instruction[unit];
}

typedef struct read_job {
    const qllm_limits *limits;
    const uint8_t *data;
    _Atomic uint64_t sum;
} read_job;

static void read_pages(void *context, int64_t begin, int64_t end, int thread)
{
    read_job *job = context;
    (void)thread;
    uint64_t sum = job->limits->read(job->data + begin * QLLM_READ_PAGE,
                                     (end - begin) * QLLM_READ_PAGE);
    atomic_fetch_xor(&job->sum, sum);
}

uint64_t qllm_read_limit(qllm_threads *threads, const qllm_limits *limits, const uint8_t *data,
                         int64_t bytes)
{
    read_job job = {.limits = limits, .data = data};
    atomic_init(&job.sum, 0);
    qllm_threads_run(threads, bytes / QLLM_READ_PAGE, read_pages, &job);
    return atomic_load(&job.sum);
}

typedef struct multiply_job {
    const qllm_limits *limits;
    qllm_unit unit;
    int64_t pieces, turns; /* on every thread */
    _Atomic int64_t done;
} multiply_job;

/* Item i is piece i % pieces of one thread's turns. */
static void multiply_pieces(void *context, int64_t begin, int64_t end, int thread)
{
    multiply_job *job = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        int64_t left = job->turns - i % job->pieces * PIECE_TURNS;
        int64_t turns = left < PIECE_TURNS ? left : PIECE_TURNS;
        atomic_fetch_add(&job->done, job->limits->multiply(job->unit, turns));
    }
}

int64_t qllm_multiply_limit(qllm_threads *threads, const qllm_limits *limits, qllm_unit unit,
                            int64_t turns)
{
    int64_t pieces = (turns + PIECE_TURNS - 1) / PIECE_TURNS;
    multiply_job job = {.limits = limits, .unit = unit, .pieces = pieces, .turns = turns};
    atomic_init(&job.done, 0);
    qllm_threads_run(threads, pieces * qllm_threads_count(threads), multiply_pieces, &job);
    return atomic_load(&job.done);
}
