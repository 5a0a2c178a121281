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
    char device[32]; /* as it was asked for: "cpu", "cuda:1" */
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
PyObject *qllm_decoder_set_random(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_tie_embedding(PyObject *object, PyObject *unused);
PyObject *qllm_decoder_linear_error(PyObject *object, PyObject *args, PyObject *kwargs);

/* Methods of Decoder in py_decoder_step.c. */
PyObject *qllm_decoder_step(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_embed(PyObject *object, PyObject *argument);
PyObject *qllm_decoder_blocks(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *qllm_decoder_head(PyObject *object, PyObject *argument);

/* Method of Decoder in py_decoder_draw.c. */
PyObject *qllm_decoder_step_draw(PyObject *object, PyObject *args, PyObject *kwargs);

/* The arguments of a step in memory of its own: nobody changes them while the GIL is released. */
typedef struct qllm_step_arguments {
    PyObject *objects; /* tuple that keeps the sequences alive */
    qllm_sequence **sequences;
    int64_t *tokens;
    bool *want;
    int64_t n, wanted;
} qllm_step_arguments;

/* Takes them from Python; `step` is zeroed before.  0, or -1 with an exception; clear it in both
 * cases. */
int qllm_take_step(const qllm_state *state, qllm_decoder_object *self, PyObject *sequences,
                   PyObject *tokens, PyObject *want, qllm_step_arguments *step);
void qllm_step_clear(qllm_step_arguments *step);

/* The slot of the embedding (vocab, hidden). */
qllm_slot qllm_embedding_slot(const qllm_decoder_object *self);

/* The device of that name, which may be a plugin that is loaded now (py_device.c), for the module
 * that defines `type`; 0, or -1 with an exception. */
int qllm_find_device(PyTypeObject *type, const char *name, const qllm_backend **out, int *index);

/* Add the functions of py_device.c and the type of py_device_linear.c: part of
 * qllm_setup_decoder. */
int qllm_setup_device(PyObject *module);
int qllm_setup_device_linear(PyObject *module);

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
