/* The methods of Decoder that take unquantized arrays, such as views of a mapped file. */
#include <string.h>

#include "core/qweight.h"
#include "core/random_weight.h"
#include "python/arguments.h"
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

/* A random weight on the host, for a device that makes none. */
static qllm_status set_random(qllm_decoder_object *self, const qllm_slot *slot, qllm_format format,
                              int64_t blocksize, uint64_t seed, qllm_error *error)
{
    qllm_qweight weight;
    qllm_status status = qllm_random_weight(&weight, format, slot->rows, slot->cols, blocksize,
                                            seed, slot->name, error);
    if (status != QLLM_OK)
        return status;
    status = slot->kind == QLLM_SLOT_EMBEDDING
        ? self->backend->set_embedding(self->decoder, &weight, error)
        : self->backend->set_linear(self->decoder, slot->name, &weight, NULL, 0, error);
    qllm_qweight_clear(&weight);
    return status;
}

/* The slot of that name; 0, or -1 with an exception. */
static int find_slot(const qllm_state *state, qllm_decoder_object *self, const char *name,
                     qllm_slot *slot)
{
    int64_t count = self->backend->slot_count(self->decoder);
    for (int64_t i = 0; i < count; i++) {
        self->backend->slot(self->decoder, i, slot);
        if (strcmp(slot->name, name) == 0 && slot->kind != QLLM_SLOT_VECTOR)
            return 0;
    }
    qllm_raise_value(state, "slot '%s' is no linear slot of this decoder, nor its embedding", name);
    return -1;
}

PyObject *qllm_decoder_set_random(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "format", "blocksize", "seed", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    const qllm_backend *backend = self->backend;
    PyObject *blocksize_object = NULL, *seed_object = NULL;
    int64_t blocksize = QLLM_BLOCKSIZE_DEFAULT;
    const char *name, *format_name;
    uint64_t seed = 0;
    qllm_format format;
    qllm_slot slot;
    qllm_qweight described;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ss|OO:set_random", names, &name, &format_name,
                                     &blocksize_object, &seed_object) ||
        qllm_parse_format(state, format_name, &format) < 0 ||
        (blocksize_object != NULL &&
         qllm_parse_int64(state, blocksize_object, "blocksize", &blocksize) < 0) ||
        (seed_object != NULL && qllm_to_uint(state, seed_object, "seed", 64, &seed) < 0) ||
        find_slot(state, self, name, &slot) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = backend->set_random != NULL
        ? backend->set_random(self->decoder, name, format, blocksize, seed, &error)
        : set_random(self, &slot, format, blocksize, seed, &error);
    Py_END_ALLOW_THREADS
    if (status == QLLM_OK)
        status = qllm_qweight_describe(&described, format, slot.rows, slot.cols, blocksize, name,
                                       &error);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return PyLong_FromLongLong(qllm_qweight_nbytes(&described));
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
