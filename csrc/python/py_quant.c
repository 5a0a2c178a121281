/* quantize, quantized_from_parts, codebook: how QuantizedTensors and tables reach Python. */
#include "python/py_quant.h"

#include <string.h>

#include "core/alloc.h"
#include "core/codebook.h"
#include "core/quant.h"
#include "python/array.h"

int qllm_parse_int64(const qllm_state *state, PyObject *object, const char *name, int64_t *out)
{
    int overflow = 0;
    PyObject *index = PyNumber_Index(object);
    if (index == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: expected an integer, found %s", name,
                     Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = PyLong_AsLongLongAndOverflow(index, &overflow);
    if (overflow != 0)
        qllm_raise_value(state, "%s: %S does not fit in 64 bits", name, index);
    Py_DECREF(index);
    return PyErr_Occurred() ? -1 : 0;
}

static int parse_format(const qllm_state *state, const char *text, qllm_format *format)
{
    if (qllm_format_parse(text, format))
        return 0;
    qllm_raise_value(state, "format: '%s' is unknown; known are nf4, fp4, nf4-dq, fp4-dq, int8, "
                     "bf16, f16, f32", text);
    return -1;
}

static PyObject *core_quantize(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "format", "blocksize", "allow_nonfinite", "name", "dtype",
                            NULL};
    const qllm_state *state = qllm_state_of(module);
    const char *format_text, *name = "array", *dtype = NULL;
    PyObject *object, *blocksize_object = NULL;
    int64_t blocksize = QLLM_BLOCKSIZE_DEFAULT;
    int allow_nonfinite = 0;
    qllm_format format;
    qllm_tensor tensor;
    qllm_qweight weight;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|O$psz:quantize", names, &object,
                                     &format_text, &blocksize_object, &allow_nonfinite, &name,
                                     &dtype) ||
        parse_format(state, format_text, &format) < 0 ||
        (blocksize_object &&
         qllm_parse_int64(state, blocksize_object, "blocksize", &blocksize) < 0))
        return NULL;
    PyObject *array = qllm_array_tensor(state, object, dtype, name, &tensor);
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_quantize(&tensor, format, blocksize, allow_nonfinite, name, &weight, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_quantized_tensor_wrap(state, &weight, qllm_dtype_name(tensor.dtype));
}

/* quantized_from_parts ------------------------------------------------------------------------- */

typedef struct parts {
    PyObject *shape, *packed, *blocksize, *absmax, *absmax_codes, *nested_absmax, *nested_quant_map,
        *offset, *quant_map, *scb;
    const char *format, *dtype_name, *name;
    int allow_nonfinite;
} parts;

static void copy_without_gil(void *to, const void *from, int64_t bytes)
{
    if (bytes <= 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    memcpy(to, from, (size_t)bytes);
    Py_END_ALLOW_THREADS
}

/* Copies `object`, an array of n elements of `kind`, to `to`. */
static int take(const qllm_state *state, const parts *p, PyObject *object, const char *field,
                qllm_array_kind kind, int64_t n, int64_t size, void *to)
{
    char label[256];
    PyOS_snprintf(label, sizeof label, "%.200s.%s", p->name, field);
    PyObject *array = qllm_array_input(state, object, kind, 1, 2, label);
    if (array == NULL)
        return -1;
    if (qllm_array_size(array) == n)
        copy_without_gil(to, qllm_array_data(array), n * size);
    else
        qllm_raise_value(state, "%s: %lld elements, but format %s of this shape takes %lld", label,
                         (long long)qllm_array_size(array), p->format, (long long)n);
    Py_DECREF(array);
    return PyErr_Occurred() ? -1 : 0;
}

static int take_values(const qllm_state *state, const parts *p, qllm_qweight *weight)
{
    char label[256];
    qllm_tensor tensor;
    qllm_dtype dtype = qllm_format_dtype(weight->format);
    PyOS_snprintf(label, sizeof label, "%.200s.packed", p->name);
    PyObject *array = qllm_array_tensor(state, p->packed, qllm_dtype_name(dtype), label, &tensor);
    if (array == NULL)
        return -1;
    if (tensor.nbytes == weight->data_bytes)
        copy_without_gil(weight->data, tensor.data, tensor.nbytes);
    else
        qllm_raise_value(state, "%s: %lld bytes, but format %s of this shape takes %lld", label,
                         (long long)tensor.nbytes, p->format, (long long)weight->data_bytes);
    Py_DECREF(array);
    return PyErr_Occurred() ? -1 : 0;
}

static int take_offset(const qllm_state *state, const parts *p, qllm_qweight *weight)
{
    double offset = PyFloat_AsDouble(p->offset);
    if (offset == -1.0 && PyErr_Occurred())
        return -1;
    if (offset > 3.4028234663852886e38 || offset < -3.4028234663852886e38) {
        qllm_raise_value(state, "%s.offset: the value is beyond the range of float32", p->name);
        return -1;
    }
    weight->offset = (float)offset;
    return 0;
}

/* Every part that the format has must be there (the tables may be left out: then they are the
 * standard ones), every other must be None. */
static int check_presence(const qllm_state *state, const parts *p, qllm_format format)
{
    int four = qllm_format_is_4bit(format), nested = qllm_format_is_nested(format);
    const struct {
        const char *field;
        PyObject *object;
        int has, optional;
    } table[] = {
        {"blocksize", p->blocksize, four, 0},
        {"absmax", p->absmax, four && !nested, 0},
        {"absmax_codes", p->absmax_codes, nested, 0},
        {"nested_absmax", p->nested_absmax, nested, 0},
        {"nested_quant_map", p->nested_quant_map, nested, 1},
        {"offset", p->offset, nested, 0},
        {"quant_map", p->quant_map, four, 1},
        {"scb", p->scb, format == QLLM_FORMAT_INT8, 0},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        int given = table[i].object != Py_None;
        if (table[i].has && !given && !table[i].optional) {
            qllm_raise_value(state, "%s: format %s needs %s", p->name, p->format, table[i].field);
            return -1;
        }
        if (!table[i].has && given) {
            qllm_raise_value(state, "%s: format %s has no %s", p->name, p->format, table[i].field);
            return -1;
        }
    }
    return 0;
}

static int take_scales(const qllm_state *state, const parts *p, qllm_qweight *weight)
{
    int64_t blocks = qllm_qweight_blocks(weight), nested = qllm_qweight_nested_blocks(weight);
    if (weight->format == QLLM_FORMAT_INT8)
        return take(state, p, p->scb, "scb", QLLM_ARRAY_F32, blocks, 4, weight->absmax);
    if (p->quant_map != Py_None &&
        take(state, p, p->quant_map, "quant_map", QLLM_ARRAY_F32, 16, 4, weight->code) < 0)
        return -1;
    if (!qllm_format_is_nested(weight->format))
        return take(state, p, p->absmax, "absmax", QLLM_ARRAY_F32, blocks, 4, weight->absmax);
    if (p->nested_quant_map != Py_None &&
        take(state, p, p->nested_quant_map, "nested_quant_map", QLLM_ARRAY_F32, 256, 4,
             weight->nested_code) < 0)
        return -1;
    if (take(state, p, p->absmax_codes, "absmax_codes", QLLM_ARRAY_U8, blocks, 1,
             weight->absmax_codes) < 0 ||
        take(state, p, p->nested_absmax, "nested_absmax", QLLM_ARRAY_F32, nested, 4,
             weight->nested_absmax) < 0)
        return -1;
    return take_offset(state, p, weight);
}

static int fill_weight(const qllm_state *state, const parts *p, qllm_qweight *weight)
{
    qllm_error error;
    qllm_status status;
    if (qllm_format_is_float(weight->format)) {
        if (take_values(state, p, weight) < 0)
            return -1;
    } else {
        qllm_array_kind kind = weight->format == QLLM_FORMAT_INT8 ? QLLM_ARRAY_I8 : QLLM_ARRAY_U8;
        if (take(state, p, p->packed, "packed", kind, weight->data_bytes, 1, weight->data) < 0 ||
            take_scales(state, p, weight) < 0)
            return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    status = qllm_qweight_check(weight, p->allow_nonfinite, p->name, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        qllm_raise(state, &error);
    return status == QLLM_OK ? 0 : -1;
}

static int parse_shape(const qllm_state *state, PyObject *object, int64_t *rows, int64_t *cols)
{
    PyObject *items = PySequence_Fast(object, "shape: expected (rows, cols)");
    if (items == NULL)
        return -1;
    if (PySequence_Fast_GET_SIZE(items) != 2)
        qllm_raise_value(state, "shape: expected (rows, cols), found %zd numbers",
                         PySequence_Fast_GET_SIZE(items));
    else if (qllm_parse_int64(state, PySequence_Fast_GET_ITEM(items, 0), "shape", rows) == 0)
        qllm_parse_int64(state, PySequence_Fast_GET_ITEM(items, 1), "shape", cols);
    Py_DECREF(items);
    return PyErr_Occurred() ? -1 : 0;
}

static int check_dtype_name(const qllm_state *state, const parts *p)
{
    for (int d = QLLM_F32; p->dtype_name != NULL && d <= QLLM_BF16; d++)
        if (strcmp(p->dtype_name, qllm_dtype_name((qllm_dtype)d)) == 0)
            return 0;
    if (p->dtype_name == NULL)
        return 0;
    qllm_raise_value(state, "%s: dtype_name '%s' is unknown; known are float32, float16, bfloat16",
                     p->name, p->dtype_name);
    return -1;
}

static PyObject *core_quantized_from_parts(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"format", "shape", "packed", "blocksize", "absmax", "absmax_codes",
                            "nested_absmax", "nested_quant_map", "offset", "quant_map", "scb",
                            "dtype_name", "name", "allow_nonfinite", NULL};
    const qllm_state *state = qllm_state_of(module);
    parts p = {NULL, NULL, Py_None, Py_None, Py_None, Py_None, Py_None, Py_None, Py_None, Py_None,
               NULL, NULL, "weight", 0};
    qllm_format format;
    int64_t rows, cols, blocksize = 0;
    qllm_qweight weight;
    qllm_error error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOO|$OOOOOOOOzsp:quantized_from_parts", names,
                                     &p.format, &p.shape, &p.packed, &p.blocksize, &p.absmax,
                                     &p.absmax_codes, &p.nested_absmax, &p.nested_quant_map,
                                     &p.offset, &p.quant_map, &p.scb, &p.dtype_name, &p.name,
                                     &p.allow_nonfinite) ||
        parse_format(state, p.format, &format) < 0 ||
        parse_shape(state, p.shape, &rows, &cols) < 0 || check_dtype_name(state, &p) < 0 ||
        check_presence(state, &p, format) < 0 ||
        (p.blocksize != Py_None &&
         qllm_parse_int64(state, p.blocksize, "blocksize", &blocksize) < 0))
        return NULL;
    if (qllm_qweight_init(&weight, format, rows, cols, blocksize, p.name, &error) != QLLM_OK)
        return qllm_raise(state, &error);
    if (fill_weight(state, &p, &weight) < 0) {
        qllm_qweight_clear(&weight);
        return NULL;
    }
    return qllm_quantized_tensor_wrap(state, &weight, p.dtype_name);
}

/* tables and hooks ----------------------------------------------------------------------------- */

static PyObject *core_codebook(PyObject *module, PyObject *name)
{
    const qllm_state *state = qllm_state_of(module);
    const float *values = NULL;
    int64_t n = 16;
    void *data;
    if (!PyUnicode_Check(name))
        return PyErr_Format(PyExc_TypeError, "name: expected a string, found %s",
                            Py_TYPE(name)->tp_name);
    if (PyUnicode_CompareWithASCIIString(name, "nf4") == 0)
        values = qllm_nf4_values;
    else if (PyUnicode_CompareWithASCIIString(name, "fp4") == 0)
        values = qllm_fp4_values;
    else if (PyUnicode_CompareWithASCIIString(name, "dynamic") == 0) {
        values = qllm_dynamic_map;
        n = 256;
    } else
        return qllm_raise_value(state, "name: %R is unknown; known are 'nf4', 'fp4', 'dynamic'",
                                name);
    PyObject *array = qllm_array_new(QLLM_ARRAY_F32, 1, &n, &data);
    if (array != NULL)
        memcpy(data, values, (size_t)n * sizeof *values);
    return array;
}

static PyObject *core_alloc_fail_at(PyObject *module, PyObject *number)
{
    int64_t n;
    if (qllm_parse_int64(qllm_state_of(module), number, "n", &n) < 0)
        return NULL;
    qllm_alloc_fail_at(n);
    Py_RETURN_NONE;
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"quantize", (PyCFunction)(void (*)(void))core_quantize, KEYWORDS,
     "quantize($module, array, format, blocksize=64, *, allow_nonfinite=False, name='array', "
     "dtype=None)\n--\n\nQuantizes a float32, float16 or bfloat16 array of one or two dimensions."},
    {"quantized_from_parts", (PyCFunction)(void (*)(void))core_quantized_from_parts, KEYWORDS,
     "quantized_from_parts($module, format, shape, packed, *, blocksize=None, absmax=None, "
     "absmax_codes=None, nested_absmax=None, nested_quant_map=None, offset=None, quant_map=None, "
     "scb=None, dtype_name=None, name='weight', allow_nonfinite=False)\n--\n\n"
     "A QuantizedTensor from stored parts, which are copied and checked."},
    {"codebook", core_codebook, METH_O,
     "codebook($module, name, /)\n--\n\nThe table 'nf4', 'fp4' (16) or 'dynamic' (256), float32."},
    {"_alloc_fail_at", core_alloc_fail_at, METH_O,
     "_alloc_fail_at($module, n, /)\n--\n\n"
     "For tests: lets the n-th allocation from now fail; 0 switches it off."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_quant(PyObject *module)
{
    if (qllm_setup_quantized_tensor(module) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
