#include "python/dlpack.h"

#include "core/checked.h"

/* The structs of the protocol, as https://dmlc.github.io/dlpack/latest/c_api.html lays them out. */
typedef struct dl_tensor {
    void *data;
    struct { int32_t type, id; } device;
    int32_t ndim;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *shape, *strides; /* strides NULL: row-major */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct dl_managed_versioned {
    struct { uint32_t major, minor; } version;
    void *context;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

enum { DEVICE_CPU = 1, DEVICE_CUDA_HOST = 3, VERSION = 1 };
static const uint64_t FLAG_READ_ONLY = 1;

static const char PLAIN[] = "dltensor", PLAIN_USED[] = "used_dltensor";
static const char VERSIONED[] = "dltensor_versioned", VERSIONED_USED[] = "used_dltensor_versioned";

/* The owners are capsules of our own, whose end gives the memory back. */
static void give_back(PyObject *capsule)
{
    dl_managed *managed = PyCapsule_GetPointer(capsule, NULL);
    if (managed != NULL && managed->deleter != NULL)
        managed->deleter(managed);
}

static void give_back_versioned(PyObject *capsule)
{
    dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, NULL);
    if (managed != NULL && managed->deleter != NULL)
        managed->deleter(managed);
}

static const char *device_name(long type)
{
    switch (type) {
    case 2: return "a CUDA device";
    case 4: return "an OpenCL device";
    case 7: return "a Vulkan device";
    case 8: return "a Metal device";
    case 10: return "a ROCm device";
    case 13: return "CUDA managed memory";
    }
    return "another device";
}

/* The memory is asked for only where it is the processor's. */
static int check_device(const qllm_state *state, PyObject *object, const char *name)
{
    long type, id;
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    if (device == NULL || !PyArg_ParseTuple(device, "ll:__dlpack_device__", &type, &id)) {
        Py_XDECREF(device);
        return -1;
    }
    Py_DECREF(device);
    if (type == DEVICE_CPU || type == DEVICE_CUDA_HOST)
        return 0;
    qllm_raise_value(state, "%s: the %s is on %s; copy it to the CPU first", name,
                     Py_TYPE(object)->tp_name, device_name(type));
    return -1;
}

static PyObject *ask(PyObject *object)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__"), *capsule = NULL;
    PyObject *none = PyTuple_New(0), *words = Py_BuildValue("{s:(ii)}", "max_version", VERSION, 0);
    if (method != NULL && none != NULL && words != NULL) {
        capsule = PyObject_Call(method, none, words);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            capsule = PyObject_CallNoArgs(method);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(words);
    return capsule;
}

/* Takes over what the capsule holds; the tensor, or NULL with an error set. */
static const dl_tensor *take(const qllm_state *state, PyObject *capsule, const char *name,
                             qllm_dlpack_view *view)
{
    if (PyCapsule_IsValid(capsule, VERSIONED)) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, VERSIONED);
        if (managed->version.major != VERSION) {
            qllm_raise_value(state, "%s: version %u of DLPack was given, expected %d", name,
                             (unsigned)managed->version.major, VERSION);
            return NULL;
        }
        view->owner = PyCapsule_New(managed, NULL, give_back_versioned);
        view->read_only = (managed->flags & FLAG_READ_ONLY) != 0;
        if (view->owner == NULL || PyCapsule_SetName(capsule, VERSIONED_USED) != 0)
            return NULL;
        return &managed->tensor;
    }
    if (PyCapsule_IsValid(capsule, PLAIN)) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, PLAIN);
        view->owner = PyCapsule_New(managed, NULL, give_back);
        view->read_only = false;
        if (view->owner == NULL || PyCapsule_SetName(capsule, PLAIN_USED) != 0)
            return NULL;
        return &managed->tensor;
    }
    qllm_raise_value(state, "%s: __dlpack__ gave %s, expected an unused DLPack capsule", name,
                     Py_TYPE(capsule)->tp_name);
    return NULL;
}

/* Shape, strides and type into *view, checked. */
static int describe(const qllm_state *state, const dl_tensor *tensor, const char *name,
                    qllm_dlpack_view *view)
{
    int64_t elements = 1;
    if (tensor->ndim < 0 || tensor->ndim > QLLM_DLPACK_DIMENSIONS) {
        qllm_raise_value(state, "%s: DLPack gave %d dimensions, expected 0 to %d", name,
                         (int)tensor->ndim, QLLM_DLPACK_DIMENSIONS);
        return -1;
    }
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        view->shape[i] = tensor->shape[i];
        view->strides[i] = tensor->strides != NULL ? tensor->strides[i] : elements;
        if (tensor->shape[i] < 0 || !qllm_checked_mul(elements, tensor->shape[i], &elements)) {
            qllm_raise_value(state, "%s: DLPack gave a dimension of %lld", name,
                             (long long)tensor->shape[i]);
            return -1;
        }
    }
    if (tensor->dtype.lanes != 1) {
        qllm_raise_value(state, "%s: DLPack gave elements of %d lanes, expected 1", name,
                         (int)tensor->dtype.lanes);
        return -1;
    }
    view->ndim = tensor->ndim;
    view->code = tensor->dtype.code;
    view->bits = tensor->dtype.bits;
    view->data = tensor->data != NULL ? (char *)tensor->data + tensor->byte_offset : NULL;
    if (view->data == NULL && elements > 0) {
        qllm_raise_value(state, "%s: DLPack gave no memory", name);
        return -1;
    }
    return 0;
}

int qllm_dlpack_import(const qllm_state *state, PyObject *object, const char *name,
                       qllm_dlpack_view *view)
{
    *view = (qllm_dlpack_view){0};
    if (check_device(state, object, name) < 0)
        return -1;
    PyObject *capsule = ask(object);
    if (capsule == NULL)
        return -1;
    const dl_tensor *tensor = take(state, capsule, name, view);
    int failed = tensor == NULL || describe(state, tensor, name, view) < 0;
    Py_DECREF(capsule);
    if (failed)
        Py_CLEAR(view->owner);
    return failed ? -1 : 0;
}
