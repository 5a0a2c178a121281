/* logit_stats: qllm_logit_stats_row over rows of logits. */
#include "core/logit_stats.h"

#include <string.h>

#include "core/alloc.h"
#include "core/checked.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_decoder.h"

/* The keys of the returned dict, in the order of the pointers of qllm_logit_stats. */
enum { N_STATS = 10 };
static const char *const STATS[N_STATS] = {"kl", "kl_reverse", "tv", "disagreement",
                                           "entropy_ref", "entropy_test", "max_ref", "delta_p",
                                           "cross", "log_z_ref"};

typedef struct stats_context {
    const qllm_logit_ops *ops;
    qllm_logit_rows ref, test;
    double *temperatures; /* (n_temperatures), owned */
    int64_t n_temperatures;
    const int64_t *targets; /* (n), or NULL */
    double *stats[N_STATS]; /* (n, n_temperatures) each */
    uint8_t *same_top;      /* (n) */
} stats_context;

static qllm_status stats_row(void *context, int64_t row, void *scratch, qllm_error *error)
{
    stats_context *c = context;
    int64_t start = row * c->n_temperatures, vocab = c->ref.vocab;
    double **s = c->stats;
    const qllm_logit_stats out = {s[0] + start, s[1] + start, s[2] + start, s[3] + start,
                                  s[4] + start, s[5] + start, s[6] + start, s[7] + start,
                                  s[8] + start, s[9] + start};
    int same_top = 0;
    qllm_status status = qllm_logit_stats_row(
        c->ops, c->ref.data + row * vocab, c->test.data + row * vocab, vocab, c->temperatures,
        c->n_temperatures, c->targets ? c->targets[row] : -1, scratch, &out, &same_top, error);
    c->same_top[row] = (uint8_t)same_top;
    return status;
}

static int parse_temperatures(const qllm_state *state, PyObject *object, stats_context *c)
{
    qllm_error error;
    Py_ssize_t length = qllm_sequence_length(object);
    c->n_temperatures = length < 0 ? 1 : length;
    if (length == 0) {
        qllm_raise_value(state, "temperatures: expected at least one, found none");
        return -1;
    }
    if (qllm_alloc((void **)&c->temperatures, c->n_temperatures, sizeof(double),
                   "the temperatures", &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    for (int64_t t = 0; t < c->n_temperatures; t++) {
        PyObject *item = qllm_item_of(state, object, t, c->n_temperatures, "temperatures");
        int failed = item == NULL ||
                     qllm_to_double(state, item, "temperatures", &c->temperatures[t]) < 0;
        Py_XDECREF(item);
        if (failed)
            return -1;
    }
    return 0;
}

static int parse_pair(const qllm_state *state, PyObject *ref, PyObject *test, stats_context *c)
{
    if (qllm_parse_rows(state, ref, "ref", &c->ref) < 0 ||
        qllm_parse_rows(state, test, "test", &c->test) < 0)
        return -1;
    const qllm_logit_rows *a = &c->ref, *b = &c->test;
    if (a->single == b->single && a->n == b->n && a->vocab == b->vocab)
        return 0;
    qllm_raise_value(state, "test: expected the shape of ref, %lld rows of %lld tokens in %d "
                     "dimension(s), found %lld rows of %lld tokens in %d", (long long)a->n,
                     (long long)a->vocab, 2 - a->single, (long long)b->n, (long long)b->vocab,
                     2 - b->single);
    return -1;
}

/* The dict with its arrays, uninitialised; their data go into the context. */
static PyObject *new_results(stats_context *c)
{
    const int64_t shape[2] = {c->ref.n, c->n_temperatures};
    PyObject *dict = PyDict_New();
    for (int i = 0; dict != NULL && i <= N_STATS; i++) {
        PyObject *array = i < N_STATS
            ? qllm_array_new(QLLM_ARRAY_F64, 2 - c->ref.single, shape + c->ref.single,
                             (void **)&c->stats[i])
            : qllm_array_new(QLLM_ARRAY_U8, 1, &c->ref.n, (void **)&c->same_top);
        if (array == NULL ||
            PyDict_SetItemString(dict, i < N_STATS ? STATS[i] : "same_top", array) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(array);
    }
    return dict;
}

/* logits handled in one row, for the pace of Ctrl-C; saturates */
static int64_t work_per_row(const stats_context *c)
{
    int64_t work = INT64_MAX;
    return qllm_checked_mul(c->ref.vocab, c->n_temperatures, &work) ? work : INT64_MAX;
}

/* All rows here, on `threads` threads. */
static int run_on_host(qllm_state *state, stats_context *c, int threads)
{
    const qllm_row_work work = {stats_row, c, qllm_logit_stats_scratch(c->ref.vocab),
                                work_per_row(c), threads};
    return qllm_each_row(state, &c->ref, &work);
}

/* All rows on a decoder's device. */
static int run_on_device(const qllm_state *state, stats_context *c, qllm_decoder_object *decoder)
{
    double **s = c->stats;
    const qllm_logit_stats out = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]};
    qllm_error error;
    qllm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = decoder->backend->logit_stats(decoder->decoder, c->ref.data, c->test.data, c->ref.n,
                                           c->temperatures, c->n_temperatures, c->targets, &out,
                                           c->same_top, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        qllm_raise(state, &error);
    return status == QLLM_OK ? 0 : -1;
}

/* The decoder on whose device rows of that width are to be compared, NULL for here; -1 with an
 * exception. */
static int take_decoder(const qllm_state *state, PyObject *object, int64_t vocab,
                        qllm_decoder_object **out)
{
    *out = NULL;
    if (object == Py_None)
        return 0;
    if (!Py_IS_TYPE(object, state->decoder_type)) {
        PyErr_Format(PyExc_TypeError, "decoder: expected a Decoder, found %s",
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    qllm_decoder_object *decoder = (qllm_decoder_object *)object;
    if (decoder->backend->logit_stats == NULL)
        return 0;
    int64_t known = qllm_embedding_slot(decoder).rows;
    if (known != vocab) {
        qllm_raise_value(state, "ref: rows of %lld tokens, but the decoder knows %lld",
                         (long long)vocab, (long long)known);
        return -1;
    }
    *out = decoder;
    return 0;
}

static PyObject *py_logit_stats(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ref", "test", "temperatures", "targets", "isa", "threads",
                            "decoder", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *ref, *test, *temperatures, *targets = Py_None, *target_array = NULL, *result = NULL;
    PyObject *threads = Py_None, *object = Py_None;
    qllm_decoder_object *decoder;
    const char *isa = NULL;
    stats_context c;
    int count, failed;
    memset(&c, 0, sizeof c);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO|O$zOO:logit_stats", names, &ref, &test,
                                     &temperatures, &targets, &isa, &threads, &object) ||
        qllm_parse_threads(state, threads, &count) < 0 ||
        (c.ops = qllm_choose_logit_ops(state, isa)) == NULL)
        return NULL;
    if (parse_pair(state, ref, test, &c) < 0 || parse_temperatures(state, temperatures, &c) < 0 ||
        take_decoder(state, object, c.ref.vocab, &decoder) < 0)
        goto out;
    if (targets != Py_None) {
        target_array = qllm_parse_tokens(state, targets, &c.ref, "targets");
        if (target_array == NULL)
            goto out;
        c.targets = qllm_array_data(target_array);
    }
    result = new_results(&c);
    if (result != NULL) {
        failed = decoder != NULL ? run_on_device(state, &c, decoder)
                                 : run_on_host(state, &c, count);
        if (failed < 0)
            Py_CLEAR(result);
    }
out:
    Py_XDECREF(target_array);
    Py_XDECREF(c.ref.array);
    Py_XDECREF(c.test.array);
    qllm_free(c.temperatures);
    return result;
}

static PyMethodDef functions[] = {
    {"logit_stats", (PyCFunction)(void (*)(void))py_logit_stats, METH_VARARGS | METH_KEYWORDS,
     "logit_stats($module, ref, test, temperatures, targets=None, *, isa=None, threads=None, "
     "decoder=None)\n"
     "--\n\n"
     "Compares rows of logits, (vocab) or (n, vocab) float32, at all temperatures: a dict of kl, "
     "kl_reverse, tv, disagreement, entropy_ref, entropy_test, max_ref, delta_p, cross, log_z_ref, "
     "float64 (n, n_temperatures), or (n_temperatures) for one row, and same_top, uint8 (n). See "
     "qllm.logit_stats."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_logit_stats(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
