/* What this machine can do at most, measured with what the kernels use: a plain read loop over
 * memory, which decode cannot outrun, and multiply-adds in registers alone, which prefill cannot.
 * Both give a value that depends on all the work, so that none of it can be left out. */
#ifndef QLLM_CPU_LIMITS_H
#define QLLM_CPU_LIMITS_H

#include <stdint.h>

#include "cpu/features.h"
#include "cpu/threads.h"

enum { QLLM_READ_PAGE = 4096 }; /* the read loop takes whole pages */

/* The units that multiply: float32, pairs of int16, quadruples of int8 (signed by unsigned), pairs
 * of bfloat16. */
typedef enum qllm_unit {
    QLLM_UNIT_F32 = 0,
    QLLM_UNIT_INT16 = 1,
    QLLM_UNIT_INT8 = 2,
    QLLM_UNIT_BF16 = 3,
    QLLM_UNIT_COUNT = 4
} qllm_unit;

typedef struct qllm_limits {
    const char *name;
    /* The exclusive or of all 64-bit words of `bytes` bytes, a multiple of QLLM_READ_PAGE. */
    uint64_t (*read)(const uint8_t *data, int64_t bytes);
    /* Multiplies ones and adds them up, `turns` (at most QLLM_TURNS_MAX) times in every register
     * of sums: the sum of all lanes, which is the number of multiply-adds done. */
    int64_t (*multiply)(qllm_unit unit, int64_t turns);
    const char *instruction[QLLM_UNIT_COUNT]; /* NULL: the set has none */
} qllm_limits;

enum { QLLM_TURNS_MAX = 1 << 20 }; /* sums of ones stay exact in float32 */

/* The table of a supported set. */
const qllm_limits *qllm_limits_get(qllm_isa isa);

const char *qllm_unit_name(qllm_unit unit); /* "f32", "int16", "int8", "bf16" */

/* The instruction of a unit, or NULL where the set or this machine has none. */
const char *qllm_limits_instruction(const qllm_limits *limits, qllm_unit unit);

/* `read` of the whole range, one contiguous part per thread of the pool. */
uint64_t qllm_read_limit(qllm_threads *threads, const qllm_limits *limits, const uint8_t *data,
                         int64_t bytes);

/* `multiply` with `turns` (at most 2^40) on every thread of the pool: multiply-adds in all. */
int64_t qllm_multiply_limit(qllm_threads *threads, const qllm_limits *limits, qllm_unit unit,
                            int64_t turns);

#endif
