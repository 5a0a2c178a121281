/* _pretend_cores, _processors, _threads_cover: pools and processors, for the tests. */
#include "python/py_cpu.h"

#include <stdatomic.h>

#include "core/alloc.h"
#include "cpu/processors.h"
#include "python/py_quant.h"

enum { MOST_CORES = 4096 };

static PyObject *pretend_cores(PyObject *module, PyObject *object)
{
    const qllm_state *state = qllm_state_of(module);
    int64_t n;
    if (qllm_parse_int64(state, object, "n", &n) < 0)
        return NULL;
    if (n < 0 || n > MOST_CORES)
        return qllm_raise_value(state, "n: %lld was given; expected 0 to %d", (long long)n,
                                MOST_CORES);
    qllm_processors_pretend((int)n);
    Py_RETURN_NONE;
}

static PyObject *processors(PyObject *module, PyObject *root)
{
    qllm_processors found;
    const char *path = PyUnicode_AsUTF8(root);
    (void)module;
    if (path == NULL)
        return NULL;
    qllm_processors_read(path, &found);
    return Py_BuildValue("{s:i,s:i,s:i,s:i,s:i}", "logical", found.logical, "cores", found.cores,
                         "quota", found.quota, "threads_available", qllm_processors_usable(&found),
                         "threads_default", qllm_processors_default(&found));
}

/* Counts how often each item was worked on, and by which threads. */
typedef struct cover {
    uint8_t *times; /* (n) */
    int threads;
    _Atomic int64_t *calls; /* (threads) */
    _Atomic int strays;     /* calls with a thread number or a range that is none */
    int64_t n;
} cover;

static void count_items(void *context, int64_t begin, int64_t end, int thread)
{
    cover *c = context;
    if (thread < 0 || thread >= c->threads || begin < 0 || begin >= end || end > c->n) {
        atomic_fetch_add(&c->strays, 1);
        return;
    }
    for (int64_t i = begin; i < end; i++)
        c->times[i]++;
    atomic_fetch_add(&c->calls[thread], 1);
}

/* One pool, `rounds` jobs; *wrong counts items that some job did not do exactly once. */
static qllm_status run_cover(int threads, int64_t n, int64_t rounds, cover *c, int64_t *wrong,
                             qllm_error *error)
{
    void *times = NULL, *calls = NULL;
    qllm_threads *pool = NULL;
    qllm_status status = qllm_threads_create(threads, &pool, error);
    if (status != QLLM_OK)
        return status;
    *c = (cover){.threads = qllm_threads_count(pool), .n = n};
    status = qllm_alloc(&times, n, 1, "the items of a job", error);
    if (status == QLLM_OK)
        status = qllm_alloc(&calls, c->threads, sizeof *c->calls, "the calls of a job", error);
    c->times = times;
    c->calls = calls;
    *wrong = 0;
    for (int64_t round = 0; status == QLLM_OK && round < rounds; round++) {
        qllm_threads_run(pool, n, count_items, c);
        for (int64_t i = 0; i < n; i++)
            *wrong += c->times[i] != (uint8_t)(round + 1);
    }
    qllm_threads_destroy(pool);
    return status;
}

static PyObject *cover_result(const cover *c, int64_t wrong)
{
    PyObject *calls = PyList_New(0);
    for (int i = 0; calls != NULL && i < c->threads; i++) {
        PyObject *number = PyLong_FromLongLong(atomic_load(&c->calls[i]));
        if (number == NULL || PyList_Append(calls, number) < 0)
            Py_CLEAR(calls);
        Py_XDECREF(number);
    }
    return Py_BuildValue("LiN", (long long)wrong, atomic_load(&c->strays), calls);
}

static PyObject *threads_cover(PyObject *module, PyObject *args)
{
    const qllm_state *state = qllm_state_of(module);
    long long n, rounds;
    int64_t wrong;
    int threads;
    cover c = {0};
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTuple(args, "iLL:_threads_cover", &threads, &n, &rounds))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = run_cover(threads, n, rounds, &c, &wrong, &error);
    Py_END_ALLOW_THREADS
    PyObject *result = status == QLLM_OK ? cover_result(&c, wrong) : qllm_raise(state, &error);
    qllm_free(c.times);
    qllm_free((void *)c.calls);
    return result;
}

static PyMethodDef functions[] = {
    {"_pretend_cores", pretend_cores, METH_O,
     "_pretend_cores($module, n, /)\n--\n\n"
     "Take the machine for one of n cores, in pools made from now on; 0 for the real one."},
    {"_processors", processors, METH_O,
     "_processors($module, root, /)\n--\n\n"
     "The numbers of cpu_info, with /proc and /sys looked for below a folder."},
    {"_threads_cover", threads_cover, METH_VARARGS,
     "_threads_cover($module, threads, n, rounds, /)\n--\n\n"
     "Jobs of n items on a pool of its own: (items that a job did not do exactly once, calls with\n"
     "a wrong thread or range, calls of each thread)."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_threads_test(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
