/* The type qllm._core.DeviceLinear: a linear layer alone on a device, for tensors of other
 * libraries there, by address, over the linear_* functions of its table. */
#include <math.h>

#include "core/backend.h"
#include "python/addresses.h"
#include "python/arguments.h"
#include "python/py_cpu.h"
#include "python/py_decoder.h"
#include "python/py_quant.h"

typedef struct device_linear {
    PyObject_HEAD
    const qllm_backend *backend;
    qllm_device_linear *layer;
    int64_t rows, cols;
    char device[32]; /* as it was asked for */
} device_linear;

static int create(const qllm_state *state, device_linear *self, int index,
                  const qllm_qweight *weight, qllm_compute compute, float threshold)
{
    qllm_error error;
    qllm_status status;
    if (self->backend->linear_create == NULL) {
        qllm_fail(&error, QLLM_UNSUPPORTED, "device '%s' makes no linear layers by address; a GPU "
                  "was expected", self->device);
        qllm_raise(state, &error);
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->linear_create(index, weight, compute, threshold, &self->layer, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        qllm_raise(state, &error);
    return status == QLLM_OK ? 0 : -1;
}

static PyObject *device_linear_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "device", "compute", "int8_threshold", NULL};
    const qllm_state *state = qllm_state_of_type(type);
    PyObject *object;
    const char *device, *compute_name = "auto";
    double threshold = 6.0;
    qllm_compute compute;
    int index;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|$sd:DeviceLinear", names, &object, &device,
                                     &compute_name, &threshold) ||
        qllm_parse_compute(state, compute_name, &compute) < 0)
        return NULL;
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, object);
    if (weight == NULL)
        return NULL;
    device_linear *self = (device_linear *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    qllm_format_text(self->device, sizeof self->device, "%s", device);
    self->rows = weight->rows;
    self->cols = weight->cols;
    if (qllm_find_device(type, device, &self->backend, &index) < 0 ||
        create(state, self, index, weight, compute, (float)threshold) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int device_linear_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void device_linear_dealloc(PyObject *object)
{
    device_linear *self = (device_linear *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->layer != NULL)
        self->backend->linear_destroy(self->layer);
    type->tp_free(object);
    Py_DECREF(type);
}

/* products ------------------------------------------------------------------------------------- */

static int check_rows(const qllm_state *state, int64_t m)
{
    if (m >= 0)
        return 0;
    qllm_raise_value(state, "m: %lld rows of x; 0 or more were expected", (long long)m);
    return -1;
}

/* Raises where the bytes cannot be counted. */
static int64_t scratch_bytes(const qllm_state *state, const device_linear *self,
                             const qllm_linear_call *call)
{
    int64_t bytes = self->backend->linear_scratch(self->layer, call);
    if (bytes < 0)
        PyErr_Format(state->memory_error, "x: the forms of %lld rows are larger than can be "
                     "addressed; use a smaller batch", (long long)call->m);
    return bytes;
}

static PyObject *device_linear_scratch(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    const device_linear *self = (const device_linear *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    qllm_reader from = {args};
    if (qllm_wrong_count("scratch", count, 4))
        return NULL;
    qllm_linear_call call = {.dtype = qllm_read_dtype(&from), .m = qllm_read_int(&from)};
    call.bias = qllm_read_address(&from);
    call.bias_dtype = qllm_read_dtype(&from);
    if (PyErr_Occurred() || check_rows(state, call.m) < 0)
        return NULL;
    int64_t bytes = scratch_bytes(state, self, &call);
    return bytes < 0 ? NULL : PyLong_FromLongLong(bytes);
}

static int check_call(const qllm_state *state, const device_linear *self,
                      const qllm_linear_call *call, int64_t cols, int64_t rows, int64_t given)
{
    qllm_error error;
    if (check_rows(state, call->m) < 0)
        return -1;
    if (qllm_check_product(self->rows, self->cols, cols, rows, &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    int64_t bytes = scratch_bytes(state, self, call);
    if (bytes > given)
        qllm_raise_value(state, "scratch: %lld bytes, but %lld are needed", (long long)given,
                         (long long)bytes);
    return bytes < 0 || bytes > given ? -1 : 0;
}

static PyObject *device_linear_multiply(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    const device_linear *self = (const device_linear *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    qllm_reader from = {args};
    qllm_linear_call call;
    qllm_error error;
    qllm_status status;
    if (qllm_wrong_count("multiply", count, 11))
        return NULL;
    call.x = qllm_read_address(&from);
    call.dtype = qllm_read_dtype(&from);
    call.m = qllm_read_int(&from);
    int64_t cols = qllm_read_int(&from);
    call.bias = qllm_read_address(&from);
    call.bias_dtype = qllm_read_dtype(&from);
    call.y = qllm_read_address(&from);
    int64_t rows = qllm_read_int(&from);
    call.scratch = qllm_read_address(&from);
    int64_t given = qllm_read_int(&from);
    call.stream = qllm_read_address(&from);
    if (PyErr_Occurred() || check_call(state, self, &call, cols, rows, given) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->linear(self->layer, &call, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

static PyObject *device_linear_dequantize(PyObject *object, PyObject *const *args,
                                          Py_ssize_t count)
{
    const device_linear *self = (const device_linear *)object;
    qllm_reader from = {args};
    qllm_error error;
    qllm_status status;
    if (qllm_wrong_count("dequantize", count, 4))
        return NULL;
    int64_t first = qllm_read_int(&from), n = qllm_read_int(&from);
    float *out = qllm_read_address(&from);
    void *stream = qllm_read_address(&from);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->linear_dequantize(self->layer, first, n, out, stream, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(qllm_state_of_type(Py_TYPE(object)), &error);
    Py_RETURN_NONE;
}

static PyObject *device_linear_kernel(PyObject *object, PyObject *argument)
{
    const device_linear *self = (const device_linear *)object;
    int64_t m;
    if (qllm_to_int64(qllm_state_of_type(Py_TYPE(object)), argument, "m", &m) < 0)
        return NULL;
    return PyUnicode_FromString(self->backend->linear_name(self->layer, m));
}

static PyObject *device_linear_nbytes(PyObject *object, void *unused)
{
    const device_linear *self = (const device_linear *)object;
    (void)unused;
    return PyLong_FromLongLong(self->backend->linear_nbytes(self->layer));
}

static PyObject *device_linear_device(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(((const device_linear *)object)->device);
}

static PyObject *device_linear_shape(PyObject *object, void *unused)
{
    const device_linear *self = (const device_linear *)object;
    (void)unused;
    return Py_BuildValue("(LL)", (long long)self->rows, (long long)self->cols);
}

/* the type ------------------------------------------------------------------------------------- */

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef methods[] = {
    {"scratch", FAST(device_linear_scratch),
     "scratch($self, dtype, m, bias, bias_dtype, /)\n--\n\n"
     "Bytes of scratch that multiply wants for these."},
    {"multiply", FAST(device_linear_multiply),
     "multiply($self, x, dtype, m, cols, bias, bias_dtype, y, rows, scratch, nbytes, stream, /)"
     "\n--\n\n"
     "y = x W^T + bias, given to a stream: waits for nothing. x, bias (0 for none), y and scratch "
     "(nbytes,\naligned to 16, this call's alone until its work is done) are addresses of the "
     "device's memory, stream is its\nhandle of a stream or 0; x (m, cols) and y (m, rows) "
     "contiguous and of one dtype: 0 float32, 1 float16,\n2 bfloat16."},
    {"dequantize", FAST(device_linear_dequantize),
     "dequantize($self, first, n, out, stream, /)\n--\n\n"
     "Rows [first, first + n) of the weight, exactly, to out float32 (n, cols) on the device."},
    {"kernel", device_linear_kernel, METH_O,
     "kernel($self, m, /)\n--\n\nWhich kernel multiplies m rows."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"device", device_linear_device, NULL, "Its name, as it was asked for.", NULL},
    {"shape", device_linear_shape, NULL, "(rows, cols) of the weight.", NULL},
    {"nbytes", device_linear_nbytes, NULL, "Bytes of the device's memory that it holds.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "DeviceLinear(weight, device, *, compute='auto', int8_threshold=6.0)\n--\n\n"
                "A QuantizedTensor on a device that is no processor (\"cuda:1\"), to multiply "
                "tensors there by address."},
    {Py_tp_new, device_linear_new},
    {Py_tp_dealloc, device_linear_dealloc},
    {Py_tp_traverse, device_linear_traverse},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "qllm._core.DeviceLinear",
    .basicsize = sizeof(device_linear),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = type_slots,
};

int qllm_setup_device_linear(PyObject *module)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
    int failed = type == NULL ? -1 : PyModule_AddType(module, type);
    Py_XDECREF(type); /* the module has it */
    return failed;
}
