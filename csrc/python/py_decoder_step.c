/* The methods of Decoder that compute: a step, and its three parts. */
#include <string.h>

#include "core/alloc.h"
#include "python/array.h"
#include "python/py_decoder.h"

void qllm_step_clear(qllm_step_arguments *step)
{
    Py_CLEAR(step->objects);
    qllm_free(step->sequences);
    qllm_free(step->tokens);
    qllm_free(step->want);
}

static int take_sequences(const qllm_state *state, qllm_decoder_object *self, PyObject *list,
                          qllm_step_arguments *step)
{
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
        PyErr_Format(PyExc_TypeError, "sequences: expected a list of Sequence, found %s",
                     Py_TYPE(list)->tp_name);
        return -1;
    }
    step->objects = PySequence_Tuple(list);
    if (step->objects == NULL)
        return -1;
    step->n = (int64_t)PyTuple_GET_SIZE(step->objects);
    void *memory[3] = {NULL, NULL, NULL};
    const int64_t sizes[3] = {sizeof(qllm_sequence *), sizeof(int64_t), sizeof(bool)};
    qllm_error error;
    qllm_status status = QLLM_OK;
    for (int i = 0; i < 3 && status == QLLM_OK; i++)
        status = qllm_alloc(&memory[i], step->n, sizes[i], "the rows of a step", &error);
    step->sequences = memory[0];
    step->tokens = memory[1];
    step->want = memory[2];
    if (status != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    for (int64_t i = 0; i < step->n; i++) {
        PyObject *item = PyTuple_GET_ITEM(step->objects, (Py_ssize_t)i);
        if (!Py_IS_TYPE(item, state->sequence_type)) {
            PyErr_Format(PyExc_TypeError, "sequences[%lld]: expected a Sequence, found %s",
                         (long long)i, Py_TYPE(item)->tp_name);
            return -1;
        }
        if (((qllm_sequence_object *)item)->owner != self) {
            qllm_raise_value(state, "sequences[%lld]: made by another decoder; use this decoder's "
                             "sequence()", (long long)i);
            return -1;
        }
        step->sequences[i] = ((qllm_sequence_object *)item)->sequence;
    }
    return 0;
}

/* Copies an array of n values of `size` bytes each. */
static int take_values(const qllm_state *state, PyObject *object, qllm_array_kind kind, int64_t n,
                       size_t size, const char *name, void *out)
{
    PyObject *array = qllm_array_input(state, object, kind, 1, 1, name);
    if (array == NULL)
        return -1;
    int fits = qllm_array_size(array) == n;
    if (fits)
        memcpy(out, qllm_array_data(array), (size_t)n * size);
    else
        qllm_raise_value(state, "%s: %lld values for %lld sequences, expected one for each", name,
                         (long long)qllm_array_size(array), (long long)n);
    Py_DECREF(array);
    return fits ? 0 : -1;
}

qllm_slot qllm_embedding_slot(const qllm_decoder_object *self)
{
    qllm_slot slot;
    Py_BEGIN_ALLOW_THREADS
    self->backend->slot(self->decoder, 0, &slot);
    Py_END_ALLOW_THREADS
    return slot;
}

int qllm_take_step(const qllm_state *state, qllm_decoder_object *self, PyObject *sequences,
                   PyObject *tokens, PyObject *want, qllm_step_arguments *step)
{
    if (take_sequences(state, self, sequences, step) < 0 ||
        take_values(state, tokens, QLLM_ARRAY_I64, step->n, sizeof(int64_t), "tokens",
                    step->tokens) < 0)
        return -1;
    if (want != Py_None && take_values(state, want, QLLM_ARRAY_BOOL, step->n, sizeof(bool), "want",
                                       step->want) < 0)
        return -1;
    for (int64_t i = 0; i < step->n; i++) {
        step->want[i] = want == Py_None || step->want[i];
        step->wanted += step->want[i];
    }
    return 0;
}

PyObject *qllm_decoder_step(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequences", "tokens", "want", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *list, *tokens, *want = Py_None, *logits = NULL;
    qllm_step_arguments step = {0};
    qllm_error error;
    qllm_status status;
    void *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O:step", names, &list, &tokens, &want))
        return NULL;
    if (qllm_take_step(state, self, list, tokens, want, &step) == 0) {
        int64_t shape[2] = {step.wanted, qllm_embedding_slot(self).rows};
        logits = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data);
    }
    if (logits != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->step(self->decoder, step.sequences, step.tokens, step.want, step.n,
                                     data, &error);
        Py_END_ALLOW_THREADS
        if (status != QLLM_OK) {
            Py_CLEAR(logits);
            qllm_raise(state, &error);
        }
    }
    qllm_step_clear(&step);
    return logits;
}

/* The parts of a step -------------------------------------------------------------------------- */

/* A new reference to hidden states (n, width) as they were given, or NULL. */
static PyObject *take_hidden(const qllm_state *state, PyObject *object, int64_t width, int64_t *n)
{
    PyObject *array = qllm_array_input(state, object, QLLM_ARRAY_F32, 2, 2, "hidden");
    if (array == NULL)
        return NULL;
    *n = qllm_array_dim(array, 0);
    if (qllm_array_dim(array, 1) == width)
        return array;
    qllm_raise_value(state, "hidden: rows of %lld values, expected %lld",
                     (long long)qllm_array_dim(array, 1), (long long)width);
    Py_DECREF(array);
    return NULL;
}

/* The result of a call, or its exception. */
static PyObject *result_of(const qllm_state *state, PyObject *result, qllm_status status,
                           const qllm_error *error)
{
    if (status == QLLM_OK)
        return result;
    Py_DECREF(result);
    return qllm_raise(state, error);
}

PyObject *qllm_decoder_embed(PyObject *object, PyObject *argument)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    qllm_error error;
    qllm_status status = QLLM_OK;
    void *data;
    PyObject *tokens = qllm_array_input(state, argument, QLLM_ARRAY_I64, 1, 1, "tokens");
    if (tokens == NULL)
        return NULL;
    int64_t shape[2] = {qllm_array_size(tokens), qllm_embedding_slot(self).cols};
    const int64_t *ids = qllm_array_data(tokens);
    PyObject *hidden = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data);
    if (hidden != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->embed(self->decoder, ids, shape[0], data, &error);
        Py_END_ALLOW_THREADS
        hidden = result_of(state, hidden, status, &error);
    }
    Py_DECREF(tokens);
    return hidden;
}

PyObject *qllm_decoder_blocks(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequences", "hidden", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *list, *given, *hidden = NULL, *result = NULL;
    qllm_step_arguments step = {0};
    qllm_error error;
    qllm_status status;
    int64_t shape[2];
    void *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:blocks", names, &list, &given))
        return NULL;
    shape[1] = qllm_embedding_slot(self).cols;
    if (take_sequences(state, self, list, &step) == 0)
        hidden = take_hidden(state, given, shape[1], &shape[0]);
    if (hidden != NULL && shape[0] != step.n)
        qllm_raise_value(state, "hidden: %lld rows for %lld sequences, expected one for each",
                         (long long)shape[0], (long long)step.n);
    else if (hidden != NULL)
        result = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data);
    if (result != NULL) {
        memcpy(data, qllm_array_data(hidden), (size_t)(shape[0] * shape[1]) * sizeof(float));
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->blocks(self->decoder, step.sequences, step.n, data, &error);
        Py_END_ALLOW_THREADS
        result = result_of(state, result, status, &error);
    }
    Py_XDECREF(hidden);
    qllm_step_clear(&step);
    return result;
}

PyObject *qllm_decoder_head(PyObject *object, PyObject *argument)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    const qllm_slot embedding = qllm_embedding_slot(self);
    qllm_error error;
    qllm_status status;
    int64_t shape[2] = {0, embedding.rows};
    void *data;
    PyObject *hidden = take_hidden(state, argument, embedding.cols, &shape[0]);
    if (hidden == NULL)
        return NULL;
    PyObject *logits = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data);
    if (logits != NULL) {
        const float *values = qllm_array_data(hidden);
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->head(self->decoder, values, shape[0], data, &error);
        Py_END_ALLOW_THREADS
        logits = result_of(state, logits, status, &error);
    }
    Py_DECREF(hidden);
    return logits;
}
