#include "python/py_draws.h"

#include <string.h>

#include "core/alloc.h"
#include "core/dtype.h"
#include "core/sampler.h"
#include "python/arguments.h"
#include "python/array.h"

static const char *const names[QLLM_DRAW_PARAMETERS] = {
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "prompt", "step",
    "keep_ties", "round_bf16", "history"};

/* parameters ----------------------------------------------------------------------------------- */

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

static int parse_parameter(const qllm_state *state, PyObject *value, int which, qllm_draw *out)
{
    const char *name = names[which];
    qllm_sampling *sampling = &out->sampling;
    uint64_t wide;
    switch (which) {
    case QLLM_DRAW_TEMPERATURE: return qllm_to_double(state, value, name, &sampling->temperature);
    case QLLM_DRAW_TOP_P: return qllm_to_double(state, value, name, &sampling->top_p);
    case QLLM_DRAW_MIN_P: return qllm_to_double(state, value, name, &sampling->min_p);
    case QLLM_DRAW_KEEP_TIES: return to_flag(state, value, name, &sampling->keep_ties);
    case QLLM_DRAW_ROUND_BF16: return to_flag(state, value, name, &out->round_bf16);
    case QLLM_DRAW_PENALTY:
        return qllm_to_double(state, value, name, &sampling->repetition_penalty);
    case QLLM_DRAW_SEED: return qllm_to_uint(state, value, name, 64, &sampling->seed);
    case QLLM_DRAW_PROMPT: return qllm_to_uint(state, value, name, 64, &sampling->prompt);
    case QLLM_DRAW_TOP_K:
        if (value == Py_None) {
            sampling->top_k = 0;
            return 0;
        }
        return qllm_to_int64(state, value, name, &sampling->top_k);
    case QLLM_DRAW_STEP:
        if (qllm_to_uint(state, value, name, 32, &wide) < 0)
            return -1;
        out->step = (uint32_t)wide;
        return 0;
    }
    return 0;
}

/* Whether `history` is one sequence of tokens, which then is that of every draw. */
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

static int parse_history(const qllm_state *state, PyObject *history, int single, qllm_draws *draws)
{
    if (history == NULL || history == Py_None)
        return 0;
    int one = is_one_history(history, single);
    PyObject *array = NULL;
    draws->histories = PyList_New(0);
    if (draws->histories == NULL)
        return -1;
    for (int64_t i = 0; i < draws->n; i++) {
        if (i == 0 || !one) {
            PyObject *item = one ? Py_NewRef(history)
                                 : qllm_item_of(state, history, i, draws->n, "history");
            if (item == Py_None) {
                Py_DECREF(item);
                continue;
            }
            array = item ? qllm_array_input(state, item, QLLM_ARRAY_I64, 1, 1, "history") : NULL;
            Py_XDECREF(item);
            int failed = array == NULL || PyList_Append(draws->histories, array) < 0;
            Py_XDECREF(array); /* the list holds it */
            if (failed)
                return -1;
        }
        draws->draw[i].history = qllm_array_data(array);
        draws->draw[i].n_history = qllm_array_size(array);
    }
    return 0;
}

void qllm_draws_clear(qllm_draws *draws)
{
    Py_CLEAR(draws->histories);
    qllm_free(draws->draw);
    draws->draw = NULL;
}

int qllm_parse_draws(const qllm_state *state, PyObject *const parameters[QLLM_DRAW_PARAMETERS],
                     int64_t n, int single, qllm_draws *out)
{
    qllm_error error;
    void *memory;
    *out = (qllm_draws){.n = n};
    if (qllm_alloc(&memory, n, sizeof *out->draw, "the parameters of the rows", &error) !=
        QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    out->draw = memory;
    for (int64_t i = 0; i < n; i++)
        out->draw[i].sampling = qllm_sampling_default();
    for (int which = 0; which < QLLM_DRAW_HISTORY; which++)
        for (int64_t i = 0; parameters[which] != NULL && i < n; i++) {
            PyObject *value = qllm_item_of(state, parameters[which], i, n, names[which]);
            int failed = value == NULL || parse_parameter(state, value, which, &out->draw[i]) < 0;
            Py_XDECREF(value);
            if (failed)
                return -1;
        }
    return parse_history(state, parameters[QLLM_DRAW_HISTORY], single, out);
}

/* on the host ---------------------------------------------------------------------------------- */

static int64_t rounded_offset(int64_t vocab)
{
    return (qllm_sample_scratch(vocab) + 63) / 64 * 64;
}

int64_t qllm_draw_scratch(int64_t vocab)
{
    return rounded_offset(vocab) + vocab * (int64_t)sizeof(float);
}

qllm_status qllm_draw_row(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                          const qllm_draw *draw, void *scratch, qllm_sampled *out,
                          qllm_error *error)
{
    if (draw->round_bf16) {
        float *rounded = (float *)((char *)scratch + rounded_offset(vocab));
        for (int64_t i = 0; i < vocab; i++)
            rounded[i] = qllm_bf16_to_float(qllm_float_to_bf16(logits[i]));
        logits = rounded;
    }
    return qllm_sample(ops, logits, vocab, &draw->sampling, draw->history, draw->n_history,
                       draw->step, scratch, out, error);
}

/* results -------------------------------------------------------------------------------------- */

PyObject *qllm_sampled_new(int64_t n, qllm_sampled_arrays *out)
{
    PyObject *tuple = PyTuple_New(3);
    void **const data[3] = {(void **)&out->tokens, (void **)&out->logprobs,
                            (void **)&out->sampling_logprobs};
    for (int i = 0; tuple != NULL && i < 3; i++) {
        PyObject *array = qllm_array_new(i == 0 ? QLLM_ARRAY_I64 : QLLM_ARRAY_F32, 1, &n, data[i]);
        if (array == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, array);
    }
    return tuple;
}

void qllm_write_sampled(const qllm_sampled *sampled, int64_t i, const qllm_sampled_arrays *out)
{
    out->tokens[i] = sampled->token;
    out->logprobs[i] = sampled->logprob;
    out->sampling_logprobs[i] = sampled->sampling_logprob;
}

PyObject *qllm_sampled_result(PyObject *tuple, int single)
{
    PyObject *numbers[3] = {NULL}, *result = NULL;
    if (!single || tuple == NULL)
        return tuple;
    for (int i = 0; i < 3; i++)
        numbers[i] = qllm_row_result(Py_NewRef(PyTuple_GET_ITEM(tuple, i)), single);
    if (numbers[0] && numbers[1] && numbers[2])
        result = PyTuple_Pack(3, numbers[0], numbers[1], numbers[2]);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(numbers[i]);
    Py_DECREF(tuple);
    return result;
}
