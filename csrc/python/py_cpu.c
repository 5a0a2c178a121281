/* cpu_info, linear: the CPU kernels in Python's hands. */
#include "python/py_cpu.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "core/linear_ref.h"
#include "cpu/linear.h"
#include "cpu/processors.h"
#include "python/array.h"
#include "python/py_quant.h"

int qllm_choose_isa(const qllm_state *state, const char *name, qllm_isa *isa)
{
    qllm_error error, named;
    const char *variable = getenv("QLLM_CPU");
    if (qllm_isa_choose(name != NULL ? name : variable, isa, &error) == QLLM_OK)
        return 0;
    qllm_fail(&named, error.status, "%s: %.400s", name != NULL ? "isa" : "QLLM_CPU", error.text);
    qllm_raise(state, &named);
    return -1;
}

const qllm_logit_ops *qllm_choose_logit_ops(const qllm_state *state, const char *name)
{
    qllm_isa isa;
    if (name != NULL && strcmp(name, "core") == 0)
        return &qllm_logit_ops_core;
    return qllm_choose_isa(state, name, &isa) == 0 ? qllm_logit_ops_get(isa) : NULL;
}

/* One pool for each number of threads that was asked for, kept until the module goes. */
struct qllm_pools {
    qllm_threads *threads;
    struct qllm_pools *next;
};

static bool same_team(const qllm_team *a, const qllm_team *b)
{
    if (a == NULL || b == NULL)
        return a == b;
    return a->parallel == b->parallel && a->max_threads == b->max_threads &&
           a->thread_num == b->thread_num;
}

/* The pool of `count` threads of a team, or of its own where that is NULL. */
static qllm_threads *pool_of(qllm_state *state, const qllm_team *team, int count)
{
    qllm_error error;
    void *memory;
    for (struct qllm_pools *pool = state->pools; pool != NULL; pool = pool->next)
        if (qllm_threads_count(pool->threads) == count &&
            same_team(qllm_threads_team(pool->threads), team))
            return pool->threads;
    if (qllm_alloc(&memory, 1, sizeof(struct qllm_pools), "a thread pool", &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return NULL;
    }
    struct qllm_pools *pool = memory;
    qllm_status status = team != NULL ? qllm_threads_create_in(team, count, &pool->threads, &error)
                                      : qllm_threads_create(count, &pool->threads, &error);
    if (status != QLLM_OK) {
        qllm_free(pool);
        qllm_raise(state, &error);
        return NULL;
    }
    pool->next = state->pools;
    state->pools = pool;
    return pool->threads;
}

qllm_threads *qllm_shared_threads(qllm_state *state, int n)
{
    qllm_error error;
    int count;
    if (qllm_threads_resolve(n, &count, &error) == QLLM_OK)
        return pool_of(state, NULL, count);
    qllm_raise(state, &error);
    return NULL;
}

qllm_threads *qllm_team_threads(qllm_state *state)
{
    qllm_error error;
    int count;
    if (state->team.parallel == NULL)
        return qllm_shared_threads(state, 0);
    int most = state->team.max_threads();
    if (getenv("QLLM_THREADS") == NULL)
        return pool_of(state, &state->team, most);
    if (qllm_threads_resolve(0, &count, &error) == QLLM_OK)
        return pool_of(state, &state->team, count < most ? count : most);
    qllm_raise(state, &error);
    return NULL;
}

void qllm_free_pools(qllm_state *state)
{
    while (state->pools != NULL) {
        struct qllm_pools *pool = state->pools;
        state->pools = pool->next;
        qllm_threads_destroy(pool->threads);
        qllm_free(pool);
    }
}

static PyObject *isa_list(bool (*belongs)(qllm_isa isa))
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < QLLM_ISA_COUNT; i++) {
        if (!belongs((qllm_isa)i))
            continue;
        PyObject *name = PyUnicode_FromString(qllm_isa_name((qllm_isa)i));
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *feature_list(const qllm_cpu_features *f)
{
    const struct { const char *name; bool present; } table[] = {
        {"avx2", f->avx2}, {"fma", f->fma}, {"f16c", f->f16c}, {"avx512f", f->avx512f},
        {"avx512bw", f->avx512bw}, {"avx512vl", f->avx512vl}, {"avx512dq", f->avx512dq},
        {"avx512vnni", f->avx512vnni}, {"avx512vbmi", f->avx512vbmi},
        {"avx512bf16", f->avx512bf16}, {"amxint8", f->amxint8},
        {"amxbf16", f->amxbf16},
        {"amxint8 (the system refuses it)", f->amx_refused}, {"neon", f->neon},
        {"dotprod", f->dotprod},
    };
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < sizeof table / sizeof *table; i++) {
        PyObject *name = table[i].present ? PyUnicode_FromString(table[i].name) : NULL;
        if (table[i].present && (name == NULL || PyList_Append(list, name) < 0))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *py_cpu_info(PyObject *module, PyObject *unused)
{
    const qllm_cpu_features *f = qllm_cpu_features_get();
    qllm_isa isa;
    qllm_processors processors;
    (void)unused;
    if (qllm_choose_isa(qllm_state_of(module), NULL, &isa) < 0)
        return NULL;
    qllm_processors_get(&processors);
    return Py_BuildValue("{s:s,s:N,s:N,s:N,s:s,s:i,s:i,s:i,s:i,s:i}", "model", f->model,
                         "features", feature_list(f), "isas", isa_list(qllm_isa_supported),
                         "compiled", isa_list(qllm_isa_compiled), "default", qllm_isa_name(isa),
                         "threads_available", qllm_processors_usable(&processors),
                         "threads_default", qllm_processors_default(&processors),
                         "cores", processors.cores, "logical", processors.logical,
                         "quota", processors.quota);
}

/* What linear and matmul were asked for. */
typedef struct request {
    qllm_isa isa;
    int threads;
    qllm_linear_options options;
} request;

static int parse_outliers(const qllm_state *state, const char *text, double threshold,
                          qllm_linear_options *options)
{
    if (isnan(threshold)) {
        qllm_raise_value(state, "int8_threshold: NaN was given; use 6.0, or 0 for no outliers");
        return -1;
    }
    options->int8_threshold = (float)threshold;
    options->int8_batch = strcmp(text, "batch") == 0;
    if (options->int8_batch || strcmp(text, "row") == 0)
        return 0;
    qllm_raise_value(state, "int8_outliers: '%s' is unknown; use 'row' (each row on its own) or "
                     "'batch' (bitsandbytes' form)", text);
    return -1;
}

int qllm_parse_compute(const qllm_state *state, const char *name, qllm_compute *compute)
{
    qllm_error error;
    if (qllm_compute_find(name, compute, &error) == QLLM_OK)
        return 0;
    qllm_raise(state, &error);
    return -1;
}

int qllm_parse_threads(const qllm_state *state, PyObject *object, int *threads)
{
    int64_t n = 0;
    if (object != Py_None && qllm_parse_int64(state, object, "threads", &n) < 0)
        return -1;
    if (object != Py_None && n < 1) {
        qllm_raise_value(state, "threads: %lld was given; expected 1 or more, or None for one per "
                         "core, %d here", (long long)n, qllm_threads_default());
        return -1;
    }
    *threads = n < 1000000 ? (int)n : 1000000;
    return 0;
}

/* x and bias as arrays: new references, *bias NULL for None. */
static int parse_inputs(const qllm_state *state, const qllm_qweight *w, PyObject **x,
                        PyObject **bias)
{
    PyObject *x_array = qllm_array_input(state, *x, QLLM_ARRAY_F32, 1, 2, "x"), *bias_array = NULL;
    if (x_array == NULL)
        return -1;
    int64_t cols = qllm_array_dim(x_array, qllm_array_ndim(x_array) - 1);
    if (cols != w->cols)
        qllm_raise_value(state, "x: %lld columns, but the weight of shape (%lld, %lld) takes %lld",
                         (long long)cols, (long long)w->rows, (long long)w->cols,
                         (long long)w->cols);
    else if (*bias != Py_None &&
             (bias_array = qllm_array_input(state, *bias, QLLM_ARRAY_F32, 1, 1, "bias")) != NULL &&
             qllm_array_size(bias_array) != w->rows)
        qllm_raise_value(state, "bias: %lld values, but the weight has %lld rows",
                         (long long)qllm_array_size(bias_array), (long long)w->rows);
    if (PyErr_Occurred()) {
        Py_DECREF(x_array);
        Py_XDECREF(bias_array);
        return -1;
    }
    *x = x_array;
    *bias = bias_array;
    return 0;
}

/* y = x W^T + bias without the GIL; x_array holds m rows. */
static qllm_status multiply(const qllm_packed *packed, const request *request,
                            qllm_threads *threads, PyObject *x_array, PyObject *bias, int64_t m,
                            float *y, qllm_error *error)
{
    void *scratch = NULL;
    int64_t cols = qllm_packed_cols(packed), rows = qllm_packed_rows(packed);
    int64_t bytes = qllm_cpu_linear_scratch(cols, m);
    const float *x = qllm_array_data(x_array), *b = bias ? qllm_array_data(bias) : NULL;
    if (bytes < 0)
        return qllm_fail(error, QLLM_MEMORY, "x: the rounded form of this input is larger than can "
                         "be addressed; use a smaller batch");
    qllm_status status = qllm_alloc_large(&scratch, bytes, 1, "the rounded form of the input",
                                          error);
    if (status == QLLM_OK)
        qllm_cpu_linear(threads, qllm_cpu_ops_get(request->isa),
                        &(qllm_linear_part){packed, b, y, rows}, 1, x, m, cols,
                        &request->options, scratch);
    qllm_free(scratch);
    return status;
}

/* The packed form of a QuantizedTensor, made at first use and kept with it. */
static const qllm_packed *packed_of(const qllm_state *state, PyObject *object, qllm_isa isa)
{
    qllm_packer packer = {qllm_encode_ops_get(isa), NULL};
    qllm_packed **slot = qllm_quantized_tensor_packed(object), *packed = NULL;
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, object);
    qllm_error error;
    qllm_status status;
    if (*slot != NULL)
        return *slot;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_pack(&packer, weight, "the weight", &packed, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK) {
        qllm_raise(state, &error);
        return NULL;
    }
    if (*slot == NULL) /* another thread may have been faster */
        *slot = packed;
    else
        qllm_packed_destroy(packed);
    return *slot;
}

static PyObject *linear(qllm_state *state, PyObject *object, const request *request, PyObject *x,
                        PyObject *bias)
{
    const qllm_qweight *w = qllm_quantized_tensor_weight(state, object);
    PyObject *result = NULL;
    qllm_threads *threads = NULL;
    qllm_error error;
    qllm_status status;
    void *y;
    if (w == NULL || parse_inputs(state, w, &x, &bias) < 0)
        return NULL;
    const qllm_packed *packed = packed_of(state, object, request->isa);
    int two = qllm_array_ndim(x) == 2;
    int64_t m = two ? qllm_array_dim(x, 0) : 1, shape[2] = {m, w->rows};
    if (packed != NULL)
        threads = qllm_shared_threads(state, request->threads);
    if (threads != NULL)
        result = qllm_array_new(QLLM_ARRAY_F32, two ? 2 : 1, two ? shape : shape + 1, &y);
    if (result != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = multiply(packed, request, threads, x, bias, m, y, &error);
        Py_END_ALLOW_THREADS
        if (status != QLLM_OK) {
            Py_CLEAR(result);
            qllm_raise(state, &error);
        }
    }
    Py_DECREF(x);
    Py_XDECREF(bias);
    return result;
}

static PyObject *parse_and_run(qllm_state *state, PyObject *weight, PyObject *args,
                               PyObject *kwargs)
{
    static char *method_names[] = {"x", "bias", "isa", "threads", "int8_threshold",
                                   "int8_outliers", "compute", NULL};
    static char *function_names[] = {"weight", "x", "bias", "isa", "threads", "int8_threshold",
                                     "int8_outliers", "compute", NULL};
    PyObject *x, *bias = Py_None, *threads = Py_None;
    const char *isa = NULL, *outliers = "row", *compute = "exact";
    double threshold = (double)QLLM_INT8_THRESHOLD;
    request request;
    int ok = weight != NULL
        ? PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$zOdss:matmul", method_names, &x, &bias,
                                      &isa, &threads, &threshold, &outliers, &compute)
        : PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$zOdss:linear", function_names, &weight,
                                      &x, &bias, &isa, &threads, &threshold, &outliers, &compute);
    if (!ok || qllm_choose_isa(state, isa, &request.isa) < 0 ||
        qllm_parse_threads(state, threads, &request.threads) < 0 ||
        parse_outliers(state, outliers, threshold, &request.options) < 0 ||
        qllm_parse_compute(state, compute, &request.options.compute) < 0)
        return NULL;
    return linear(state, weight, &request, x, bias);
}

PyObject *qllm_quantized_tensor_matmul(PyObject *self, PyObject *args, PyObject *kwargs)
{
    return parse_and_run(qllm_state_of_type(Py_TYPE(self)), self, args, kwargs);
}

static PyObject *py_linear(PyObject *module, PyObject *args, PyObject *kwargs)
{
    return parse_and_run(qllm_state_of(module), NULL, args, kwargs);
}

static PyObject *py_linear_name(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "m", "isa", "compute", NULL};
    const qllm_state *state = qllm_state_of(module);
    const char *isa_name = NULL, *compute_name = "exact";
    PyObject *object;
    long long m;
    qllm_isa isa;
    qllm_compute compute;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OL|$zs:linear_name", names, &object, &m,
                                     &isa_name, &compute_name) ||
        qllm_parse_compute(state, compute_name, &compute) < 0 ||
        qllm_choose_isa(state, isa_name, &isa) < 0 ||
        qllm_quantized_tensor_weight(state, object) == NULL)
        return NULL;
    const qllm_packed *packed = packed_of(state, object, isa);
    if (packed == NULL)
        return NULL;
    const qllm_cpu_ops *ops = qllm_cpu_ops_get(isa);
    qllm_tier tier = qllm_cpu_linear_tier(ops, packed, compute);
    return PyUnicode_FromString(ops->linear_name(packed, tier, m));
}

static PyObject *py_use_team(PyObject *module, PyObject *args)
{
    qllm_state *state = qllm_state_of(module);
    void *addresses[3];
    PyObject *objects[3];
    if (!PyArg_ParseTuple(args, "OOO:use_team", &objects[0], &objects[1], &objects[2]))
        return NULL;
    for (int i = 0; i < 3; i++)
        addresses[i] = PyLong_AsVoidPtr(objects[i]);
    if (PyErr_Occurred())
        return NULL;
    memcpy(&state->team.parallel, &addresses[0], sizeof(void *));
    memcpy(&state->team.max_threads, &addresses[1], sizeof(void *));
    memcpy(&state->team.thread_num, &addresses[2], sizeof(void *));
    Py_RETURN_NONE;
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"use_team", py_use_team, METH_VARARGS,
     "use_team($module, parallel, max_threads, thread_num, /)\n--\n\n"
     "Products by address run in the threads of another library from now on: addresses of\n"
     "GOMP_parallel, omp_get_max_threads and omp_get_thread_num as it calls them; 0, 0, 0: in\n"
     "threads of qllm's own."},
    {"cpu_info", py_cpu_info, METH_NOARGS,
     "cpu_info($module, /)\n--\n\n"
     "model: the processor's name; features: those that the kernels ask about; isas: instruction\n"
     "sets that can be chosen here; compiled: those of this build; default: the one that is used\n"
     "(QLLM_CPU, or the best).  Of the affinity mask: logical processors, and the cores that they\n"
     "belong to; quota: the control groups' limit in processors, 0 for none; threads_available:\n"
     "the most threads that can be asked for; threads_default: how many there are otherwise\n"
     "(QLLM_THREADS aside)."},
    {"linear", (PyCFunction)(void (*)(void))py_linear, KEYWORDS,
     "linear($module, weight, x, bias=None, *, isa=None, threads=None, int8_threshold=6.0, "
     "int8_outliers='row', compute='exact')\n--\n\n"
     "y = x W^T + bias, float32 (m, rows) for x float32 (m, cols), or (rows,) for (cols,), with\n"
     "the kernels of an instruction set (None: QLLM_CPU, or the best) and a number of threads\n"
     "(None: QLLM_THREADS, or one per core).  compute 'auto' rounds x to int16 by blocks for\n"
     "4-bit weights and to bf16 for bf16 weights where the set has instructions for it; 'int8'\n"
     "rounds x to int8 by blocks for 4-bit weights.  The bits depend on neither set nor threads.\n"
     "int8: |x| >= int8_threshold are outliers, taken row by row or, with 'batch', by columns of\n"
     "the whole x as bitsandbytes does."},
    {"linear_name", (PyCFunction)(void (*)(void))py_linear_name, KEYWORDS,
     "linear_name($module, weight, m, *, isa=None, compute='exact')\n--\n\n"
     "Which kernel multiplies m rows by this weight."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_cpu(PyObject *module)
{
    if (PyModule_AddFunctions(module, functions) < 0 || qllm_setup_encode(module) < 0 ||
        qllm_setup_image(module) < 0 ||
        qllm_setup_limits(module) < 0 || qllm_setup_threads_test(module) < 0)
        return -1;
    return qllm_setup_ops_test(module);
}
