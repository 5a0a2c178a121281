#include "python/arguments.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/sampler.h"
#include "python/array.h"
#include "python/py_cpu.h"

/* Between two looks for Ctrl-C a thread handles about so many logits; fewer than so many in all are
 * not worth a second thread. */
enum { WORK_BETWEEN_SIGNALS = 1 << 22, WORK_OF_A_THREAD = 1 << 18 };

static int is_bool(PyObject *object)
{
    const char *type = Py_TYPE(object)->tp_name;
    return PyBool_Check(object) || strcmp(type, "numpy.bool") == 0 ||
           strcmp(type, "numpy.bool_") == 0;
}

Py_ssize_t qllm_sequence_length(PyObject *object)
{
    if (PyUnicode_Check(object) || PyBytes_Check(object) || !PySequence_Check(object))
        return -1;
    Py_ssize_t length = PyObject_Size(object); /* an array of no dimensions has none */
    if (length < 0)
        PyErr_Clear();
    return length;
}

int qllm_to_double(const qllm_state *state, PyObject *object, const char *name, double *out)
{
    if (!is_bool(object) && qllm_sequence_length(object) < 0 && !PyComplex_Check(object)) {
        *out = PyFloat_AsDouble(object);
        if (*out != -1.0 || !PyErr_Occurred())
            return 0;
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) { /* an int of hundreds of digits */
            PyErr_Clear();
            *out = HUGE_VAL;
            return 0;
        }
        if (!PyErr_ExceptionMatches(PyExc_TypeError))
            return -1;
        PyErr_Clear();
    }
    qllm_raise_value(state, "%s: expected a number, found %.100s", name, Py_TYPE(object)->tp_name);
    return -1;
}

/* Any integer as a Python int, or NULL with an exception. */
static PyObject *parse_integer(const qllm_state *state, PyObject *object, const char *name)
{
    if (!is_bool(object) && qllm_sequence_length(object) < 0) {
        PyObject *integer = PyNumber_Index(object);
        if (integer != NULL || !PyErr_ExceptionMatches(PyExc_TypeError))
            return integer;
        PyErr_Clear();
    }
    return qllm_raise_value(state, "%s: expected an integer, found %.100s", name,
                            Py_TYPE(object)->tp_name);
}

/* Raises that `integer` is not in the range that `expected` describes. */
static int raise_range(const qllm_state *state, PyObject *integer, const char *name,
                       const char *expected)
{
    PyObject *text = PyObject_Str(integer);
    if (text == NULL) { /* thousands of digits */
        PyErr_Clear();
        qllm_raise_value(state, "%s: expected an integer %s, found one of thousands of digits",
                         name, expected);
    } else
        qllm_raise_value(state, "%s: expected an integer %s, found %.60U", name, expected, text);
    Py_XDECREF(text);
    return -1;
}

int qllm_to_uint(const qllm_state *state, PyObject *object, const char *name, int bits,
                    uint64_t *out)
{
    PyObject *integer = parse_integer(state, object, name);
    if (integer == NULL)
        return -1;
    unsigned long long value = PyLong_AsUnsignedLongLong(integer);
    int bad = value == (unsigned long long)-1 && PyErr_Occurred() != NULL;
    PyErr_Clear();
    if (bad || (bits == 32 && value > UINT32_MAX))
        bad = raise_range(state, integer, name, bits == 32 ? "from 0 to 2^32 - 1"
                                                           : "from 0 to 2^64 - 1");
    Py_DECREF(integer);
    *out = value;
    return bad ? -1 : 0;
}

int qllm_to_int64(const qllm_state *state, PyObject *object, const char *name, int64_t *out)
{
    PyObject *integer = parse_integer(state, object, name);
    if (integer == NULL)
        return -1;
    int overflow;
    *out = PyLong_AsLongLongAndOverflow(integer, &overflow);
    if (overflow)
        raise_range(state, integer, name, "of at most 64 bits");
    Py_DECREF(integer);
    return overflow ? -1 : 0;
}

int qllm_parse_rows(const qllm_state *state, PyObject *object, const char *name,
                    qllm_logit_rows *out)
{
    out->array = qllm_array_input(state, object, QLLM_ARRAY_F32, 1, 2, name);
    if (out->array == NULL)
        return -1;
    out->data = qllm_array_data(out->array);
    out->single = qllm_array_ndim(out->array) == 1;
    out->n = out->single ? 1 : qllm_array_dim(out->array, 0);
    out->vocab = qllm_array_dim(out->array, !out->single);
    if (qllm_sample_scratch(out->vocab) < 0) {
        qllm_raise_value(state, "%s: expected 1 to 2147483647 tokens in a row, found %lld", name,
                         (long long)out->vocab);
        return -1;
    }
    return 0;
}

PyObject *qllm_item_of(const qllm_state *state, PyObject *object, int64_t row, int64_t n,
                       const char *name)
{
    Py_ssize_t length = qllm_sequence_length(object);
    if (length < 0)
        return Py_NewRef(object);
    if (length != n)
        return qllm_raise_value(state, "%s: expected one value or one for each of %lld rows, found "
                                "%zd values", name, (long long)n, length);
    return PySequence_GetItem(object, (Py_ssize_t)row);
}

/* Says in which row of a batch the error lies. */
static PyObject *raise_row(const qllm_state *state, const qllm_logit_rows *logits, int64_t row,
                           const qllm_error *error)
{
    qllm_error named;
    if (logits->single)
        return qllm_raise(state, error);
    qllm_fail(&named, error->status, "row %lld: %s", (long long)row, error->text);
    return qllm_raise(state, &named);
}

/* A stretch of rows on its threads; each notes the first of its rows that failed. */
typedef struct stretch {
    const qllm_row_work *work;
    int64_t first;
    int64_t scratch; /* bytes of a thread */
    char *memory;    /* (threads, scratch) */
    int64_t *failed; /* (threads) INT64_MAX: none */
    qllm_error *errors; /* (threads) */
} stretch;

static void do_rows(void *context, int64_t begin, int64_t end, int thread)
{
    stretch *s = context;
    qllm_error error;
    for (int64_t row = s->first + begin; row < s->first + end; row++) {
        if (s->work->row(s->work->context, row, s->memory + thread * s->scratch, &error) == QLLM_OK)
            continue;
        if (row < s->failed[thread]) {
            s->failed[thread] = row;
            s->errors[thread] = error;
        }
        return;
    }
}

/* Runs all rows stretch by stretch; `pool` NULL: on this thread alone. */
static int run_stretches(const qllm_state *state, const qllm_logit_rows *logits, stretch *s,
                         qllm_threads *pool, int count)
{
    int64_t each = s->work->logits > 0 ? s->work->logits : 1;
    int64_t rows = (WORK_BETWEEN_SIGNALS / each + 1) * count;
    for (s->first = 0; s->first < logits->n; s->first += rows) {
        int64_t n = logits->n - s->first < rows ? logits->n - s->first : rows;
        int first = 0;
        Py_BEGIN_ALLOW_THREADS
        if (pool != NULL)
            qllm_threads_run(pool, n, do_rows, s);
        else
            do_rows(s, 0, n, 0);
        Py_END_ALLOW_THREADS
        for (int i = 1; i < count; i++)
            first = s->failed[i] < s->failed[first] ? i : first;
        if (s->failed[first] != INT64_MAX) {
            raise_row(state, logits, s->failed[first], &s->errors[first]);
            return -1;
        }
        if (PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

/* Whether several threads are worth waking. */
static int is_long(const qllm_logit_rows *logits, const qllm_row_work *work)
{
    return logits->n > 1 && work->logits > WORK_OF_A_THREAD / logits->n;
}

int qllm_each_row(qllm_state *state, const qllm_logit_rows *logits, const qllm_row_work *work)
{
    qllm_threads *pool = NULL;
    qllm_error error;
    stretch s = {.work = work, .scratch = (work->scratch + 63) / 64 * 64};
    if (is_long(logits, work) && (pool = qllm_shared_threads(state, work->threads)) == NULL)
        return -1;
    int count = pool != NULL ? qllm_threads_count(pool) : 1, result = -1;
    if (qllm_alloc_scratch((void **)&s.memory, count, s.scratch, "the scratch of a row", &error) ==
            QLLM_OK &&
        qllm_alloc((void **)&s.failed, count, sizeof *s.failed, "the rows", &error) == QLLM_OK &&
        qllm_alloc((void **)&s.errors, count, sizeof *s.errors, "the rows", &error) == QLLM_OK) {
        for (int i = 0; i < count; i++)
            s.failed[i] = INT64_MAX;
        result = run_stretches(state, logits, &s, pool, count);
    } else
        qllm_raise(state, &error);
    qllm_free(s.memory);
    qllm_free(s.failed);
    qllm_free(s.errors);
    return result;
}

PyObject *qllm_row_result(PyObject *array, int single)
{
    PyObject *item = NULL;
    if (!single || array == NULL)
        return array;
    PyObject *numbers = PyObject_CallMethod(array, "tolist", NULL);
    if (numbers != NULL && PyList_Check(numbers))
        item = Py_XNewRef(PyList_GetItem(numbers, 0));
    Py_XDECREF(numbers);
    Py_DECREF(array);
    return item;
}

PyObject *qllm_parse_tokens(const qllm_state *state, PyObject *object,
                            const qllm_logit_rows *logits, const char *name)
{
    PyObject *array;
    if (qllm_sequence_length(object) < 0 && logits->single) {
        int64_t token, one = 1, *data;
        if (qllm_to_int64(state, object, name, &token) < 0)
            return NULL;
        array = qllm_array_new(QLLM_ARRAY_I64, 1, &one, (void **)&data);
        if (array != NULL)
            *data = token;
        return array;
    }
    array = qllm_array_input(state, object, QLLM_ARRAY_I64, 1, 1, name);
    if (array != NULL && qllm_array_size(array) != logits->n) {
        qllm_raise_value(state, "%s: expected one token for each of %lld rows, found %lld", name,
                         (long long)logits->n, (long long)qllm_array_size(array));
        Py_CLEAR(array);
    }
    return array;
}
