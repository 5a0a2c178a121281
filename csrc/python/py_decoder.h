/* What the files of Decoder and Sequence share: the objects, and a config read from a dict. */
#ifndef QLLM_PYTHON_PY_DECODER_H
#define QLLM_PYTHON_PY_DECODER_H

#include "core/backend.h"
#include "decoder/config.h"
#include "python/state.h"

typedef struct qllm_decoder_object {
    PyObject_HEAD
    const qllm_backend *backend;
    qllm_decoder *decoder;
} qllm_decoder_object;

typedef struct qllm_sequence_object {
    PyObject_HEAD
    qllm_decoder_object *owner; /* keeps the decoder alive */
    qllm_sequence *sequence;
} qllm_sequence_object;

/* A new Sequence that takes over `sequence`, also on failure. */
PyObject *qllm_wrap_sequence(qllm_decoder_object *owner, qllm_sequence *sequence);

/* Adds the type to the module: part of qllm_setup_decoder. */
int qllm_setup_sequence(PyObject *module);

/* Methods of Decoder in py_decoder_load.c. */
PyObject *qllm_decoder_load_linear(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_load_embedding(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_tie_embedding(PyObject *object, PyObject *unused);
PyObject *qllm_decoder_linear_error(PyObject *object, PyObject *args, PyObject *kwargs);

/* Methods of Decoder in py_decoder_step.c. */
PyObject *qllm_decoder_step(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_embed(PyObject *object, PyObject *argument);
PyObject *qllm_decoder_blocks(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_head(PyObject *object, PyObject *argument);

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
