/* limit_buffer, read_limit, multiply_units, multiply_limit: what this machine can do at most. */
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "cpu/limits.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"

static void free_buffer(PyObject *capsule)
{
    qllm_free(PyCapsule_GetPointer(capsule, NULL));
}

/* No two neighbouring words are equal, and no page is all zeros. */
static void fill_words(uint64_t *words, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        words[i] = (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
}

static PyObject *py_limit_buffer(PyObject *module, PyObject *object)
{
    const qllm_state *state = qllm_state_of(module);
    int64_t bytes = 0;
    void *memory;
    qllm_error error;
    qllm_status status;
    if (qllm_to_int64(state, object, "nbytes", &bytes) < 0)
        return NULL;
    if (bytes < 1 || !qllm_checked_round_up(bytes, QLLM_READ_PAGE, &bytes))
        return qllm_raise_value(state, "nbytes: %lld was given; expected 1 or more",
                                (long long)bytes);
    Py_BEGIN_ALLOW_THREADS
    status = qllm_alloc_large(&memory, bytes, 1, "a buffer to read", &error);
    if (status == QLLM_OK)
        fill_words(memory, bytes / 8);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    PyObject *owner = PyCapsule_New(memory, NULL, free_buffer);
    if (owner == NULL) {
        qllm_free(memory);
        return NULL;
    }
    PyObject *view = qllm_array_view(owner, QLLM_ARRAY_U8, 1, &bytes, memory);
    Py_DECREF(owner);
    return view;
}

/* The threads= of a call: None stands for QLLM_THREADS or all. */
static qllm_threads *parse_pool(qllm_state *state, PyObject *object)
{
    int64_t n = 0;
    if (object != Py_None && qllm_to_int64(state, object, "threads", &n) < 0)
        return NULL;
    if (object != Py_None && n < 1) {
        qllm_raise_value(state, "threads: %lld was given; expected 1 or more, or None for all",
                         (long long)n);
        return NULL;
    }
    return qllm_shared_threads(state, n < 1000000 ? (int)n : 1000000);
}

static int check_range(const qllm_state *state, int64_t begin, int64_t bytes, int64_t size)
{
    if (begin >= 0 && bytes >= 0 && begin % QLLM_READ_PAGE == 0 && bytes % QLLM_READ_PAGE == 0 &&
        begin <= size && bytes <= size - begin)
        return 0;
    qllm_raise_value(state, "begin and nbytes: %lld and %lld were given; expected multiples of %d "
                     "inside the %lld bytes of the buffer", (long long)begin, (long long)bytes,
                     QLLM_READ_PAGE, (long long)size);
    return -1;
}

static PyObject *py_read_limit(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "begin", "nbytes", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *object, *threads_object = Py_None;
    const char *isa_name = NULL;
    long long begin, bytes;
    uint64_t sum = 0;
    qllm_isa isa;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLL|$zO:read_limit", names, &object, &begin,
                                     &bytes, &isa_name, &threads_object) ||
        qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    PyObject *buffer = qllm_array_input(state, object, QLLM_ARRAY_U8, 1, 1, "buffer");
    if (buffer == NULL)
        return NULL;
    int ok = check_range(state, begin, bytes, qllm_array_size(buffer)) == 0;
    qllm_threads *threads = ok ? parse_pool(state, threads_object) : NULL;
    if (threads != NULL) {
        const uint8_t *data = (const uint8_t *)qllm_array_data(buffer) + begin;
        Py_BEGIN_ALLOW_THREADS
        sum = qllm_read_limit(threads, qllm_limits_get(isa), data, bytes);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(buffer);
    return threads != NULL ? PyLong_FromUnsignedLongLong(sum) : NULL;
}

static PyObject *py_multiply_units(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"isa", NULL};
    const qllm_state *state = qllm_state_of(module);
    const char *isa_name = NULL;
    qllm_isa isa;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$z:multiply_units", names, &isa_name) ||
        qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    PyObject *units = PyDict_New();
    for (int i = 0; units != NULL && i < QLLM_UNIT_COUNT; i++) {
        const char *text = qllm_limits_instruction(qllm_limits_get(isa), (qllm_unit)i);
        PyObject *value = text != NULL ? PyUnicode_FromString(text) : NULL;
        if (text != NULL && (value == NULL ||
                             PyDict_SetItemString(units, qllm_unit_name((qllm_unit)i), value) < 0))
            Py_CLEAR(units);
        Py_XDECREF(value);
    }
    return units;
}

static int parse_unit(const qllm_state *state, const qllm_limits *limits, const char *text,
                      qllm_unit *unit)
{
    char list[64] = "";
    for (int i = 0; i < QLLM_UNIT_COUNT; i++) {
        const char *name = qllm_unit_name((qllm_unit)i);
        if (qllm_limits_instruction(limits, (qllm_unit)i) == NULL)
            continue;
        *unit = (qllm_unit)i;
        if (strcmp(name, text) == 0)
            return 0;
        char before[sizeof list];
        memcpy(before, list, sizeof list);
        qllm_format_text(list, sizeof list, "%s%s%s", before, before[0] ? ", " : "", name);
    }
    qllm_raise_value(state, "unit: '%.20s' was given; instruction set %s multiplies in %s here",
                     text, limits->name, list);
    return -1;
}

static PyObject *py_multiply_limit(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"unit", "turns", "isa", "threads", NULL};
    const long long most = 1LL << 40;
    qllm_state *state = qllm_state_of(module);
    PyObject *threads_object = Py_None;
    const char *isa_name = NULL, *unit_name;
    long long turns;
    int64_t done = 0;
    qllm_unit unit = QLLM_UNIT_F32;
    qllm_isa isa;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sL|$zO:multiply_limit", names, &unit_name,
                                     &turns, &isa_name, &threads_object) ||
        qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    const qllm_limits *limits = qllm_limits_get(isa);
    if (parse_unit(state, limits, unit_name, &unit) < 0)
        return NULL;
    if (turns < 1 || turns > most)
        return qllm_raise_value(state, "turns: %lld was given; expected 1 to %lld", turns, most);
    qllm_threads *threads = parse_pool(state, threads_object);
    if (threads == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = qllm_multiply_limit(threads, limits, unit, turns);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(done);
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"limit_buffer", py_limit_buffer, METH_O,
     "limit_buffer($module, nbytes, /)\n--\n\n"
     "At least nbytes of memory, a multiple of 4096, on huge pages where there are any: uint8\n"
     "(n,), read-only, none of its words zero.  For read_limit."},
    {"read_limit", (PyCFunction)(void (*)(void))py_read_limit, KEYWORDS,
     "read_limit($module, buffer, begin, nbytes, *, isa=None, threads=None)\n--\n\n"
     "Reads nbytes of a uint8 array from `begin` on, multiples of 4096, one contiguous part per\n"
     "thread: the exclusive or of its 64-bit words."},
    {"multiply_units", (PyCFunction)(void (*)(void))py_multiply_units, KEYWORDS,
     "multiply_units($module, *, isa=None)\n--\n\n"
     "The units that multiply in an instruction set on this machine, out of f32, int16, int8 and\n"
     "bf16, and the instruction of each."},
    {"multiply_limit", (PyCFunction)(void (*)(void))py_multiply_limit, KEYWORDS,
     "multiply_limit($module, unit, turns, *, isa=None, threads=None)\n--\n\n"
     "Multiplies and adds in registers alone, `turns` times in each on every thread: the number\n"
     "of multiply-adds that were done, counted by the sums themselves."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_limits(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
