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

/* Work on rows: `row` is called once for each, with memory of its thread; it must not touch Python
 * objects, and what it writes must not depend on the order of the rows. */
typedef struct qllm_row_work {
    qllm_status (*row)(void *context, int64_t row, void *scratch, qllm_error *error);
    void *context;
    int64_t scratch; /* bytes */
    int64_t logits;  /* handled in one row: for the pace of Ctrl-C and the use of threads */
    int threads;     /* as in qllm_threads_create */
} qllm_row_work;

/* Does the work on all rows without the GIL, on several threads where it is long, looking for
 * Ctrl-C now and then; 0, or -1 with an exception that names the first row that failed. */
int qllm_each_row(qllm_state *state, const qllm_logit_rows *logits, const qllm_row_work *work);

/* The array (n) as it is, or its first number where the logits were one row; steals `array`. */
PyObject *qllm_row_result(PyObject *array, int single);

#endif
