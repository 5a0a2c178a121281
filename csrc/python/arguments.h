/* Arguments of functions over rows of logits: numbers, one value or one for each row, and the loop
 * over the rows.  Every parse function raises QllmValueError with a sentence that names `name`. */
#ifndef QLLM_PYTHON_ARGUMENTS_H
#define QLLM_PYTHON_ARGUMENTS_H

#include "python/state.h"

/* The length of a list, tuple, array or the like; -1 for anything that is one value. */
Py_ssize_t qllm_sequence_length(PyObject *object);

/* One number; 0, or -1 with an exception.  Python and NumPy numbers are taken, booleans are not:
 * True as a temperature, seed or token is nearly always a mistake.  The integers refuse floats. */
int qllm_to_double(const qllm_state *state, PyObject *object, const char *name, double *out);
int qllm_to_int64(const qllm_state *state, PyObject *object, const char *name, int64_t *out);
int qllm_to_uint(const qllm_state *state, PyObject *object, const char *name, int bits,
                    uint64_t *out); /* bits 32 or 64 */

/* Rows of logits, (vocab) or (n, vocab) float32. */
typedef struct qllm_logit_rows {
    PyObject *array; /* owned */
    const float *data;
    int64_t n, vocab;
    int single; /* the logits had one dimension, so the results have one fewer */
} qllm_logit_rows;

int qllm_parse_rows(const qllm_state *state, PyObject *object, const char *name,
                    qllm_logit_rows *out);

/* The value of row `row` in a parameter that is one value or a sequence of n: a new reference, or
 * NULL with an exception. */
PyObject *qllm_item_of(const qllm_state *state, PyObject *object, int64_t row, int64_t n,
                       const char *name);

/* Token ids, one for each row, and for a single row a plain number too: an int64 array (n), new. */
PyObject *qllm_parse_tokens(const qllm_state *state, PyObject *object,
                            const qllm_logit_rows *logits, const char *name);

/* One row of work; it must not touch Python objects. */
typedef qllm_status (*qllm_row_function)(void *context, int64_t row, qllm_error *error);

/* Runs the function on all rows without the GIL, looking for Ctrl-C now and then (work_per_row in
 * logits); 0, or -1 with an exception that names the row. */
int qllm_each_row(const qllm_state *state, const qllm_logit_rows *logits, int64_t work_per_row,
                  qllm_row_function function, void *context);

/* The array (n) as it is, or its first number where the logits were one row; steals `array`. */
PyObject *qllm_row_result(PyObject *array, int single);

#endif
