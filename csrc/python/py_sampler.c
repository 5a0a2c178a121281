/* sample, distribution, logprobs, and the noise they stand on. */
#include <string.h>

#include "core/alloc.h"
#include "core/rng.h"
#include "core/sampler.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"

/* What qllm_sample needs for each row; `histories` keeps the token arrays alive. */
typedef struct batch {
    const qllm_logit_ops *ops;
    qllm_logit_rows logits;
    qllm_sampling *sampling; /* (n) */
    uint32_t *steps;         /* (n) */
    const int64_t **history; /* (n) */
    int64_t *n_history;      /* (n) */
    PyObject *histories;
    int threads;
} batch;

/* The parameters in the order of PARAMETERS, each NULL where the caller left it out. */
enum { TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, SEED, PROMPT, STEP, KEEP_TIES, HISTORY,
       N_PARAMETERS };
static const char *const PARAMETERS[N_PARAMETERS] = {
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "prompt", "step",
    "keep_ties", "history"};

/* True or False, of Python or NumPy. */
static int to_flag(const qllm_state *state, PyObject *value, const char *name, bool *out)
{
    const char *type = Py_TYPE(value)->tp_name;
    if (!PyBool_Check(value) && strncmp(type, "numpy.bool", 10) != 0) {
        qllm_raise_value(state, "%s: expected True or False, found a %s", name, type);
        return -1;
    }
    int found = PyObject_IsTrue(value);
    *out = found > 0;
    return found < 0 ? -1 : 0;
}

static int parse_parameter(const qllm_state *state, PyObject *value, int which, qllm_sampling *out,
                           uint32_t *step)
{
    const char *name = PARAMETERS[which];
    uint64_t wide;
    switch (which) {
    case TEMPERATURE: return qllm_to_double(state, value, name, &out->temperature);
    case TOP_P: return qllm_to_double(state, value, name, &out->top_p);
    case MIN_P: return qllm_to_double(state, value, name, &out->min_p);
    case KEEP_TIES: return to_flag(state, value, name, &out->keep_ties);
    case PENALTY: return qllm_to_double(state, value, name, &out->repetition_penalty);
    case SEED: return qllm_to_uint(state, value, name, 64, &out->seed);
    case PROMPT: return qllm_to_uint(state, value, name, 64, &out->prompt);
    case TOP_K:
        if (value == Py_None) {
            out->top_k = 0;
            return 0;
        }
        return qllm_to_int64(state, value, name, &out->top_k);
    case STEP:
        if (qllm_to_uint(state, value, name, 32, &wide) < 0)
            return -1;
        *step = (uint32_t)wide;
        return 0;
    }
    return 0;
}

/* Whether `history` is one sequence of tokens, which then is that of every row. */
static int is_one_history(PyObject *history, int single)
{
    if (single || qllm_sequence_length(history) <= 0)
        return 1;
    PyObject *first = PySequence_GetItem(history, 0);
    int one = first != NULL && first != Py_None && qllm_sequence_length(first) < 0;
    if (first == NULL)
        PyErr_Clear();
    Py_XDECREF(first);
    return one;
}

static int parse_history(const qllm_state *state, PyObject *history, batch *b)
{
    if (history == NULL || history == Py_None)
        return 0;
    int one = is_one_history(history, b->logits.single);
    PyObject *array = NULL;
    b->histories = PyList_New(0);
    if (b->histories == NULL)
        return -1;
    for (int64_t row = 0; row < b->logits.n; row++) {
        if (row == 0 || !one) {
            PyObject *item = one ? Py_NewRef(history)
                                 : qllm_item_of(state, history, row, b->logits.n, "history");
            if (item == Py_None) {
                Py_DECREF(item);
                continue;
            }
            array = item ? qllm_array_input(state, item, QLLM_ARRAY_I64, 1, 1, "history") : NULL;
            Py_XDECREF(item);
            int failed = array == NULL || PyList_Append(b->histories, array) < 0;
            Py_XDECREF(array); /* the list holds it */
            if (failed)
                return -1;
        }
        b->history[row] = qllm_array_data(array);
        b->n_history[row] = qllm_array_size(array);
    }
    return 0;
}

static void batch_free(batch *b)
{
    Py_XDECREF(b->logits.array);
    Py_XDECREF(b->histories);
    qllm_free(b->sampling);
    qllm_free(b->steps);
    qllm_free(b->history);
    qllm_free(b->n_history);
}

static int batch_alloc(const qllm_state *state, batch *b)
{
    qllm_error error;
    int64_t n = b->logits.n;
    const char *what = "the parameters of the rows";
    if (qllm_alloc((void **)&b->sampling, n, sizeof *b->sampling, what, &error) != QLLM_OK ||
        qllm_alloc((void **)&b->steps, n, sizeof *b->steps, what, &error) != QLLM_OK ||
        qllm_alloc((void **)&b->history, n, sizeof *b->history, what, &error) != QLLM_OK ||
        qllm_alloc((void **)&b->n_history, n, sizeof *b->n_history, what, &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    return 0;
}

/* Reads all arguments of sample and distribution.  On failure the batch is to be freed too. */
static int batch_parse(const qllm_state *state, PyObject *logits,
                       PyObject *const parameters[N_PARAMETERS], const char *isa, PyObject *threads,
                       batch *b)
{
    memset(b, 0, sizeof *b);
    b->ops = qllm_choose_logit_ops(state, isa);
    if (b->ops == NULL || qllm_parse_threads(state, threads, &b->threads) < 0 ||
        qllm_parse_rows(state, logits, "logits", &b->logits) < 0 || batch_alloc(state, b) < 0)
        return -1;
    int64_t n = b->logits.n;
    for (int64_t row = 0; row < n; row++)
        b->sampling[row] = qllm_sampling_default();
    for (int which = 0; which < HISTORY; which++)
        for (int64_t row = 0; parameters[which] != NULL && row < n; row++) {
            PyObject *value = qllm_item_of(state, parameters[which], row, n, PARAMETERS[which]);
            int failed = value == NULL || parse_parameter(state, value, which, &b->sampling[row],
                                                          &b->steps[row]) < 0;
            Py_XDECREF(value);
            if (failed)
                return -1;
        }
    return parse_history(state, parameters[HISTORY], b);
}

/* --------------------------------------------------------------------------- sample and friends */

typedef struct sample_context {
    batch batch;
    int64_t *tokens;
    float *logprobs, *sampling_logprobs;
    float *probabilities;
} sample_context;

static qllm_status sample_row(void *context, int64_t row, void *scratch, qllm_error *error)
{
    sample_context *c = context;
    const batch *b = &c->batch;
    qllm_sampled sampled;
    qllm_status status = qllm_sample(b->ops, b->logits.data + row * b->logits.vocab,
                                     b->logits.vocab, &b->sampling[row], b->history[row],
                                     b->n_history[row], b->steps[row], scratch, &sampled, error);
    if (status != QLLM_OK)
        return status;
    c->tokens[row] = sampled.token;
    c->logprobs[row] = sampled.logprob;
    c->sampling_logprobs[row] = sampled.sampling_logprob;
    return QLLM_OK;
}

static qllm_status distribution_row(void *context, int64_t row, void *scratch,
                                    qllm_error *error)
{
    sample_context *c = context;
    const batch *b = &c->batch;
    int64_t start = row * b->logits.vocab;
    return qllm_distribution(b->ops, b->logits.data + start, b->logits.vocab, &b->sampling[row],
                             b->history[row], b->n_history[row], scratch,
                             c->probabilities + start, error);
}

/* Draws or writes down every row of a batch. */
static int each_row(qllm_state *state, sample_context *c,
                    qllm_status (*row)(void *, int64_t, void *, qllm_error *))
{
    const qllm_logit_rows *r = &c->batch.logits;
    const qllm_row_work work = {row, c, qllm_sample_scratch(r->vocab), r->vocab, c->batch.threads};
    return qllm_each_row(state, r, &work);
}

static PyObject *py_sample(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "min_p",
                            "repetition_penalty", "seed", "prompt", "step", "keep_ties", "history",
                            "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *logits, *p[N_PARAMETERS] = {NULL}, *arrays[3] = {NULL}, *result = NULL;
    PyObject *threads = Py_None;
    const char *isa = NULL;
    sample_context c;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOOOOzO:sample", names, &logits, &p[0],
                                     &p[1], &p[2], &p[3], &p[4], &p[5], &p[6], &p[7], &p[8], &p[9],
                                     &isa, &threads))
        return NULL;
    if (batch_parse(state, logits, p, isa, threads, &c.batch) < 0)
        goto out;
    const qllm_logit_rows *r = &c.batch.logits;
    arrays[0] = qllm_array_new(QLLM_ARRAY_I64, 1, &r->n, (void **)&c.tokens);
    arrays[1] = qllm_array_new(QLLM_ARRAY_F32, 1, &r->n, (void **)&c.logprobs);
    arrays[2] = qllm_array_new(QLLM_ARRAY_F32, 1, &r->n, (void **)&c.sampling_logprobs);
    if (!arrays[0] || !arrays[1] || !arrays[2] ||
        each_row(state, &c, sample_row) < 0)
        goto out;
    for (int i = 0; i < 3; i++)
        arrays[i] = qllm_row_result(arrays[i], r->single);
    if (arrays[0] && arrays[1] && arrays[2])
        result = PyTuple_Pack(3, arrays[0], arrays[1], arrays[2]);
out:
    for (int i = 0; i < 3; i++)
        Py_XDECREF(arrays[i]);
    batch_free(&c.batch);
    return result;
}

static PyObject *py_distribution(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "min_p",
                            "repetition_penalty", "keep_ties", "history", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *logits, *p[N_PARAMETERS] = {NULL}, *result = NULL;
    PyObject *threads = Py_None;
    const char *isa = NULL;
    sample_context c;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOzO:distribution", names, &logits,
                                     &p[TEMPERATURE], &p[TOP_K], &p[TOP_P], &p[MIN_P], &p[PENALTY],
                                     &p[KEEP_TIES], &p[HISTORY], &isa, &threads))
        return NULL;
    if (batch_parse(state, logits, p, isa, threads, &c.batch) == 0) {
        const qllm_logit_rows *r = &c.batch.logits;
        const int64_t shape[2] = {r->n, r->vocab};
        result = qllm_array_new(QLLM_ARRAY_F32, 2 - r->single, shape + r->single,
                                (void **)&c.probabilities);
        if (result != NULL && each_row(state, &c, distribution_row) < 0)
            Py_CLEAR(result);
    }
    batch_free(&c.batch);
    return result;
}

/* ------------------------------------------------------------------------------------- logprobs */

typedef struct logprob_context {
    const qllm_logit_ops *ops;
    qllm_logit_rows logits;
    const int64_t *tokens;
    double *out;
} logprob_context;

static qllm_status logprob_row(void *context, int64_t row, void *scratch, qllm_error *error)
{
    logprob_context *c = context;
    return qllm_logprob(c->ops, c->logits.data + row * c->logits.vocab, c->logits.vocab,
                        c->tokens[row], scratch, &c->out[row], error);
}

static PyObject *py_logprobs(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "tokens", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *logits, *tokens, *token_array = NULL, *result = NULL;
    PyObject *threads = Py_None;
    const char *isa = NULL;
    logprob_context c = {0};
    qllm_row_work work = {.row = logprob_row, .context = &c};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$zO:logprobs", names, &logits, &tokens,
                                     &isa, &threads) ||
        qllm_parse_threads(state, threads, &work.threads) < 0 ||
        (c.ops = qllm_choose_logit_ops(state, isa)) == NULL)
        return NULL;
    if (qllm_parse_rows(state, logits, "logits", &c.logits) == 0 &&
        (token_array = qllm_parse_tokens(state, tokens, &c.logits, "tokens")) != NULL) {
        c.tokens = qllm_array_data(token_array);
        result = qllm_array_new(QLLM_ARRAY_F64, 1, &c.logits.n, (void **)&c.out);
        work.scratch = qllm_sample_scratch(c.logits.vocab);
        work.logits = c.logits.vocab;
        if (result != NULL && qllm_each_row(state, &c.logits, &work) < 0)
            Py_CLEAR(result);
        result = qllm_row_result(result, c.logits.single);
    }
    Py_XDECREF(token_array);
    Py_XDECREF(c.logits.array);
    return result;
}

/* ---------------------------------------------------------------------------------------- noise */

static PyObject *py_gumbel(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seed", "prompt", "step", "tokens", NULL};
    const qllm_state *state = qllm_state_of(module);
    PyObject *seed_object, *prompt_object, *step_object, *tokens;
    uint64_t seed, prompt, step, token;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:gumbel", names, &seed_object,
                                     &prompt_object, &step_object, &tokens) ||
        qllm_to_uint(state, seed_object, "seed", 64, &seed) < 0 ||
        qllm_to_uint(state, prompt_object, "prompt", 64, &prompt) < 0 ||
        qllm_to_uint(state, step_object, "step", 32, &step) < 0)
        return NULL;
    if (qllm_sequence_length(tokens) < 0) {
        if (qllm_to_uint(state, tokens, "tokens", 32, &token) < 0)
            return NULL;
        return PyFloat_FromDouble(qllm_gumbel(seed, prompt, (uint32_t)step, (uint32_t)token));
    }
    PyObject *ids = qllm_array_input(state, tokens, QLLM_ARRAY_I64, 1, 1, "tokens");
    if (ids == NULL)
        return NULL;
    double *out;
    int64_t n = qllm_array_size(ids);
    const int64_t *data = qllm_array_data(ids);
    PyObject *result = qllm_array_new(QLLM_ARRAY_F64, 1, &n, (void **)&out);
    for (int64_t i = 0; result != NULL && i < n; i++) {
        if (data[i] < 0 || data[i] > UINT32_MAX) {
            qllm_raise_value(state, "tokens: expected ids from 0 to 2^32 - 1, found %lld at "
                             "position %lld", (long long)data[i], (long long)i);
            Py_CLEAR(result);
        } else
            out[i] = qllm_gumbel(seed, prompt, (uint32_t)step, (uint32_t)data[i]);
    }
    Py_DECREF(ids);
    return result;
}

/* `count` 32-bit words from a sequence of so many integers. */
static int parse_words(const qllm_state *state, PyObject *object, Py_ssize_t count,
                       const char *name, uint32_t *out)
{
    if (qllm_sequence_length(object) != count) {
        qllm_raise_value(state, "%s: expected a sequence of %zd integers", name, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        uint64_t word = 0;
        PyObject *item = PySequence_GetItem(object, i);
        int failed = item == NULL || qllm_to_uint(state, item, name, 32, &word) < 0;
        Py_XDECREF(item);
        if (failed)
            return -1;
        out[i] = (uint32_t)word;
    }
    return 0;
}

static PyObject *py_philox(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"counter", "key", NULL};
    const qllm_state *state = qllm_state_of(module);
    PyObject *counter_object, *key_object;
    uint32_t counter[4], key[2], out[4];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:philox", names, &counter_object,
                                     &key_object) ||
        parse_words(state, counter_object, 4, "counter", counter) < 0 ||
        parse_words(state, key_object, 2, "key", key) < 0)
        return NULL;
    qllm_philox(counter, key, out);
    return Py_BuildValue("(kkkk)", (unsigned long)out[0], (unsigned long)out[1],
                         (unsigned long)out[2], (unsigned long)out[3]);
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"sample", (PyCFunction)(void (*)(void))py_sample, KEYWORDS,
     "sample($module, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, "
     "repetition_penalty=1.0, seed=0, prompt=0, step=0, keep_ties=False, history=None, isa=None, "
     "threads=None)\n"
     "--\n\n"
     "Draws a token for each row of logits, (vocab) or (n, vocab) float32: tokens int64, logprobs "
     "float32, sampling_logprobs float32, each (n), or numbers for one row. See qllm.sample."},
    {"distribution", (PyCFunction)(void (*)(void))py_distribution, KEYWORDS,
     "distribution($module, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, "
     "repetition_penalty=1.0, keep_ties=False, history=None, isa=None, threads=None)\n--\n\n"
     "The probabilities that sample draws from, float32 of the shape of logits: exactly 0 for "
     "tokens that were filtered out."},
    {"logprobs", (PyCFunction)(void (*)(void))py_logprobs, KEYWORDS,
     "logprobs($module, logits, tokens, *, isa=None, threads=None)\n--\n\n"
     "log softmax(logits)[token] of each row, (vocab) or (n, vocab) float32, and its token: "
     "float64 (n), or a number for one row."},
    {"gumbel", (PyCFunction)(void (*)(void))py_gumbel, KEYWORDS,
     "gumbel($module, seed, prompt, step, tokens)\n--\n\n"
     "The standard Gumbel noise of tokens: float64 (n), or a number for one token."},
    {"philox", (PyCFunction)(void (*)(void))py_philox, KEYWORDS,
     "philox($module, counter, key)\n--\n\n"
     "Philox4x32-10 of a counter of four and a key of two 32-bit words: a tuple of four."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_sampler(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
