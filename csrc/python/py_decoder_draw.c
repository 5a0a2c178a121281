/* Decoder.step_draw: a step and the draws from its logits, on the device where it offers that. */
#include <string.h>

#include "core/alloc.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_decoder.h"
#include "python/py_draws.h"

typedef struct draw_call {
    qllm_decoder_object *owner;
    qllm_step_arguments step;
    qllm_draws draws;
    qllm_sampled *sampled;  /* (n draws) */
    float *logits;          /* (wanted, vocab), or NULL */
    int64_t vocab;
    const qllm_logit_ops *ops; /* of draws on the host */
    int threads;
} draw_call;

static void clear_call(draw_call *call)
{
    qllm_step_clear(&call->step);
    qllm_draws_clear(&call->draws);
    qllm_free(call->sampled);
}

/* Which wanted row each draw is from, in ascending order. */
static int take_rows(const qllm_state *state, PyObject *rows, draw_call *call)
{
    const int64_t *data = qllm_array_data(rows);
    int64_t last = 0;
    for (int64_t i = 0; i < call->draws.n; i++) {
        if (data[i] < last || data[i] >= call->step.wanted) {
            qllm_raise_value(state, "rows[%lld]: %lld, expected wanted rows in ascending order, "
                             "%lld to %lld", (long long)i, (long long)data[i], (long long)last,
                             (long long)call->step.wanted - 1);
            return -1;
        }
        last = call->draws.draw[i].row = data[i];
    }
    return 0;
}

/* Both on the device. */
static int run_on_device(const qllm_state *state, draw_call *call)
{
    const qllm_backend *backend = call->owner->backend;
    const qllm_step_arguments *step = &call->step;
    qllm_error error;
    qllm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = backend->step_draw(call->owner->decoder, step->sequences, step->tokens, step->want,
                                step->n, call->draws.draw, call->draws.n, call->sampled,
                                call->logits, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        qllm_raise(state, &error);
    return status == QLLM_OK ? 0 : -1;
}

static qllm_status draw_row(void *context, int64_t row, void *scratch, qllm_error *error)
{
    const draw_call *call = context;
    const qllm_draw *draw = &call->draws.draw[row];
    return qllm_draw_row(call->ops, call->logits + draw->row * call->vocab, call->vocab, draw,
                         scratch, &call->sampled[row], error);
}

/* Takes back a step whose draws have failed: its sequences forget the rows. */
static void undo_step(const draw_call *call)
{
    const qllm_backend *backend = call->owner->backend;
    const qllm_step_arguments *step = &call->step;
    for (int64_t i = 0, count = 1; i < step->n; i += count, count = 1) {
        qllm_sequence *sequence = step->sequences[i];
        while (i + count < step->n && step->sequences[i + count] == sequence)
            count++;
        backend->sequence_truncate(sequence, backend->sequence_length(sequence) - count, NULL);
    }
}

/* The step on the device, the draws on the host; needs call->logits. */
static int run_on_host(qllm_state *state, draw_call *call)
{
    const qllm_backend *backend = call->owner->backend;
    const qllm_step_arguments *step = &call->step;
    const qllm_logit_rows rows = {.n = call->draws.n, .vocab = call->vocab};
    const qllm_row_work work = {draw_row, call, qllm_draw_scratch(call->vocab), call->vocab,
                                call->threads};
    qllm_error error;
    qllm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = backend->step(call->owner->decoder, step->sequences, step->tokens, step->want,
                           step->n, call->logits, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    if (qllm_each_row(state, &rows, &work) == 0)
        return 0;
    undo_step(call);
    return -1;
}

/* Runs the call: a tuple (tokens, logprobs, sampling_logprobs, logits or None). */
static PyObject *run(qllm_state *state, draw_call *call, int want_logits)
{
    bool device = call->owner->backend->step_draw != NULL;
    const int64_t shape[2] = {call->step.wanted, call->vocab};
    PyObject *logits = Py_NewRef(Py_None), *drawn, *result = NULL;
    qllm_sampled_arrays arrays;
    void *data = NULL;
    if (want_logits || !device)
        Py_SETREF(logits, qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data));
    call->logits = data;
    drawn = logits != NULL ? qllm_sampled_new(call->draws.n, &arrays) : NULL;
    if (drawn != NULL && (device ? run_on_device(state, call) : run_on_host(state, call)) == 0) {
        for (int64_t i = 0; i < call->draws.n; i++)
            qllm_write_sampled(&call->sampled[i], i, &arrays);
        result = PyTuple_Pack(4, PyTuple_GET_ITEM(drawn, 0), PyTuple_GET_ITEM(drawn, 1),
                              PyTuple_GET_ITEM(drawn, 2), want_logits ? logits : Py_None);
    }
    Py_XDECREF(drawn);
    Py_XDECREF(logits);
    return result;
}

static int take_call(qllm_state *state, PyObject *const objects[4],
                     PyObject *const p[QLLM_DRAW_PARAMETERS], draw_call *call)
{
    qllm_error error;
    if (qllm_take_step(state, call->owner, objects[0], objects[1], objects[2], &call->step) < 0)
        return -1;
    PyObject *rows = qllm_array_input(state, objects[3], QLLM_ARRAY_I64, 1, 1, "rows");
    if (rows == NULL)
        return -1;
    int64_t n = qllm_array_size(rows);
    int failed = qllm_parse_draws(state, p, n, 0, &call->draws) < 0 ||
                 take_rows(state, rows, call) < 0;
    Py_DECREF(rows);
    if (failed)
        return -1;
    if (qllm_alloc((void **)&call->sampled, n, sizeof *call->sampled, "the drawn tokens",
                   &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    return 0;
}

PyObject *qllm_decoder_step_draw(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sequences", "tokens", "want", "rows", "temperature", "top_k", "top_p",
                            "min_p", "repetition_penalty", "seed", "prompt", "step", "keep_ties",
                            "round_bf16", "history", "logits", "threads", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *p[QLLM_DRAW_PARAMETERS] = {NULL}, *objects[4], *threads = Py_None, *result = NULL;
    draw_call call = {.owner = self};
    int logits = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$OOOOOOOOOOOpO:step_draw", names,
                                     &objects[0], &objects[1], &objects[2], &objects[3], &p[0],
                                     &p[1], &p[2], &p[3], &p[4], &p[5], &p[6], &p[7], &p[8], &p[9],
                                     &p[10], &logits, &threads) ||
        qllm_parse_threads(state, threads, &call.threads) < 0 ||
        (call.ops = qllm_choose_logit_ops(state, NULL)) == NULL)
        return NULL;
    if (take_call(state, objects, p, &call) == 0) {
        call.vocab = qllm_embedding_slot(self).rows;
        result = run(state, &call, logits);
    }
    clear_call(&call);
    return result;
}
