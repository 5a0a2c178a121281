/* Result codes with a sentence.  Every function that can fail returns a qllm_status and, when it
 * fails, writes one sentence for the user into the qllm_error that the caller owns: what was wrong,
 * in which tensor or argument, found and expected numbers, what to do.  The library never prints,
 * exits or aborts. */
#ifndef QLLM_CORE_STATUS_H
#define QLLM_CORE_STATUS_H

#include <stddef.h>

typedef enum qllm_status {
    QLLM_OK = 0,
    QLLM_VALUE = 1,       /* a value, shape, dtype or option that cannot be used */
    QLLM_MEMORY = 2,      /* an allocation failed; nothing was changed */
    QLLM_UNSUPPORTED = 3, /* understood, but not offered by this build, machine or device */
    QLLM_INTERNAL = 4     /* a broken invariant of our own: please report it */
} qllm_status;

enum { QLLM_ERROR_CAPACITY = 512 };

typedef struct qllm_error {
    qllm_status status;
    char text[QLLM_ERROR_CAPACITY]; /* NUL-terminated UTF-8, cut to fit */
} qllm_error;

#if defined(__GNUC__) || defined(__clang__)
#define QLLM_PRINTF(format_index, first_argument) \
    __attribute__((format(printf, format_index, first_argument)))
#else
#define QLLM_PRINTF(format_index, first_argument)
#endif

/* Fills `error` (which may be NULL) and returns `status`, so that a failing function can end with
 * `return qllm_fail(error, QLLM_VALUE, "...", ...)`.  The format string is that of printf. */
qllm_status qllm_fail(qllm_error *error, qllm_status status, const char *format, ...)
    QLLM_PRINTF(3, 4);

/* Formats a text into out (capacity >= 1 bytes), cut to fit and always NUL-terminated. */
void qllm_format_text(char *out, size_t capacity, const char *format, ...) QLLM_PRINTF(3, 4);

#endif
