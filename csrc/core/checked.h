/* Overflow-safe sizes.  Every size, offset or count that depends on numbers from outside (a file, a
 * caller) is computed with these helpers and nowhere else.  Each returns false, and leaves *out
 * untouched, when the exact result does not fit or an operand is negative. */
#ifndef QLLM_CORE_CHECKED_H
#define QLLM_CORE_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool qllm_checked_add(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || a > INT64_MAX - b)
        return false;
    *out = a + b;
    return true;
}

static inline bool qllm_checked_mul(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || (b != 0 && a > INT64_MAX / b))
        return false;
    *out = a * b;
    return true;
}

/* ceil(a / b) for b > 0 */
static inline bool qllm_checked_ceil_div(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b <= 0)
        return false;
    *out = a / b + (a % b != 0);
    return true;
}

/* the smallest multiple of b that is at least a */
static inline bool qllm_checked_round_up(int64_t a, int64_t b, int64_t *out)
{
    int64_t blocks;
    return qllm_checked_ceil_div(a, b, &blocks) && qllm_checked_mul(blocks, b, out);
}

#endif
