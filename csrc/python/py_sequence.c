/* The type qllm._core.Sequence. */
#include "python/arguments.h"
#include "python/py_decoder.h"

PyObject *qllm_wrap_sequence(qllm_decoder_object *owner, qllm_sequence *sequence)
{
    PyTypeObject *type = qllm_state_of_type(Py_TYPE(owner))->sequence_type;
    qllm_sequence_object *self = (qllm_sequence_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        owner->backend->sequence_destroy(sequence);
        return NULL;
    }
    self->owner = (qllm_decoder_object *)Py_NewRef(owner);
    self->sequence = sequence;
    return (PyObject *)self;
}

static int sequence_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((qllm_sequence_object *)self)->owner);
    return 0;
}

static void sequence_dealloc(PyObject *object)
{
    qllm_sequence_object *self = (qllm_sequence_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->owner != NULL)
        self->owner->backend->sequence_destroy(self->sequence);
    Py_XDECREF(self->owner);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *sequence_get_length(PyObject *object, void *closure)
{
    qllm_sequence_object *self = (qllm_sequence_object *)object;
    (void)closure;
    return PyLong_FromLongLong(self->owner->backend->sequence_length(self->sequence));
}

static PyObject *sequence_fork(PyObject *object, PyObject *unused)
{
    qllm_sequence_object *self = (qllm_sequence_object *)object;
    qllm_sequence *fork;
    qllm_error error;
    qllm_status status;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    status = self->owner->backend->sequence_fork(self->sequence, &fork, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(qllm_state_of_type(Py_TYPE(object)), &error);
    return qllm_wrap_sequence(self->owner, fork);
}

static PyObject *sequence_truncate(PyObject *object, PyObject *argument)
{
    qllm_sequence_object *self = (qllm_sequence_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    qllm_error error;
    qllm_status status;
    int64_t length;
    if (qllm_to_int64(state, argument, "length", &length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->owner->backend->sequence_truncate(self->sequence, length, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

static PyGetSetDef sequence_getset[] = {
    {"length", sequence_get_length, NULL, "Positions stored so far.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef sequence_methods[] = {
    {"fork", sequence_fork, METH_NOARGS,
     "fork($self, /)\n--\n\n"
     "A new Sequence that shares the keys and values stored so far (they are stored "
     "once and never\nchanged); both go on independently."},
    {"truncate", sequence_truncate, METH_O,
     "truncate($self, length, /)\n--\n\n"
     "Forget the positions from `length` on, 0 <= length <= "
     "self.length; shared parts are never changed."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sequence_slots[] = {
    {Py_tp_doc, "The keys and values of one sequence, made by Decoder.sequence() or fork(); freed "
                "with the object."},
    {Py_tp_dealloc, sequence_dealloc},
    {Py_tp_traverse, sequence_traverse},
    {Py_tp_getset, sequence_getset},
    {Py_tp_methods, sequence_methods},
    {0, NULL},
};

static PyType_Spec sequence_spec = {
    .name = "qllm._core.Sequence",
    .basicsize = sizeof(qllm_sequence_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = sequence_slots,
};

int qllm_setup_sequence(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &sequence_spec, NULL);
    qllm_state_of(module)->sequence_type = (PyTypeObject *)type;
    return type == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)type);
}
