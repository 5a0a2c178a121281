/* The description of a decoder as it comes from Python. */
#ifndef QLLM_PYTHON_PY_DECODER_H
#define QLLM_PYTHON_PY_DECODER_H

#include "decoder/config.h"
#include "python/state.h"

enum { QLLM_CONFIG_ARRAYS = 2 };

typedef struct qllm_parsed_config {
    qllm_decoder_config config;           /* points into the arrays */
    PyObject *arrays[QLLM_CONFIG_ARRAYS]; /* owned, or NULL */
} qllm_parsed_config;

/* Reads the fields of decoder/config.h from a dict: every key must be known and every field that
 * applies present with the right type; array lengths are checked, ranges are left to
 * qllm_decoder_config_check.  0, or -1 with an exception set; clear it in both cases. */
int qllm_parse_config(const qllm_state *state, PyObject *dict, qllm_parsed_config *out);
void qllm_parsed_config_clear(qllm_parsed_config *parsed);

#endif
