/* The type qllm._core.QuantizedTensor. */
#include <math.h>
#include <string.h>

#include "core/linear_ref.h"
#include "core/quant.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_quant.h"

typedef struct quantized_tensor {
    PyObject_HEAD
    qllm_qweight weight;
    const char *dtype_name; /* a literal of qllm_dtype_name, or NULL */
    qllm_packed *packed;    /* for the CPU kernels, made at the first matmul */
} quantized_tensor;

static const qllm_qweight *weight_of(PyObject *self)
{
    return &((quantized_tensor *)self)->weight;
}

const qllm_qweight *qllm_quantized_tensor_weight(const qllm_state *state, PyObject *object)
{
    if (PyObject_TypeCheck(object, state->quantized_tensor_type))
        return weight_of(object);
    PyErr_Format(PyExc_TypeError, "expected a QuantizedTensor, found %s", Py_TYPE(object)->tp_name);
    return NULL;
}

qllm_packed **qllm_quantized_tensor_packed(PyObject *object)
{
    return &((quantized_tensor *)object)->packed;
}

PyObject *qllm_quantized_tensor_wrap(const qllm_state *state, qllm_qweight *weight,
                                     const char *dtype_name)
{
    PyTypeObject *type = state->quantized_tensor_type;
    quantized_tensor *self = (quantized_tensor *)type->tp_alloc(type, 0);
    if (self == NULL) {
        qllm_qweight_clear(weight);
        return NULL;
    }
    self->weight = *weight;
    *weight = (qllm_qweight){.format = QLLM_FORMAT_F32};
    for (int d = QLLM_F32; d <= QLLM_BF16; d++)
        if (dtype_name != NULL && strcmp(dtype_name, qllm_dtype_name((qllm_dtype)d)) == 0)
            self->dtype_name = qllm_dtype_name((qllm_dtype)d);
    return (PyObject *)self;
}

static void tensor_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    qllm_qweight_clear(&((quantized_tensor *)self)->weight);
    qllm_packed_destroy(((quantized_tensor *)self)->packed);
    type->tp_free(self);
    Py_DECREF(type);
}

/* attributes ----------------------------------------------------------------------------------- */

static PyObject *get_format(PyObject *self, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(qllm_format_name(weight_of(self)->format));
}

static PyObject *get_shape(PyObject *self, void *closure)
{
    const qllm_qweight *w = weight_of(self);
    (void)closure;
    return Py_BuildValue("(LL)", (long long)w->rows, (long long)w->cols);
}

static PyObject *get_blocksize(PyObject *self, void *closure)
{
    (void)closure;
    if (!qllm_format_is_4bit(weight_of(self)->format))
        Py_RETURN_NONE;
    return PyLong_FromLongLong(weight_of(self)->blocksize);
}

static PyObject *get_packed(PyObject *self, void *closure)
{
    const qllm_qweight *w = weight_of(self);
    int64_t shape[2] = {w->rows, w->cols};
    (void)closure;
    switch (w->format) {
    case QLLM_FORMAT_F32: return qllm_array_view(self, QLLM_ARRAY_F32, 2, shape, w->data);
    case QLLM_FORMAT_F16: return qllm_array_view(self, QLLM_ARRAY_F16, 2, shape, w->data);
    case QLLM_FORMAT_BF16: return qllm_array_view(self, QLLM_ARRAY_U16, 2, shape, w->data);
    case QLLM_FORMAT_INT8: return qllm_array_view(self, QLLM_ARRAY_I8, 2, shape, w->data);
    default: return qllm_array_view(self, QLLM_ARRAY_U8, 1, &w->data_bytes, w->data);
    }
}

/* A view of n elements, or None where the format has no such part (`data` is NULL). */
static PyObject *part(PyObject *self, qllm_array_kind kind, int64_t n, void *data)
{
    if (data == NULL)
        Py_RETURN_NONE;
    return qllm_array_view(self, kind, 1, &n, data);
}

static PyObject *get_absmax(PyObject *self, void *closure)
{
    const qllm_qweight *w = weight_of(self);
    (void)closure;
    return part(self, QLLM_ARRAY_F32, qllm_qweight_blocks(w),
                w->format == QLLM_FORMAT_INT8 ? NULL : w->absmax);
}

static PyObject *get_scb(PyObject *self, void *closure)
{
    const qllm_qweight *w = weight_of(self);
    (void)closure;
    return part(self, QLLM_ARRAY_F32, w->rows, w->format == QLLM_FORMAT_INT8 ? w->absmax : NULL);
}

static PyObject *get_absmax_codes(PyObject *self, void *closure)
{
    (void)closure;
    return part(self, QLLM_ARRAY_U8, qllm_qweight_blocks(weight_of(self)),
                weight_of(self)->absmax_codes);
}

static PyObject *get_nested_absmax(PyObject *self, void *closure)
{
    (void)closure;
    return part(self, QLLM_ARRAY_F32, qllm_qweight_nested_blocks(weight_of(self)),
                weight_of(self)->nested_absmax);
}

static PyObject *get_nested_quant_map(PyObject *self, void *closure)
{
    quantized_tensor *tensor = (quantized_tensor *)self;
    (void)closure;
    return part(self, QLLM_ARRAY_F32, 256,
                qllm_format_is_nested(tensor->weight.format) ? tensor->weight.nested_code : NULL);
}

static PyObject *get_quant_map(PyObject *self, void *closure)
{
    quantized_tensor *tensor = (quantized_tensor *)self;
    (void)closure;
    return part(self, QLLM_ARRAY_F32, 16,
                qllm_format_is_4bit(tensor->weight.format) ? tensor->weight.code : NULL);
}

static PyObject *get_offset(PyObject *self, void *closure)
{
    (void)closure;
    if (!qllm_format_is_nested(weight_of(self)->format))
        Py_RETURN_NONE;
    return PyFloat_FromDouble((double)weight_of(self)->offset);
}

static PyObject *get_dtype_name(PyObject *self, void *closure)
{
    const char *name = ((quantized_tensor *)self)->dtype_name;
    (void)closure;
    if (name == NULL)
        Py_RETURN_NONE;
    return PyUnicode_FromString(name);
}

static PyObject *get_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(qllm_qweight_nbytes(weight_of(self)));
}

static double bits_per_weight(const qllm_qweight *w)
{
    double elements = (double)w->rows * (double)w->cols;
    return elements > 0.0 ? 8.0 * (double)qllm_qweight_nbytes(w) / elements : 0.0;
}

static PyObject *get_bits_per_weight(PyObject *self, void *closure)
{
    (void)closure;
    return PyFloat_FromDouble(bits_per_weight(weight_of(self)));
}

static PyGetSetDef tensor_getset[] = {
    {"format", get_format, NULL, "nf4, fp4, nf4-dq, fp4-dq, int8, bf16, f16 or f32", NULL},
    {"shape", get_shape, NULL, "(rows, cols); a vector is one row", NULL},
    {"blocksize", get_blocksize, NULL, "weights that share one absmax; None unless 4-bit", NULL},
    {"packed", get_packed, NULL,
     "4-bit: uint8 ((n + 1) // 2,); int8: int8 (rows, cols); else the values (rows, cols), bf16 as "
     "uint16", NULL},
    {"absmax", get_absmax, NULL, "float32 (blocks,) of nf4 and fp4, else None", NULL},
    {"absmax_codes", get_absmax_codes, NULL, "uint8 (blocks,) of the -dq formats, else None", NULL},
    {"nested_absmax", get_nested_absmax, NULL,
     "float32 (ceil(blocks / 256),) of the -dq formats, else None", NULL},
    {"nested_quant_map", get_nested_quant_map, NULL,
     "float32 (256,) of the -dq formats, else None", NULL},
    {"offset", get_offset, NULL, "mean of the absmax values of the -dq formats, else None", NULL},
    {"quant_map", get_quant_map, NULL, "float32 (16,) of the 4-bit formats, else None", NULL},
    {"scb", get_scb, NULL, "float32 (rows,), the absmax of each row of int8, else None", NULL},
    {"dtype_name", get_dtype_name, NULL, "dtype before quantizing, or None", NULL},
    {"nbytes", get_nbytes, NULL, "bytes of codes and scales, without the fixed tables", NULL},
    {"bits_per_weight", get_bits_per_weight, NULL, "8 * nbytes / (rows * cols), 0 if empty",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* methods -------------------------------------------------------------------------------------- */

static PyObject *tensor_dequantize(PyObject *self, PyObject *unused)
{
    const qllm_qweight *w = weight_of(self);
    int64_t shape[2] = {w->rows, w->cols};
    void *data;
    PyObject *array = qllm_array_new(QLLM_ARRAY_F32, 2, shape, &data);
    (void)unused;
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    qllm_dequantize(w, 0, w->rows * w->cols, data);
    Py_END_ALLOW_THREADS
    return array;
}

/* The values for who takes arrays: a new array of the asked dtype.  There is no memory to share, so
 * copy=False is refused as NumPy asks for. */
static PyObject *tensor_array(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy))
        return NULL;
    if (copy == Py_False) {
        PyErr_SetString(PyExc_ValueError, "copy=False: the values of a quantized tensor are "
                        "computed anew, so that a copy cannot be avoided");
        return NULL;
    }
    PyObject *array = tensor_dequantize(self, NULL);
    if (array == NULL || dtype == Py_None)
        return array;
    PyObject *converted = PyObject_CallMethod(array, "astype", "O", dtype);
    Py_DECREF(array);
    return converted;
}

/* DLPack of the values, by NumPy, which knows both versions of the protocol. */
static PyObject *tensor_dlpack(PyObject *self, PyObject *args, PyObject *kwargs)
{
    PyObject *array = tensor_dequantize(self, NULL), *capsule = NULL;
    PyObject *method = array != NULL ? PyObject_GetAttrString(array, "__dlpack__") : NULL;
    if (method != NULL)
        capsule = PyObject_Call(method, args, kwargs);
    Py_XDECREF(method);
    Py_XDECREF(array);
    return capsule;
}

static PyObject *tensor_dlpack_device(PyObject *self, PyObject *unused)
{
    (void)self;
    (void)unused;
    return Py_BuildValue("(ii)", 1, 0); /* the processor's memory */
}

static PyObject *tensor_error(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"source", "dtype", "name", NULL};
    const qllm_state *state = qllm_state_of_type(Py_TYPE(self));
    const char *dtype = NULL, *name = "source";
    PyObject *source;
    qllm_tensor tensor;
    qllm_quant_error figures;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|zs:error", names, &source, &dtype, &name))
        return NULL;
    PyObject *array = qllm_array_tensor(state, source, dtype, name, &tensor);
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_quantization_error(&tensor, weight_of(self), name, &figures, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return Py_BuildValue("{s:d,s:d,s:d,s:d}", "mean_abs", figures.mean_abs, "max_abs",
                         figures.max_abs, "rmse", figures.rmse, "sqnr_db", figures.sqnr_db);
}

/* The arguments of matmul_reference as arrays; x and bias are new references on success. */
static int linear_inputs(const qllm_state *state, const qllm_qweight *w, PyObject **x,
                         PyObject **bias, double threshold)
{
    if (isnan(threshold)) {
        qllm_raise_value(state, "threshold: NaN was given; use 6.0, or 0 for no outliers");
        return -1;
    }
    PyObject *x_array = qllm_array_input(state, *x, QLLM_ARRAY_F32, 1, 2, "x"), *bias_array = NULL;
    if (x_array == NULL)
        return -1;
    int64_t cols = qllm_array_dim(x_array, qllm_array_ndim(x_array) - 1);
    if (cols != w->cols) {
        qllm_raise_value(state, "x: %lld columns, but the weight of shape (%lld, %lld) takes %lld",
                         (long long)cols, (long long)w->rows, (long long)w->cols,
                         (long long)w->cols);
    } else if (*bias != Py_None) {
        bias_array = qllm_array_input(state, *bias, QLLM_ARRAY_F32, 1, 1, "bias");
        if (bias_array != NULL && qllm_array_size(bias_array) != w->rows) {
            qllm_raise_value(state, "bias: %lld values, but the weight has %lld rows",
                             (long long)qllm_array_size(bias_array), (long long)w->rows);
            Py_CLEAR(bias_array);
        }
    }
    if (PyErr_Occurred()) {
        Py_DECREF(x_array);
        return -1;
    }
    *x = x_array;
    *bias = bias_array;
    return 0;
}

static PyObject *tensor_matmul_reference(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "bias", "threshold", "batch_outliers", "tier", NULL};
    const qllm_state *state = qllm_state_of_type(Py_TYPE(self));
    const qllm_qweight *w = weight_of(self);
    PyObject *x, *bias = Py_None;
    double threshold = (double)QLLM_INT8_THRESHOLD;
    const char *tier_name = "exact";
    int batch_outliers = 0;
    qllm_tier tier;
    qllm_error error;
    qllm_status status;
    void *y;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Od$ps:matmul_reference", names, &x, &bias,
                                     &threshold, &batch_outliers, &tier_name))
        return NULL;
    if (qllm_tier_find(tier_name, &tier, &error) != QLLM_OK)
        return qllm_raise(state, &error);
    if (linear_inputs(state, w, &x, &bias, threshold) < 0)
        return NULL;
    int two = qllm_array_ndim(x) == 2;
    int64_t m = two ? qllm_array_dim(x, 0) : 1, shape[2] = {m, w->rows};
    PyObject *result = qllm_array_new(QLLM_ARRAY_F32, two ? 2 : 1, two ? shape : shape + 1, &y);
    if (result != NULL) {
        const float *x_data = qllm_array_data(x);
        const float *bias_data = bias ? qllm_array_data(bias) : NULL;
        Py_BEGIN_ALLOW_THREADS
        if (batch_outliers)
            status = qllm_linear_int8_batch(w, bias_data, x_data, m, (float)threshold, y, &error);
        else if (tier != QLLM_TIER_EXACT)
            status = qllm_linear_tier_ref(w, tier, bias_data, x_data, m, y, &error);
        else
            status = qllm_linear_ref(w, bias_data, x_data, m, (float)threshold, y, &error);
        Py_END_ALLOW_THREADS
        if (status != QLLM_OK) {
            Py_CLEAR(result);
            qllm_raise(state, &error);
        }
    }
    Py_DECREF(x);
    Py_XDECREF(bias);
    return result;
}

static PyObject *tensor_repr(PyObject *self)
{
    const qllm_qweight *w = weight_of(self);
    char text[256];
    char blocks[48] = "";
    if (qllm_format_is_4bit(w->format))
        PyOS_snprintf(blocks, sizeof blocks, ", blocksize=%lld", (long long)w->blocksize);
    PyOS_snprintf(text, sizeof text, "QuantizedTensor('%s', shape=(%lld, %lld)%s, %lld bytes, "
                  "%.4g bits per weight)", qllm_format_name(w->format), (long long)w->rows,
                  (long long)w->cols, blocks, (long long)qllm_qweight_nbytes(w),
                  bits_per_weight(w));
    return PyUnicode_FromString(text);
}

/* Immutable, so a copy is the tensor itself. */
static PyObject *tensor_copy(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(self);
}

/* The keyword arguments of quantized_from_parts that give this tensor again; new reference. */
static PyObject *parts_of(PyObject *self)
{
    static const char *const fields[] = {
        "format", "shape", "packed", "blocksize", "absmax", "absmax_codes", "nested_absmax",
        "nested_quant_map", "offset", "quant_map", "scb", "dtype_name",
    };
    qllm_error error;
    PyObject *parts = PyDict_New();
    for (size_t i = 0; parts != NULL && i < sizeof fields / sizeof *fields; i++) {
        PyObject *value = PyObject_GetAttrString(self, fields[i]);
        if (value == NULL || PyDict_SetItemString(parts, fields[i], value) < 0)
            Py_CLEAR(parts);
        Py_XDECREF(value);
    }
    if (parts != NULL &&
        qllm_qweight_check(weight_of(self), false, "tensor", &error) != QLLM_OK &&
        PyDict_SetItemString(parts, "allow_nonfinite", Py_True) < 0)
        Py_CLEAR(parts);
    return parts;
}

/* (functools.partial(quantized_from_parts, **parts), ()) */
static PyObject *tensor_reduce(PyObject *self, PyObject *unused)
{
    PyObject *result = NULL, *functools = PyImport_ImportModule("functools");
    PyObject *module = PyType_GetModule(Py_TYPE(self)); /* borrowed */
    PyObject *make = module ? PyObject_GetAttrString(module, "quantized_from_parts") : NULL;
    PyObject *partial = functools ? PyObject_GetAttrString(functools, "partial") : NULL;
    PyObject *parts = parts_of(self);
    (void)unused;
    if (make != NULL && partial != NULL && parts != NULL) {
        PyObject *arguments = PyTuple_Pack(1, make);
        PyObject *call = arguments ? PyObject_Call(partial, arguments, parts) : NULL;
        result = call ? Py_BuildValue("(N())", call) : NULL;
        Py_XDECREF(arguments);
    }
    Py_XDECREF(functools);
    Py_XDECREF(make);
    Py_XDECREF(partial);
    Py_XDECREF(parts);
    return result;
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef tensor_methods[] = {
    {"dequantize", tensor_dequantize, METH_NOARGS,
     "dequantize($self, /)\n--\n\nThe values as a new float32 array (rows, cols)."},
    {"error", (PyCFunction)(void (*)(void))tensor_error, KEYWORDS,
     "error($self, source, dtype=None, name='source')\n--\n\n"
     "mean_abs, max_abs, rmse and sqnr_db against the unquantized array of the same shape."},
    {"matmul", (PyCFunction)(void (*)(void))qllm_quantized_tensor_matmul, KEYWORDS,
     "matmul($self, x, bias=None, *, isa=None, threads=None, int8_threshold=6.0, "
     "int8_outliers='row', compute='exact')\n--\n\n"
     "y = x W^T + bias by the CPU kernels, see qllm._core.linear: the bits of matmul_reference.\n"
     "The first call packs the weight and keeps that form beside the standard one."},
    {"matmul_reference", (PyCFunction)(void (*)(void))tensor_matmul_reference, KEYWORDS,
     "matmul_reference($self, x, bias=None, threshold=6.0, *, batch_outliers=False, "
     "tier='exact')\n--\n\n"
     "y = x W^T + bias by the plain reference in the documented order of summation; x float32\n"
     "(m, cols) or (cols,), y float32 (m, rows) or (rows,).  threshold is that of int8 outliers;\n"
     "batch_outliers takes the outlier columns of the whole batch, as bitsandbytes does.  tier is\n"
     "exact, int16 or int8 (4-bit weights whose blocks end with the rows), bf16 (bf16 weights) or\n"
     "bf16x2 (both)."},
    {"__array__", (PyCFunction)(void (*)(void))tensor_array, KEYWORDS, NULL},
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, KEYWORDS, NULL},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, NULL},
    {"__copy__", tensor_copy, METH_NOARGS, NULL},
    {"__deepcopy__", tensor_copy, METH_O, NULL},
    {"__reduce__", tensor_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tensor_slots[] = {
    {Py_tp_doc, "A weight matrix in one of the formats, immutable; made by quantize and "
                "quantized_from_parts. The arrays are read-only views that keep it alive."},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_repr, tensor_repr},
    {Py_tp_getset, tensor_getset},
    {Py_tp_methods, tensor_methods},
    {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "qllm._core.QuantizedTensor",
    .basicsize = sizeof(quantized_tensor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = tensor_slots,
};

int qllm_setup_quantized_tensor(PyObject *module)
{
    qllm_state *state = qllm_state_of(module);
    PyObject *type = PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    state->quantized_tensor_type = (PyTypeObject *)type;
    return type ? PyModule_AddObjectRef(module, "QuantizedTensor", type) : -1;
}
