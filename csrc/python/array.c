#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include "python/array.h"

#include <numpy/arrayobject.h>

#include "core/alloc.h"
#include "python/dlpack.h"

int qllm_array_setup(void)
{
    return PyArray_ImportNumPyAPI();
}

static int type_number(qllm_array_kind kind)
{
    switch (kind) {
    case QLLM_ARRAY_F32: return NPY_FLOAT32;
    case QLLM_ARRAY_F64: return NPY_FLOAT64;
    case QLLM_ARRAY_I64: return NPY_INT64;
    case QLLM_ARRAY_U8: return NPY_UINT8;
    case QLLM_ARRAY_I8: return NPY_INT8;
    case QLLM_ARRAY_U16: return NPY_UINT16;
    case QLLM_ARRAY_F16: return NPY_FLOAT16;
    case QLLM_ARRAY_BOOL: return NPY_BOOL;
    }
    return NPY_NOTYPE;
}

static const char *kind_name(qllm_array_kind kind)
{
    switch (kind) {
    case QLLM_ARRAY_F32: return "float32";
    case QLLM_ARRAY_F64: return "float64";
    case QLLM_ARRAY_I64: return "an integer type";
    case QLLM_ARRAY_U8: return "uint8";
    case QLLM_ARRAY_I8: return "int8";
    case QLLM_ARRAY_U16: return "uint16";
    case QLLM_ARRAY_F16: return "float16";
    case QLLM_ARRAY_BOOL: return "bool";
    }
    return "";
}

/* Turns what __array__ or __dlpack__ of a foreign object raised, such as torch about gradients,
 * into one sentence that names the argument; our own, interrupts and lack of memory pass as they
 * are. */
static PyObject *foreign_array_failed(const qllm_state *state, PyObject *object, const char *name)
{
    PyObject *type, *value, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError) ||
        PyErr_ExceptionMatches(state->base_error))
        return NULL;
    PyErr_Fetch(&type, &value, &trace);
    qllm_raise_value(state, "%s: %s gives no NumPy array: %S", name, Py_TYPE(object)->tp_name,
                     value != NULL ? value : type);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return NULL;
}

/* NumPy's type of an element of DLPack; bfloat16, which NumPy lacks, is its bits in uint16. */
static int dlpack_type(const qllm_dlpack_view *view)
{
    static const int signed_types[] = {NPY_INT8, NPY_INT16, NPY_INT32, NPY_INT64};
    static const int unsigned_types[] = {NPY_UINT8, NPY_UINT16, NPY_UINT32, NPY_UINT64};
    static const int float_types[] = {NPY_NOTYPE, NPY_FLOAT16, NPY_FLOAT32, NPY_FLOAT64};
    const int size = view->bits == 8 ? 0 : view->bits == 16 ? 1 : view->bits == 32 ? 2 : 3;
    if (view->bits != 8 << size)
        return NPY_NOTYPE;
    switch (view->code) {
    case QLLM_DLPACK_INT: return signed_types[size];
    case QLLM_DLPACK_UINT: return unsigned_types[size];
    case QLLM_DLPACK_FLOAT: return float_types[size];
    case QLLM_DLPACK_BFLOAT: return size == 1 ? NPY_UINT16 : NPY_NOTYPE;
    case QLLM_DLPACK_BOOL: return size == 0 ? NPY_BOOL : NPY_NOTYPE;
    }
    return NPY_NOTYPE;
}

/* An array over the memory of an object with __dlpack__. */
static PyObject *from_dlpack(const qllm_state *state, PyObject *object, const char *name,
                             int *is_bfloat16)
{
    qllm_dlpack_view view;
    npy_intp shape[QLLM_DLPACK_DIMENSIONS], strides[QLLM_DLPACK_DIMENSIONS];
    if (qllm_dlpack_import(state, object, name, &view) < 0)
        return foreign_array_failed(state, object, name);
    int type = dlpack_type(&view);
    *is_bfloat16 = view.code == QLLM_DLPACK_BFLOAT;
    for (int i = 0; i < view.ndim; i++) {
        shape[i] = (npy_intp)view.shape[i];
        strides[i] = (npy_intp)view.strides[i] * (view.bits / 8);
    }
    PyObject *array = NULL;
    if (type == NPY_NOTYPE)
        qllm_raise_value(state, "%s: DLPack's element type %d of %d bits has no place here", name,
                         view.code, view.bits);
    else
        array = PyArray_New(&PyArray_Type, view.ndim, shape, type, strides, view.data, 0,
                            view.read_only ? 0 : NPY_ARRAY_WRITEABLE, NULL);
    if (array == NULL)
        Py_DECREF(view.owner);
    else if (PyArray_SetBaseObject((PyArrayObject *)array, view.owner) < 0) /* takes the owner */
        Py_CLEAR(array);
    else
        PyArray_UpdateFlags((PyArrayObject *)array, NPY_ARRAY_UPDATE_ALL);
    return array;
}

/* A NumPy array from __array__; NULL without an error where the object says by a TypeError that it
 * has no NumPy type or no memory here, but may say more by DLPack. */
static PyObject *from_array_method(const qllm_state *state, PyObject *object, int has_dlpack,
                                   const char *name)
{
    PyObject *array = PyObject_CallMethod(object, "__array__", NULL);
    if (array == NULL && has_dlpack && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        return NULL;
    }
    if (array == NULL)
        return foreign_array_failed(state, object, name);
    if (PyArray_Check(array))
        return array;
    Py_DECREF(array);
    return qllm_raise_value(state, "%s: __array__ of %s gave no NumPy array; pass one", name,
                            Py_TYPE(object)->tp_name);
}

/* A NumPy array over the object's own memory, from its __array__ or by DLPack; a bare
 * __array_interface__ is not believed, since its pointer cannot be checked.  New reference.
 * *is_bfloat16: its uint16 are bits of bfloat16. */
static PyObject *as_ndarray(const qllm_state *state, PyObject *object, int sequences_too,
                            const char *name, int *is_bfloat16)
{
    *is_bfloat16 = 0;
    if (PyArray_Check(object) && PyObject_HasAttrString(object, "mask"))
        return qllm_raise_value(state, "%s: a masked array was given; fill the gaps with "
                                "array.filled(value)", name);
    if (PyArray_Check(object))
        return Py_NewRef(object);
    int is_sequence = sequences_too && (PyList_Check(object) || PyTuple_Check(object));
    int has_dlpack = PyObject_HasAttrString(object, "__dlpack__");
    if (PyObject_HasAttrString(object, "__array__")) {
        PyObject *array = from_array_method(state, object, has_dlpack, name);
        if (array != NULL || PyErr_Occurred())
            return array;
    }
    if (has_dlpack)
        return from_dlpack(state, object, name, is_bfloat16);
    if (PyObject_CheckBuffer(object)) {
        PyObject *view = PyMemoryView_FromObject(object);
        PyObject *array = view ? PyArray_FromAny(view, NULL, 0, 0, 0, NULL) : NULL;
        Py_XDECREF(view);
        return array;
    }
    if (is_sequence) {
        PyObject *array = PyArray_FromAny(object, NULL, 0, 0, 0, NULL);
        if (array == NULL && PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Clear();
            return qllm_raise_value(state, "%s: the nested sequence has rows of unequal length; "
                                    "pass a rectangular array", name);
        }
        return array;
    }
    return qllm_raise_value(state, "%s: expected a NumPy array, found %s", name,
                            Py_TYPE(object)->tp_name);
}

static int check_ndim(const qllm_state *state, PyObject *array, int ndim_min, int ndim_max,
                      const char *name)
{
    int ndim = PyArray_NDIM((PyArrayObject *)array);
    if (ndim >= ndim_min && ndim <= ndim_max)
        return 0;
    if (ndim_min == ndim_max)
        qllm_raise_value(state, "%s: expected %d dimension(s), found %d", name, ndim_min, ndim);
    else
        qllm_raise_value(state, "%s: expected %d to %d dimensions, found %d", name, ndim_min,
                         ndim_max, ndim);
    return -1;
}

/* Native byte order, or an error: a swapped array is nearly always a file read in the wrong way. */
static int check_byte_order(const qllm_state *state, PyArrayObject *array, const char *name)
{
    if (PyArray_ISNOTSWAPPED(array))
        return 0;
    qllm_raise_value(state, "%s: dtype %R has the other byte order; convert it with "
                     "array.astype(array.dtype.newbyteorder('='))", name, PyArray_DESCR(array));
    return -1;
}

/* `descr` is stolen, as NumPy does. */
static PyObject *contiguous(PyObject *array, PyArray_Descr *descr)
{
    return PyArray_FromArray((PyArrayObject *)array, descr,
                             NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | NPY_ARRAY_ENSUREARRAY);
}

PyObject *qllm_array_input(const qllm_state *state, PyObject *object, qllm_array_kind kind,
                           int ndim_min, int ndim_max, const char *name)
{
    int sequences_too = kind == QLLM_ARRAY_I64 || kind == QLLM_ARRAY_F64;
    int is_bfloat16;
    PyObject *array = as_ndarray(state, object, sequences_too, name, &is_bfloat16);
    if (array == NULL)
        return NULL;
    PyArrayObject *source = (PyArrayObject *)array;
    int type = PyArray_TYPE(source);
    int fits = type == type_number(kind);
    if (kind == QLLM_ARRAY_I64)
        fits = PyTypeNum_ISINTEGER(type) || (PyArray_SIZE(source) == 0 && type == NPY_FLOAT64);
    else if (kind == QLLM_ARRAY_F64 && !PyArray_Check(object))
        fits = PyTypeNum_ISINTEGER(type) || PyTypeNum_ISFLOAT(type);
    PyObject *result = NULL;
    if (is_bfloat16)
        qllm_raise_value(state, "%s: expected dtype %s, found bfloat16; convert it first", name,
                         kind_name(kind));
    else if (!fits)
        qllm_raise_value(state, "%s: expected dtype %s, found %R; convert it with .astype(...)",
                         name, kind_name(kind), PyArray_DESCR(source));
    else if (check_byte_order(state, source, name) == 0 &&
             check_ndim(state, array, ndim_min, ndim_max, name) == 0) {
        if (type == NPY_UINT64 && kind == QLLM_ARRAY_I64)
            result = PyArray_FromArray(source, PyArray_DescrFromType(NPY_INT64),
                                       NPY_ARRAY_DEFAULT | NPY_ARRAY_FORCECAST);
        else
            result = contiguous(array, PyArray_DescrFromType(type_number(kind)));
        if (result == NULL && PyArray_SIZE(source) == 0) {
            PyErr_Clear();
            result = PyArray_ZEROS(PyArray_NDIM(source), PyArray_DIMS(source), type_number(kind),
                                   0);
        }
    }
    Py_DECREF(array);
    return result;
}

/* The dtype of an unquantized array, by its NumPy type or, for bfloat16, by name. */
static int tensor_dtype(const qllm_state *state, PyArrayObject *array, int is_bfloat16,
                        const char *dtype_name, const char *name, qllm_dtype *dtype)
{
    int type = PyArray_TYPE(array);
    PyObject *descr_name = PyObject_GetAttrString((PyObject *)PyArray_DESCR(array), "name");
    const char *found = descr_name ? PyUnicode_AsUTF8(descr_name) : NULL;
    if (is_bfloat16)
        found = "bfloat16";
    int ok = 0;
    if (found == NULL) {
        Py_XDECREF(descr_name);
        return -1;
    }
    if (strcmp(found, "bfloat16") == 0 ||
        (type == NPY_UINT16 && dtype_name != NULL && strcmp(dtype_name, "bfloat16") == 0)) {
        *dtype = QLLM_BF16;
        found = "bfloat16";
        ok = 1;
    } else if (type == NPY_FLOAT32 || type == NPY_FLOAT16) {
        *dtype = type == NPY_FLOAT32 ? QLLM_F32 : QLLM_F16;
        ok = 1;
    }
    if (ok && dtype_name != NULL && strcmp(dtype_name, qllm_dtype_name(*dtype)) != 0) {
        qllm_raise_value(state, "%s: dtype is said to be '%s' but the array holds %s", name,
                         dtype_name, found);
        ok = 0;
    } else if (!ok)
        qllm_raise_value(state, "%s: expected float32, float16 or bfloat16 (uint16 with "
                         "dtype=\"bfloat16\"), found %s", name, found);
    Py_DECREF(descr_name);
    return ok ? 0 : -1;
}

PyObject *qllm_array_tensor(const qllm_state *state, PyObject *object, const char *dtype_name,
                            const char *name, qllm_tensor *tensor)
{
    int is_bfloat16;
    PyObject *result = NULL;
    PyObject *array = as_ndarray(state, object, 0, name, &is_bfloat16);
    if (array == NULL)
        return NULL;
    if (tensor_dtype(state, (PyArrayObject *)array, is_bfloat16, dtype_name, name,
                     &tensor->dtype) == 0 &&
        check_byte_order(state, (PyArrayObject *)array, name) == 0 &&
        check_ndim(state, array, 1, 2, name) == 0)
        result = contiguous(array, NULL);
    Py_DECREF(array);
    if (result == NULL)
        return NULL;
    int two = qllm_array_ndim(result) == 2;
    tensor->data = qllm_array_data(result);
    tensor->rows = two ? qllm_array_dim(result, 0) : 1;
    tensor->cols = qllm_array_dim(result, two);
    tensor->nbytes = (int64_t)PyArray_NBYTES((PyArrayObject *)result);
    return result;
}

PyObject *qllm_array_new(qllm_array_kind kind, int ndim, const int64_t *shape, void **data)
{
    npy_intp dims[NPY_MAXDIMS];
    for (int i = 0; i < ndim; i++)
        dims[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNew(ndim, dims, type_number(kind));
    if (array != NULL)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

PyObject *qllm_array_view(PyObject *owner, qllm_array_kind kind, int ndim, const int64_t *shape,
                          void *data)
{
    npy_intp dims[NPY_MAXDIMS];
    for (int i = 0; i < ndim; i++)
        dims[i] = (npy_intp)shape[i];
    PyObject *array = PyArray_SimpleNewFromData(ndim, dims, type_number(kind), data);
    if (array == NULL)
        return NULL;
    PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    if (PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(owner)) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static void free_memory(PyObject *capsule)
{
    qllm_free(PyCapsule_GetPointer(capsule, NULL));
}

PyObject *qllm_array_owned(qllm_array_kind kind, int ndim, const int64_t *shape, void *memory)
{
    PyObject *owner = PyCapsule_New(memory, NULL, free_memory);
    if (owner == NULL) {
        qllm_free(memory);
        return NULL;
    }
    PyObject *array = qllm_array_view(owner, kind, ndim, shape, memory);
    Py_DECREF(owner);
    if (array != NULL)
        PyArray_ENABLEFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE);
    return array;
}

void *qllm_array_data(PyObject *array)
{
    return PyArray_DATA((PyArrayObject *)array);
}

int qllm_array_ndim(PyObject *array)
{
    return PyArray_NDIM((PyArrayObject *)array);
}

int64_t qllm_array_dim(PyObject *array, int axis)
{
    return (int64_t)PyArray_DIM((PyArrayObject *)array, axis);
}

int64_t qllm_array_size(PyObject *array)
{
    return (int64_t)PyArray_SIZE((PyArrayObject *)array);
}
