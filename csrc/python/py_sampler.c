/* sample, distribution, logprobs, and the noise they stand on. */
#include <string.h>

#include "core/alloc.h"
#include "core/rng.h"
#include "core/sampler.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_draws.h"

/* Rows of logits and what is drawn from each. */
typedef struct batch {
    const qllm_logit_ops *ops;
    qllm_logit_rows logits;
    qllm_draws draws;
    int threads;
} batch;

static void batch_free(batch *b)
{
    Py_XDECREF(b->logits.array);
    qllm_draws_clear(&b->draws);
}

/* Reads all arguments of sample and distribution.  On failure the batch is to be freed too. */
static int batch_parse(const qllm_state *state, PyObject *logits,
                       PyObject *const parameters[QLLM_DRAW_PARAMETERS], const char *isa,
                       PyObject *threads, batch *b)
{
    memset(b, 0, sizeof *b);
    b->ops = qllm_choose_logit_ops(state, isa);
    if (b->ops == NULL || qllm_parse_threads(state, threads, &b->threads) < 0 ||
        qllm_parse_rows(state, logits, "logits", &b->logits) < 0)
        return -1;
    return qllm_parse_draws(state, parameters, b->logits.n, b->logits.single, &b->draws);
}

/* --------------------------------------------------------------------------- sample and friends */

typedef struct sample_context {
    batch batch;
    qllm_sampled_arrays out;
    float *probabilities;
} sample_context;

static qllm_status sample_row(void *context, int64_t row, void *scratch, qllm_error *error)
{
    sample_context *c = context;
    const batch *b = &c->batch;
    qllm_sampled sampled;
    qllm_status status = qllm_draw_row(b->ops, b->logits.data + row * b->logits.vocab,
                                       b->logits.vocab, &b->draws.draw[row], scratch, &sampled,
                                       error);
    if (status == QLLM_OK)
        qllm_write_sampled(&sampled, row, &c->out);
    return status;
}

static qllm_status distribution_row(void *context, int64_t row, void *scratch,
                                    qllm_error *error)
{
    sample_context *c = context;
    const batch *b = &c->batch;
    const qllm_draw *draw = &b->draws.draw[row];
    int64_t start = row * b->logits.vocab;
    return qllm_distribution(b->ops, b->logits.data + start, b->logits.vocab, &draw->sampling,
                             draw->history, draw->n_history, scratch, c->probabilities + start,
                             error);
}

/* Draws or writes down every row of a batch. */
static int each_row(qllm_state *state, sample_context *c,
                    qllm_status (*row)(void *, int64_t, void *, qllm_error *))
{
    const qllm_logit_rows *r = &c->batch.logits;
    const qllm_row_work work = {row, c, qllm_draw_scratch(r->vocab), r->vocab, c->batch.threads};
    return qllm_each_row(state, r, &work);
}

static PyObject *py_sample(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "min_p",
                            "repetition_penalty", "seed", "prompt", "step", "keep_ties",
                            "round_bf16", "history", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *logits, *p[QLLM_DRAW_PARAMETERS] = {NULL}, *result = NULL, *threads = Py_None;
    const char *isa = NULL;
    sample_context c;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOOOOOzO:sample", names, &logits, &p[0],
                                     &p[1], &p[2], &p[3], &p[4], &p[5], &p[6], &p[7], &p[8], &p[9],
                                     &p[10], &isa, &threads))
        return NULL;
    if (batch_parse(state, logits, p, isa, threads, &c.batch) == 0 &&
        (result = qllm_sampled_new(c.batch.logits.n, &c.out)) != NULL) {
        if (each_row(state, &c, sample_row) < 0)
            Py_CLEAR(result);
        else
            result = qllm_sampled_result(result, c.batch.logits.single);
    }
    batch_free(&c.batch);
    return result;
}

static PyObject *py_distribution(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", "min_p",
                            "repetition_penalty", "keep_ties", "history", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *logits, *p[QLLM_DRAW_PARAMETERS] = {NULL}, *result = NULL;
    PyObject *threads = Py_None;
    const char *isa = NULL;
    sample_context c;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOOOOOOzO:distribution", names, &logits,
                                     &p[QLLM_DRAW_TEMPERATURE], &p[QLLM_DRAW_TOP_K],
                                     &p[QLLM_DRAW_TOP_P], &p[QLLM_DRAW_MIN_P],
                                     &p[QLLM_DRAW_PENALTY], &p[QLLM_DRAW_KEEP_TIES],
                                     &p[QLLM_DRAW_HISTORY], &isa, &threads))
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
     "repetition_penalty=1.0, seed=0, prompt=0, step=0, keep_ties=False, round_bf16=False, "
     "history=None, isa=None, threads=None)\n"
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
