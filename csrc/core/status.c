#include "core/status.h"

#include <stdarg.h>
#include <stdio.h> /* vsnprintf: the only use of stdio in the core */

qllm_status qllm_fail(qllm_error *error, qllm_status status, const char *format, ...)
{
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        error->status = status;
        vsnprintf(error->text, sizeof error->text, format, arguments);
        va_end(arguments);
    }
    return status;
}

void qllm_format_text(char *out, size_t capacity, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(out, capacity, format, arguments);
    va_end(arguments);
}
