/* The methods of Decoder that take unquantized arrays, such as views of a mapped file. */
#include "core/qweight.h"
#include "python/array.h"
#include "python/py_decoder.h"
#include "python/py_quant.h"

/* An unquantized array and its format, for a slot. */
typedef struct load_arguments {
    PyObject *array, *bias; /* owned; bias NULL for None */
    qllm_tensor values;
    qllm_format format;
    int64_t blocksize;
} load_arguments;

static void clear_load(load_arguments *load)
{
    Py_CLEAR(load->array);
    Py_CLEAR(load->bias);
}

static int take_load(const qllm_state *state, PyObject *array, const char *format,
                     PyObject *blocksize, PyObject *bias, const char *name, const char *dtype,
                     load_arguments *load)
{
    *load = (load_arguments){.blocksize = QLLM_BLOCKSIZE_DEFAULT};
    if (qllm_parse_format(state, format, &load->format) < 0 ||
        (blocksize != NULL &&
         qllm_parse_int64(state, blocksize, "blocksize", &load->blocksize) < 0))
        return -1;
    load->array = qllm_array_tensor(state, array, dtype, name, &load->values);
    if (load->array != NULL && bias != Py_None)
        load->bias = qllm_array_input(state, bias, QLLM_ARRAY_F32, 1, 1, "bias");
    return load->array == NULL || (bias != Py_None && load->bias == NULL) ? -1 : 0;
}

/* What a weight of that format and shape costs as standard bytes. */
static PyObject *standard_size(const qllm_state *state, const load_arguments *load)
{
    qllm_qweight weight;
    qllm_error error;
    const qllm_tensor *values = &load->values;
    if (qllm_qweight_describe(&weight, load->format, values->rows, values->cols, load->blocksize,
                              "the weight", &error) != QLLM_OK)
        return qllm_raise(state, &error);
    return PyLong_FromLongLong(qllm_qweight_nbytes(&weight));
}

PyObject *qllm_decoder_load_linear(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "array", "format", "blocksize", "bias", "name", "dtype", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *array, *blocksize = NULL, *bias = Py_None, *result = NULL;
    const char *slot, *format, *name = "array", *dtype = NULL;
    load_arguments load;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOs|OO$sz:load_linear", names, &slot, &array,
                                     &format, &blocksize, &bias, &name, &dtype))
        return NULL;
    if (take_load(state, array, format, blocksize, bias, name, dtype, &load) == 0) {
        const float *values = load.bias != NULL ? qllm_array_data(load.bias) : NULL;
        int64_t length = load.bias != NULL ? qllm_array_size(load.bias) : 0;
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->load_linear(self->decoder, slot, &load.values, load.format,
                                            load.blocksize, name, values, length, &error);
        Py_END_ALLOW_THREADS
        result = status == QLLM_OK ? standard_size(state, &load) : qllm_raise(state, &error);
    }
    clear_load(&load);
    return result;
}

PyObject *qllm_decoder_load_embedding(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "format", "name", "dtype", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    const char *format, *name = "array", *dtype = NULL;
    PyObject *array, *result = NULL;
    load_arguments load;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|$sz:load_embedding", names, &array, &format,
                                     &name, &dtype))
        return NULL;
    if (take_load(state, array, format, NULL, Py_None, name, dtype, &load) == 0) {
        Py_BEGIN_ALLOW_THREADS
        status = self->backend->load_embedding(self->decoder, &load.values, load.format, name,
                                               &error);
        Py_END_ALLOW_THREADS
        result = status == QLLM_OK ? Py_NewRef(Py_None) : qllm_raise(state, &error);
    }
    clear_load(&load);
    return result;
}

PyObject *qllm_decoder_tie_embedding(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    qllm_error error;
    qllm_status status;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->tie_embedding(self->decoder, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(qllm_state_of_type(Py_TYPE(object)), &error);
    Py_RETURN_NONE;
}

PyObject *qllm_decoder_linear_error(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "array", "name", "dtype", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    const char *slot, *name = "array", *dtype = NULL;
    PyObject *source;
    qllm_tensor values;
    qllm_quant_error figures;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO|$sz:linear_error", names, &slot, &source,
                                     &name, &dtype))
        return NULL;
    PyObject *array = qllm_array_tensor(state, source, dtype, name, &values);
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->linear_error(self->decoder, slot, &values, name, &figures, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return Py_BuildValue("{s:d,s:d,s:d,s:d}", "mean_abs", figures.mean_abs, "max_abs",
                         figures.max_abs, "rmse", figures.rmse, "sqnr_db", figures.sqnr_db);
}
