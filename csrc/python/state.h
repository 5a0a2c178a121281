/* What the files of the extension share: the module's state, the way from a qllm_error to a Python
 * exception, and the setup function of each file. */
#ifndef QLLM_PYTHON_STATE_H
#define QLLM_PYTHON_STATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core/status.h"
#include "cpu/threads.h"

typedef struct qllm_state {
    PyObject *value_error;       /* qllm.errors.QllmValueError */
    PyObject *memory_error;      /* QllmMemoryError */
    PyObject *unsupported_error; /* QllmUnsupportedError */
    PyObject *base_error;        /* QllmError */
    PyTypeObject *quantized_tensor_type;
    PyTypeObject *decoder_type;
    PyTypeObject *sequence_type;
    struct qllm_pools *pools; /* thread pools, py_cpu.c */
    qllm_team team;           /* where products of other libraries' tensors run, if it is set */
} qllm_state;

extern PyModuleDef qllm_core_module;

qllm_state *qllm_state_of(PyObject *module);

/* The state of the module that defines `type`, for use in methods of heap types. */
qllm_state *qllm_state_of_type(PyTypeObject *type);

/* Raises the exception class of error->status with error->text; returns NULL. */
PyObject *qllm_raise(const qllm_state *state, const qllm_error *error);

/* Raises QllmValueError with a formatted sentence (format of PyErr_Format); returns NULL. */
PyObject *qllm_raise_value(const qllm_state *state, const char *format, ...);

/* Each adds the functions and types of one file to the module; 0, or -1 with an exception set. */
int qllm_setup_quant(PyObject *module);
int qllm_setup_sampler(PyObject *module);
int qllm_setup_logit_stats(PyObject *module);
int qllm_setup_cpu(PyObject *module);
int qllm_setup_decoder(PyObject *module);

/* Ends the threads of the shared pools (py_cpu.c); part of freeing the module. */
void qllm_free_pools(qllm_state *state);

#endif
