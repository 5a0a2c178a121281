/* quantize, quantized_from_parts, codebook: how QuantizedTensors and tables reach Python. */
#include "python/py_quant.h"

#include <string.h>

#include "core/alloc.h"
#include "core/codebook.h"
#include "core/quant.h"
#include "cpu/quantize.h"
#include "python/array.h"
#include "python/py_cpu.h"

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

int qllm_parse_format(const qllm_state *state, const char *text, qllm_format *format)
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
                            "isa", NULL};
    const qllm_state *state = qllm_state_of(module);
    const char *format_text, *name = "array", *dtype = NULL, *isa_name = NULL;
    PyObject *object, *blocksize_object = NULL;
    int64_t blocksize = QLLM_BLOCKSIZE_DEFAULT;
    int allow_nonfinite = 0;
    qllm_format format;
    qllm_tensor tensor;
    qllm_qweight weight;
    qllm_isa isa = QLLM_ISA_SCALAR;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|O$pszz:quantize", names, &object,
                                     &format_text, &blocksize_object, &allow_nonfinite, &name,
                                     &dtype, &isa_name) ||
        qllm_parse_format(state, format_text, &format) < 0 ||
        (blocksize_object &&
         qllm_parse_int64(state, blocksize_object, "blocksize", &blocksize) < 0))
        return NULL;
    bool reference = isa_name != NULL && strcmp(isa_name, "reference") == 0;
    if (!reference && qllm_choose_isa(state, isa_name, &isa) < 0)
        return NULL;
    PyObject *array = qllm_array_tensor(state, object, dtype, name, &tensor);
    if (array == NULL)
        return NULL;
    qllm_packer packer = {qllm_encode_ops_get(isa), NULL};
    Py_BEGIN_ALLOW_THREADS
    status = reference ? qllm_quantize(&tensor, format, blocksize, allow_nonfinite, name, &weight,
                                       &error)
                       : qllm_cpu_quantize(&packer, &tensor, format, blocksize, allow_nonfinite,
                                           name, &weight, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_quantized_tensor_wrap(state, &weight, qllm_dtype_name(tensor.dtype));
}

/* quantized_from_parts ------------------------------------------------------------------------- */

/* Arguments; the parts are borrowed objects that check_parts replaces by arrays which it owns. */
enum { PACKED, ABSMAX, ABSMAX_CODES, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, SCB, PART_COUNT };

static const char *const part_names[PART_COUNT] = {
    "packed", "absmax", "absmax_codes", "nested_absmax", "nested_quant_map", "quant_map", "scb",
};

typedef struct parts {
    PyObject *shape, *blocksize, *offset;
    PyObject *given[PART_COUNT];  /* borrowed; None for a part that is not given */
    PyObject *arrays[PART_COUNT]; /* owned; NULL for a part that is not given */
    const char *format, *dtype_name, *name;
    int allow_nonfinite;
} parts;

/* Elements and destination of each part; has is 0 for one that the format does not have. */
typedef struct slot {
    int has, optional;
    qllm_array_kind kind;
    int64_t n, size;
    void *to;
} slot;

static void describe_slots(qllm_qweight *w, slot slots[PART_COUNT])
{
    int four = qllm_format_is_4bit(w->format), nested = qllm_format_is_nested(w->format);
    int int8 = w->format == QLLM_FORMAT_INT8;
    int64_t blocks = qllm_qweight_blocks(w), groups = qllm_qweight_nested_blocks(w);
    slots[PACKED] = (slot){1, 0, int8 ? QLLM_ARRAY_I8 : QLLM_ARRAY_U8, w->data_bytes, 1, w->data};
    slots[ABSMAX] = (slot){four && !nested, 0, QLLM_ARRAY_F32, blocks, 4, w->absmax};
    slots[ABSMAX_CODES] = (slot){nested, 0, QLLM_ARRAY_U8, blocks, 1, w->absmax_codes};
    slots[NESTED_ABSMAX] = (slot){nested, 0, QLLM_ARRAY_F32, groups, 4, w->nested_absmax};
    slots[NESTED_QUANT_MAP] = (slot){nested, 1, QLLM_ARRAY_F32, 256, 4, w->nested_code};
    slots[QUANT_MAP] = (slot){four, 1, QLLM_ARRAY_F32, 16, 4, w->code};
    slots[SCB] = (slot){int8, 0, QLLM_ARRAY_F32, blocks, 4, w->absmax};
}

/* A part that the format has must be there (the tables may be left out: then they are the standard
 * ones), any other must be None. */
static int check_presence(const qllm_state *state, const parts *p, const char *field,
                          PyObject *object, int has, int optional)
{
    int given = object != Py_None;
    if (has && !given && !optional)
        qllm_raise_value(state, "%s: format %s needs %s", p->name, p->format, field);
    else if (!has && given)
        qllm_raise_value(state, "%s: format %s has no %s", p->name, p->format, field);
    else
        return 0;
    return -1;
}

/* Part number i must have n elements; a matrix of values or of int8 codes must also have the right
 * shape. */
static int check_size(const qllm_state *state, const parts *p, const qllm_qweight *weight, int i,
                      int64_t n, const char *label)
{
    PyObject *array = p->arrays[i];
    int64_t found = qllm_array_size(array), expected = n;
    if (i == PACKED && !qllm_format_is_4bit(weight->format)) {
        expected = weight->rows * weight->cols;
        if (qllm_array_ndim(array) == 2 && (qllm_array_dim(array, 0) != weight->rows ||
                                            qllm_array_dim(array, 1) != weight->cols)) {
            qllm_raise_value(state, "%s: shape (%lld, %lld), but the weight has shape (%lld, %lld)",
                             label, (long long)qllm_array_dim(array, 0),
                             (long long)qllm_array_dim(array, 1), (long long)weight->rows,
                             (long long)weight->cols);
            return -1;
        }
    }
    if (found == expected)
        return 0;
    qllm_raise_value(state, "%s: %lld elements, but format %s of shape (%lld, %lld) takes %lld",
                     label, (long long)found, p->format, (long long)weight->rows,
                     (long long)weight->cols, (long long)expected);
    return -1;
}

/* Fills p->arrays with arrays whose dtypes and sizes are those that `weight` describes. */
static int check_parts(const qllm_state *state, parts *p, qllm_qweight *weight)
{
    slot slots[PART_COUNT];
    qllm_tensor values;
    char label[256];
    describe_slots(weight, slots);
    for (int i = 0; i < PART_COUNT; i++) {
        if (check_presence(state, p, part_names[i], p->given[i], slots[i].has,
                           slots[i].optional) < 0)
            return -1;
        if (p->given[i] == Py_None)
            continue;
        PyOS_snprintf(label, sizeof label, "%.200s.%s", p->name, part_names[i]);
        if (i == PACKED && qllm_format_is_float(weight->format))
            p->arrays[i] = qllm_array_tensor(
                state, p->given[i], qllm_dtype_name(qllm_format_dtype(weight->format)), label,
                &values);
        else
            p->arrays[i] = qllm_array_input(state, p->given[i], slots[i].kind, 1, 2, label);
        if (p->arrays[i] == NULL || check_size(state, p, weight, i, slots[i].n, label) < 0)
            return -1;
    }
    return check_presence(state, p, "offset", p->offset, qllm_format_is_nested(weight->format), 0);
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

/* Copies the checked parts into the arrays of `weight`, then checks the copies: nobody can change
 * those meanwhile. */
static int fill_weight(const qllm_state *state, const parts *p, qllm_qweight *weight)
{
    slot slots[PART_COUNT];
    const void *from[PART_COUNT];
    qllm_error error;
    qllm_status status;
    describe_slots(weight, slots);
    for (int i = 0; i < PART_COUNT; i++)
        from[i] = p->arrays[i] != NULL ? qllm_array_data(p->arrays[i]) : NULL;
    if (p->offset != Py_None && take_offset(state, p, weight) < 0)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    for (int i = 0; i < PART_COUNT; i++)
        if (from[i] != NULL && slots[i].n > 0)
            memcpy(slots[i].to, from[i], (size_t)(slots[i].n * slots[i].size));
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

/* The tensor from parsed arguments; p->arrays are left for the caller to release. */
static PyObject *make_from_parts(const qllm_state *state, parts *p)
{
    qllm_format format;
    int64_t rows, cols, blocksize = 0;
    qllm_qweight weight;
    qllm_error error;
    if (qllm_parse_format(state, p->format, &format) < 0 ||
        parse_shape(state, p->shape, &rows, &cols) < 0 || check_dtype_name(state, p) < 0 ||
        check_presence(state, p, "blocksize", p->blocksize, qllm_format_is_4bit(format), 0) < 0 ||
        (p->blocksize != Py_None &&
         qllm_parse_int64(state, p->blocksize, "blocksize", &blocksize) < 0))
        return NULL;
    if (qllm_qweight_describe(&weight, format, rows, cols, blocksize, p->name, &error) != QLLM_OK)
        return qllm_raise(state, &error);
    if (check_parts(state, p, &weight) < 0)
        return NULL;
    if (qllm_qweight_init(&weight, format, rows, cols, blocksize, p->name, &error) != QLLM_OK)
        return qllm_raise(state, &error);
    if (fill_weight(state, p, &weight) < 0) {
        qllm_qweight_clear(&weight);
        return NULL;
    }
    return qllm_quantized_tensor_wrap(state, &weight, p->dtype_name);
}

static PyObject *core_quantized_from_parts(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"format", "shape", "packed", "blocksize", "absmax", "absmax_codes",
                            "nested_absmax", "nested_quant_map", "offset", "quant_map", "scb",
                            "dtype_name", "name", "allow_nonfinite", NULL};
    parts p = {.blocksize = Py_None, .offset = Py_None, .name = "weight"};
    for (int i = 0; i < PART_COUNT; i++)
        p.given[i] = Py_None;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "sOO|$OOOOOOOOzsp:quantized_from_parts", names, &p.format, &p.shape,
            &p.given[PACKED], &p.blocksize, &p.given[ABSMAX], &p.given[ABSMAX_CODES],
            &p.given[NESTED_ABSMAX], &p.given[NESTED_QUANT_MAP], &p.offset, &p.given[QUANT_MAP],
            &p.given[SCB], &p.dtype_name, &p.name, &p.allow_nonfinite))
        return NULL;
    PyObject *result = make_from_parts(qllm_state_of(module), &p);
    for (int i = 0; i < PART_COUNT; i++)
        Py_XDECREF(p.arrays[i]);
    return result;
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
     "dtype=None, isa=None)\n--\n\n"
     "Quantizes a float32, float16 or bfloat16 array of one or two dimensions, with the functions "
     "of an\ninstruction set (None: QLLM_CPU, or the best) or those of the plain 'reference'.  The "
     "bytes do not\ndepend on it."},
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
