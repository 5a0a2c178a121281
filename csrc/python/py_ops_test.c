/* _ops_test: one function of an instruction set's table, or of core/elementary.h, on arrays.  For
 * the tests only; sizes are checked, contents are the caller's business. */
#include "python/py_cpu.h"

#include <string.h>

#include "core/alloc.h"
#include "core/elementary.h"
#include "cpu/cpu_ops.h"
#include "python/array.h"
#include "python/py_quant.h"

enum { MAX_ARRAYS = 4, MAX_SPANS = 16 };

/* The arrays of a call, flat, float32. */
typedef struct inputs {
    PyObject *objects[MAX_ARRAYS];
    const float *data[MAX_ARRAYS];
    int64_t size[MAX_ARRAYS];
    int count;
    double number; /* eps or threshold */
} inputs;

static void release(inputs *in)
{
    for (int i = 0; i < in->count; i++)
        Py_DECREF(in->objects[i]);
    in->count = 0;
}

static int take_arrays(const qllm_state *state, PyObject *tuple, inputs *in)
{
    Py_ssize_t n = PyTuple_GET_SIZE(tuple);
    if (n < 1 || n > MAX_ARRAYS) {
        qllm_raise_value(state, "arrays: %zd were given; expected 1 to %d", n, MAX_ARRAYS);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *array = qllm_array_input(state, PyTuple_GET_ITEM(tuple, i), QLLM_ARRAY_F32, 1, 1,
                                           "arrays");
        if (array == NULL) {
            release(in);
            return -1;
        }
        in->objects[i] = array;
        in->data[i] = qllm_array_data(array);
        in->size[i] = qllm_array_size(array);
        in->count++;
    }
    return 0;
}

/* A copy of input i as the result of a function that works in place. */
static PyObject *copy_of(const inputs *in, int i, float **data)
{
    void *memory;
    PyObject *result = qllm_array_new(QLLM_ARRAY_F32, 1, &in->size[i], &memory);
    if (result == NULL)
        return NULL;
    if (in->size[i] > 0)
        memcpy(memory, in->data[i], (size_t)in->size[i] * sizeof(float));
    *data = memory;
    return result;
}

static int same_sizes(const inputs *in)
{
    for (int i = 1; i < in->count; i++)
        if (in->size[i] != in->size[0])
            return 0;
    return 1;
}

/* exp, silu, gelu, gelu_tanh of core/elementary.h */
static PyObject *run_core(const qllm_state *state, const char *name, const inputs *in)
{
    const struct { const char *name; float (*function)(float); } table[] = {
        {"exp", qllm_expf}, {"silu", qllm_siluf}, {"gelu", qllm_geluf},
        {"gelu_tanh", qllm_gelu_tanhf},
    };
    float *y;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (strcmp(name, table[i].name) == 0) {
            PyObject *result = copy_of(in, 0, &y);
            for (int64_t k = 0; result != NULL && k < in->size[0]; k++)
                y[k] = table[i].function(y[k]);
            return result;
        }
    return qllm_raise_value(state, "name: '%s' is not in core/elementary.h", name);
}

static PyObject *run_table(const qllm_state *state, const qllm_cpu_ops *ops, const char *name,
                           const inputs *in)
{
    const float *b = in->count > 1 ? in->data[1] : NULL, *c = in->count > 2 ? in->data[2] : NULL;
    int64_t n = in->size[0];
    int is_rope = strcmp(name, "rope") == 0;
    float *y;
    if (is_rope ? in->count != 3 || in->size[1] != n / 2 || in->size[2] != n / 2 : !same_sizes(in))
        return qllm_raise_value(state, "arrays: their sizes do not fit together");
    PyObject *result = copy_of(in, 0, &y);
    if (result == NULL)
        return NULL;
    if (is_rope)
        ops->rope(y, b, c, n / 2);
    else if (strcmp(name, "rms_norm") == 0 && b != NULL)
        ops->rms_norm(in->data[0], b, n, (float)in->number, y);
    else if (strcmp(name, "layer_norm") == 0 && b != NULL)
        ops->layer_norm(in->data[0], b, c, n, (float)in->number, y);
    else if (strcmp(name, "silu") == 0)
        ops->silu(in->data[0], b, n, y);
    else if (strcmp(name, "gelu") == 0)
        ops->gelu(in->data[0], b, n, y);
    else if (strcmp(name, "gelu_tanh") == 0)
        ops->gelu_tanh(in->data[0], b, n, y);
    else if (strcmp(name, "add") == 0 && b != NULL)
        ops->add(b, n, y);
    else {
        Py_DECREF(result);
        return qllm_raise_value(state, "name: '%s' is unknown, or lacks an array", name);
    }
    return result;
}

static PyObject *py_ops_test(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"isa", "name", "arrays", "number", NULL};
    const qllm_state *state = qllm_state_of(module);
    const char *isa_name, *name;
    PyObject *arrays, *result = NULL;
    inputs in = {.number = 0.0};
    qllm_isa isa;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ssO!|d:_ops_test", names, &isa_name, &name,
                                     &PyTuple_Type, &arrays, &in.number) ||
        take_arrays(state, arrays, &in) < 0)
        return NULL;
    if (strcmp(isa_name, "core") == 0)
        result = run_core(state, name, &in);
    else if (qllm_choose_isa(state, isa_name, &isa) == 0)
        result = run_table(state, qllm_cpu_ops_get(isa), name, &in);
    release(&in);
    return result;
}

static PyObject *py_activation_test(PyObject *module, PyObject *args)
{
    const qllm_state *state = qllm_state_of(module);
    const char *isa_name;
    PyObject *object, *q, *outliers = NULL, *result = NULL;
    double threshold;
    float scale;
    int64_t n_outliers;
    void *q_data, *outlier_data;
    qllm_isa isa;
    if (!PyArg_ParseTuple(args, "sOd:_activation_test", &isa_name, &object, &threshold) ||
        qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    PyObject *x = qllm_array_input(state, object, QLLM_ARRAY_F32, 1, 1, "x");
    if (x == NULL)
        return NULL;
    int64_t cols = qllm_array_size(x), padded = (cols + 63) / 64 * 64, bytes = 4 * cols;
    q = qllm_array_new(QLLM_ARRAY_I8, 1, &padded, &q_data);
    if (q != NULL)
        outliers = qllm_array_new(QLLM_ARRAY_I8, 1, &bytes, &outlier_data); /* int32 as bytes */
    if (outliers != NULL) {
        qllm_cpu_ops_get(isa)->int8_activation(qllm_array_data(x), cols, (float)threshold, q_data,
                                               64, &scale, outlier_data, &n_outliers);
        result = Py_BuildValue("(OfOL)", q, (double)scale, outliers, (long long)n_outliers);
    }
    Py_DECREF(x);
    Py_XDECREF(q);
    Py_XDECREF(outliers);
    return result;
}

/* q (heads, head_dim); k in panels and v, span after span; counts of the spans. */
typedef struct attention_inputs {
    PyObject *q, *k, *v, *counts, *bias;
    long long begin, end;
    double scale;
    int parts; /* 0: as a whole */
} attention_inputs;

static int make_spans(const qllm_state *state, const attention_inputs *in, int64_t head_dim,
                      qllm_kv_span *spans)
{
    int64_t n = qllm_array_size(in->counts), k_at = 0, v_at = 0, total = 0;
    const int64_t *counts = qllm_array_data(in->counts);
    for (int64_t s = 0; s < n && s < MAX_SPANS; s++) {
        spans[s] = (qllm_kv_span){(const float *)qllm_array_data(in->k) + k_at,
                                  (const float *)qllm_array_data(in->v) + v_at, counts[s]};
        k_at += (counts[s] + QLLM_KV_PANEL - 1) / QLLM_KV_PANEL * QLLM_KV_PANEL * head_dim;
        v_at += counts[s] * head_dim;
        total += counts[s];
    }
    if (n <= MAX_SPANS && k_at == qllm_array_size(in->k) && v_at == qllm_array_size(in->v) &&
        in->begin >= 0 && in->begin < in->end && in->end <= total)
        return 0;
    qllm_raise_value(state, "k, v, counts, begin, end: sizes do not fit together");
    return -1;
}

/* In `parts` of the scores and of the values each, the last first. */
static void attend_in_parts(const qllm_cpu_ops *ops, const qllm_attention *args, int parts)
{
    int64_t vectors = (args->head_dim + 15) / 16;
    for (int i = parts; i-- > 0;)
        ops->attention_scores(args, args->n_spans * i / parts, args->n_spans * (i + 1) / parts);
    for (int64_t h = args->heads; h-- > 0;)
        ops->attention_weights(args, h);
    for (int i = parts; i-- > 0;)
        ops->attention_values(args, vectors * i / parts, vectors * (i + 1) / parts);
}

static PyObject *run_attention(const qllm_state *state, const qllm_cpu_ops *ops,
                               const attention_inputs *in)
{
    int64_t shape[2] = {qllm_array_dim(in->q, 0), qllm_array_dim(in->q, 1)};
    qllm_kv_span spans[MAX_SPANS];
    qllm_error error;
    void *out, *scores;
    if (make_spans(state, in, shape[1], spans) < 0)
        return NULL;
    if (in->bias != NULL && (qllm_array_dim(in->bias, 0) != shape[0] ||
                             qllm_array_dim(in->bias, 1) < in->end))
        return qllm_raise_value(state, "bias: expected (heads, end) or more");
    if (in->parts < 0 || (in->parts > 0 && shape[0] > QLLM_ATTENTION_HEADS))
        return qllm_raise_value(state, "parts: expected 0, or more for at most %d heads",
                                QLLM_ATTENTION_HEADS);
    if (qllm_alloc(&scores, qllm_attention_scratch(in->end - in->begin, shape[0]), sizeof(float),
                   "scores", &error) != QLLM_OK)
        return qllm_raise(state, &error);
    PyObject *result = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &out);
    if (result != NULL) {
        qllm_attention args = {
            .q = qllm_array_data(in->q), .heads = shape[0], .head_dim = shape[1], .spans = spans,
            .n_spans = qllm_array_size(in->counts), .begin = in->begin, .end = in->end,
            .scale = (float)in->scale, .bias = in->bias ? qllm_array_data(in->bias) : NULL,
            .bias_stride = in->bias ? qllm_array_dim(in->bias, 1) : 0, .scores = scores,
            .out = out};
        if (in->parts > 0)
            attend_in_parts(ops, &args, in->parts);
        else
            ops->attention(&args);
    }
    qllm_free(scores);
    return result;
}

static PyObject *py_attention_test(PyObject *module, PyObject *args)
{
    const qllm_state *state = qllm_state_of(module);
    attention_inputs given, in = {0};
    const char *isa_name;
    PyObject *result = NULL;
    qllm_isa isa;
    if (!PyArg_ParseTuple(args, "sOOOOOLLd|i:_attention_test", &isa_name, &given.q, &given.k,
                          &given.v, &given.counts, &given.bias, &in.begin, &in.end, &in.scale,
                          &in.parts) ||
        qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    in.q = qllm_array_input(state, given.q, QLLM_ARRAY_F32, 2, 2, "q");
    in.k = in.q ? qllm_array_input(state, given.k, QLLM_ARRAY_F32, 1, 1, "k") : NULL;
    in.v = in.k ? qllm_array_input(state, given.v, QLLM_ARRAY_F32, 1, 1, "v") : NULL;
    in.counts = in.v ? qllm_array_input(state, given.counts, QLLM_ARRAY_I64, 1, 1, "counts") : NULL;
    if (in.counts != NULL && given.bias != Py_None)
        in.bias = qllm_array_input(state, given.bias, QLLM_ARRAY_F32, 2, 2, "bias");
    if (!PyErr_Occurred())
        result = run_attention(state, qllm_cpu_ops_get(isa), &in);
    Py_XDECREF(in.q);
    Py_XDECREF(in.k);
    Py_XDECREF(in.v);
    Py_XDECREF(in.counts);
    Py_XDECREF(in.bias);
    return result;
}

static PyMethodDef functions[] = {
    {"_ops_test", (PyCFunction)(void (*)(void))py_ops_test, METH_VARARGS | METH_KEYWORDS,
     "_ops_test($module, isa, name, arrays, number=0.0)\n--\n\n"
     "One function of a table, or of core/elementary.h for isa 'core', on flat float32 arrays."},
    {"_activation_test", py_activation_test, METH_VARARGS,
     "_activation_test($module, isa, x, threshold, /)\n--\n\n"
     "int8_activation: codes padded to 64, scale, outlier columns as the bytes of int32, their "
     "number."},
    {"_attention_test", py_attention_test, METH_VARARGS,
     "_attention_test($module, isa, q, k, v, counts, bias, begin, end, scale, parts=0, /)\n--\n\n"
     "attention over spans: k in panels of 16 positions and v, flat, span after span."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_ops_test(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
