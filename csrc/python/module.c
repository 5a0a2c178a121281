/* qllm._core: the extension module.  Everything it offers is added by the setup functions of the
 * other files; here stand its state and its errors. */
#include <string.h>

#include "python/array.h"
#include "python/state.h"

qllm_state *qllm_state_of(PyObject *module)
{
    return (qllm_state *)PyModule_GetState(module);
}

qllm_state *qllm_state_of_type(PyTypeObject *type)
{
    return qllm_state_of(PyType_GetModule(type));
}

PyObject *qllm_raise(const qllm_state *state, const qllm_error *error)
{
    PyObject *type = state->base_error;
    switch (error->status) {
    case QLLM_VALUE: type = state->value_error; break;
    case QLLM_MEMORY: type = state->memory_error; break;
    case QLLM_UNSUPPORTED: type = state->unsupported_error; break;
    case QLLM_OK:
    case QLLM_INTERNAL: break;
    }
    /* the text may have been cut within a character */
    PyObject *text = PyUnicode_DecodeUTF8(error->text, (Py_ssize_t)strlen(error->text), "replace");
    if (text != NULL)
        PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

PyObject *qllm_raise_value(const qllm_state *state, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyErr_FormatV(state->value_error, format, arguments);
    va_end(arguments);
    return NULL;
}

static int import_errors(qllm_state *state)
{
    PyObject *errors = PyImport_ImportModule("qllm.errors");
    if (errors == NULL)
        return -1;
    state->base_error = PyObject_GetAttrString(errors, "QllmError");
    state->value_error = PyObject_GetAttrString(errors, "QllmValueError");
    state->memory_error = PyObject_GetAttrString(errors, "QllmMemoryError");
    state->unsupported_error = PyObject_GetAttrString(errors, "QllmUnsupportedError");
    Py_DECREF(errors);
    return state->base_error && state->value_error && state->memory_error &&
                   state->unsupported_error ? 0 : -1;
}

static int core_exec(PyObject *module)
{
    if (qllm_array_setup() < 0 || import_errors(qllm_state_of(module)) < 0)
        return -1;
    if (qllm_setup_quant(module) < 0 || qllm_setup_sampler(module) < 0 ||
        qllm_setup_logit_stats(module) < 0 ||
        qllm_setup_cpu(module) < 0 || qllm_setup_decoder(module) < 0)
        return -1;
    return 0;
}

static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    qllm_state *state = qllm_state_of(module);
    Py_VISIT(state->base_error);
    Py_VISIT(state->value_error);
    Py_VISIT(state->memory_error);
    Py_VISIT(state->unsupported_error);
    Py_VISIT(state->quantized_tensor_type);
    Py_VISIT(state->decoder_type);
    Py_VISIT(state->sequence_type);
    return 0;
}

static int core_clear(PyObject *module)
{
    qllm_state *state = qllm_state_of(module);
    Py_CLEAR(state->base_error);
    Py_CLEAR(state->value_error);
    Py_CLEAR(state->memory_error);
    Py_CLEAR(state->unsupported_error);
    Py_CLEAR(state->quantized_tensor_type);
    Py_CLEAR(state->decoder_type);
    Py_CLEAR(state->sequence_type);
    return 0;
}

static void core_free(void *module)
{
    core_clear((PyObject *)module);
    qllm_free_pools(qllm_state_of((PyObject *)module));
}

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
    {0, NULL},
};

PyModuleDef qllm_core_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "qllm._core",
    .m_doc = "The C core of qllm: formats, kernels, decoder, samplers, logit statistics.",
    .m_size = sizeof(qllm_state),
    .m_slots = core_slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&qllm_core_module);
}
