/* Draws as functions of Python take them: parameters that are one value, or a sequence with one for
 * each draw; and the arrays that they fill. */
#ifndef QLLM_PYTHON_PY_DRAWS_H
#define QLLM_PYTHON_PY_DRAWS_H

#include "core/backend.h"
#include "core/logit_ops.h"
#include "python/state.h"

/* The parameters, each NULL where the caller left it out. */
enum { QLLM_DRAW_TEMPERATURE, QLLM_DRAW_TOP_K, QLLM_DRAW_TOP_P, QLLM_DRAW_MIN_P, QLLM_DRAW_PENALTY,
       QLLM_DRAW_SEED, QLLM_DRAW_PROMPT, QLLM_DRAW_STEP, QLLM_DRAW_KEEP_TIES, QLLM_DRAW_ROUND_BF16,
       QLLM_DRAW_HISTORY, QLLM_DRAW_PARAMETERS };

typedef struct qllm_draws {
    int64_t n;
    qllm_draw *draw;     /* (n), each with row 0 */
    PyObject *histories; /* keeps the token arrays alive */
} qllm_draws;

/* n draws; `single`: the history is that of the one draw there is.  0, or -1 with an exception;
 * clear in both cases. */
int qllm_parse_draws(const qllm_state *state, PyObject *const parameters[QLLM_DRAW_PARAMETERS],
                     int64_t n, int single, qllm_draws *out);
void qllm_draws_clear(qllm_draws *draws);

/* One draw on the host from its row of logits (vocab), as step_draw of core/backend.h defines it;
 * `scratch` is 64-byte aligned memory of qllm_draw_scratch(vocab) bytes. */
int64_t qllm_draw_scratch(int64_t vocab);
qllm_status qllm_draw_row(const qllm_logit_ops *ops, const float *logits, int64_t vocab,
                          const qllm_draw *draw, void *scratch, qllm_sampled *out,
                          qllm_error *error);

/* A new tuple of tokens int64, logprobs float32 and sampling_logprobs float32, each (n), and where
 * their data lie. */
typedef struct qllm_sampled_arrays {
    int64_t *tokens;
    float *logprobs, *sampling_logprobs;
} qllm_sampled_arrays;
PyObject *qllm_sampled_new(int64_t n, qllm_sampled_arrays *out);
void qllm_write_sampled(const qllm_sampled *sampled, int64_t i, const qllm_sampled_arrays *out);

/* The tuple as it is, or of plain numbers where there was one row of logits; steals `tuple`. */
PyObject *qllm_sampled_result(PyObject *tuple, int single);

#endif
