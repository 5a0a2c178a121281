#include "core/backend.h"

#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

static _Atomic(const qllm_backend *) entries[QLLM_BACKEND_CAPACITY];

const qllm_backend *qllm_backend_at(int index)
{
    return index >= 0 && index < QLLM_BACKEND_CAPACITY ? atomic_load(&entries[index]) : NULL;
}

qllm_status qllm_backend_register(const qllm_backend *backend, qllm_error *error)
{
    if (backend->abi != QLLM_BACKEND_ABI)
        return qllm_fail(error, QLLM_UNSUPPORTED, "device '%s' was built for ABI %d of the device "
                         "table, this build has ABI %d; build both from the same sources",
                         backend->name, backend->abi, QLLM_BACKEND_ABI);
    for (int i = 0; i < QLLM_BACKEND_CAPACITY; i++) {
        const qllm_backend *found = NULL;
        if (atomic_compare_exchange_strong(&entries[i], &found, backend) || found == backend)
            return QLLM_OK;
        if (strcmp(found->name, backend->name) == 0)
            return qllm_fail(error, QLLM_VALUE, "device '%s' is registered already", backend->name);
    }
    return qllm_fail(error, QLLM_VALUE, "device '%s': at most %d devices can be registered",
                     backend->name, QLLM_BACKEND_CAPACITY);
}

static void list_names(char *text, size_t capacity)
{
    size_t length = 0;
    text[0] = '\0';
    for (int i = 0; qllm_backend_at(i) != NULL && length < capacity; i++) {
        qllm_format_text(text + length, capacity - length, "%s%s", i > 0 ? ", " : "",
                         qllm_backend_at(i)->name);
        length += strlen(text + length);
    }
}

qllm_status qllm_backend_find(const char *name, const qllm_backend **out, qllm_error *error)
{
    char names[128];
    *out = NULL;
    for (int i = 0; qllm_backend_at(i) != NULL; i++)
        if (strcmp(qllm_backend_at(i)->name, name) == 0) {
            *out = qllm_backend_at(i);
            return QLLM_OK;
        }
    list_names(names, sizeof names);
    return qllm_fail(error, QLLM_UNSUPPORTED, "device '%s' is not offered by this build; use one "
                     "of: %s", name, names);
}
