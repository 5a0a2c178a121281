/* Packed weights in the memory of other libraries: making and reading their images, and products by
 * address for qllm.integrations, which hands over tensors that it holds and has checked. */
#include "cpu/image.h"

#include <math.h>
#include <string.h>

#include "core/alloc.h"
#include "cpu/round_int8.h"
#include "python/addresses.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_quant.h"

/* images --------------------------------------------------------------------------------------- */

static int choose_packer(qllm_state *state, qllm_packer *packer)
{
    qllm_isa isa;
    if (qllm_choose_isa(state, NULL, &isa) < 0)
        return -1;
    packer->ops = qllm_encode_ops_get(isa);
    packer->threads = qllm_team_threads(state);
    return packer->threads == NULL ? -1 : 0;
}

/* The image of *packed, which is freed, as a new array. */
static PyObject *image_of(const qllm_state *state, qllm_packed *packed)
{
    int64_t bytes = qllm_image_bytes(packed);
    void *memory;
    qllm_error error;
    qllm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_alloc_large(&memory, bytes, 1, "a packed weight", &error);
    if (status == QLLM_OK)
        qllm_image_write(packed, memory);
    qllm_packed_destroy(packed);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_array_owned(QLLM_ARRAY_U8, 1, &bytes, memory);
}

static PyObject *py_image(PyObject *module, PyObject *object)
{
    qllm_state *state = qllm_state_of(module);
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, object);
    qllm_packer packer;
    qllm_packed *packed;
    qllm_error error;
    qllm_status status;
    if (weight == NULL || choose_packer(state, &packer) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_pack(&packer, weight, "the weight", &packed, &error);
    Py_END_ALLOW_THREADS
    return status == QLLM_OK ? image_of(state, packed) : qllm_raise(state, &error);
}

static PyObject *py_image_from_source(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"array", "format", "blocksize", "name", "dtype", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *object, *blocksize_object = NULL;
    const char *format_name, *name = "array", *dtype = NULL;
    int64_t blocksize = QLLM_BLOCKSIZE_DEFAULT;
    qllm_format format;
    qllm_tensor source;
    qllm_packer packer;
    qllm_packed *packed;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|O$sz:image_from_source", names, &object,
                                     &format_name, &blocksize_object, &name, &dtype) ||
        qllm_parse_format(state, format_name, &format) < 0 ||
        (blocksize_object != NULL &&
         qllm_parse_int64(state, blocksize_object, "blocksize", &blocksize) < 0) ||
        choose_packer(state, &packer) < 0)
        return NULL;
    PyObject *array = qllm_array_tensor(state, object, dtype, name, &source);
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_pack_source(&packer, &source, format, blocksize, name, &packed, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    return status == QLLM_OK ? image_of(state, packed) : qllm_raise(state, &error);
}

static PyObject *py_image_sizes(PyObject *module, PyObject *args)
{
    const qllm_state *state = qllm_state_of(module);
    const char *format_name;
    long long rows, cols, blocksize;
    int64_t bytes;
    qllm_format format;
    qllm_qweight like;
    qllm_error error;
    if (!PyArg_ParseTuple(args, "sLLL:image_sizes", &format_name, &rows, &cols, &blocksize) ||
        qllm_parse_format(state, format_name, &format) < 0)
        return NULL;
    if (qllm_qweight_describe(&like, format, rows, cols, blocksize, "the weight", &error) !=
            QLLM_OK ||
        qllm_image_size(&like, "the weight", &bytes, &error) != QLLM_OK)
        return qllm_raise(state, &error);
    return Py_BuildValue("(LL)", (long long)bytes, (long long)qllm_qweight_nbytes(&like));
}

/* An image as an array from outside: a new reference, or NULL with an exception. */
static PyObject *parse_image(const qllm_state *state, PyObject *object, qllm_image *image)
{
    PyObject *array = qllm_array_input(state, object, QLLM_ARRAY_U8, 1, 1, "image");
    if (array != NULL)
        *image = (qllm_image){qllm_array_data(array), qllm_array_size(array)};
    return array;
}

static PyObject *py_image_weight(PyObject *module, PyObject *args)
{
    qllm_state *state = qllm_state_of(module);
    PyObject *object;
    const char *dtype_name = NULL;
    qllm_packer packer;
    qllm_image image;
    qllm_qweight weight;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTuple(args, "O|z:image_weight", &object, &dtype_name) ||
        choose_packer(state, &packer) < 0)
        return NULL;
    PyObject *array = parse_image(state, object, &image);
    if (array == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_image_unpack(&packer, &image, &weight, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_quantized_tensor_wrap(state, &weight, dtype_name);
}

static PyObject *py_image_error(PyObject *module, PyObject *args)
{
    qllm_state *state = qllm_state_of(module);
    PyObject *object, *source_object, *source_array = NULL;
    const char *dtype = NULL, *name = "source";
    qllm_packer packer;
    qllm_image image;
    qllm_tensor source;
    qllm_quant_error figures;
    qllm_error error;
    qllm_status status = QLLM_OK;
    if (!PyArg_ParseTuple(args, "OO|zs:image_error", &object, &source_object, &dtype, &name) ||
        choose_packer(state, &packer) < 0)
        return NULL;
    PyObject *array = parse_image(state, object, &image);
    if (array != NULL)
        source_array = qllm_array_tensor(state, source_object, dtype, name, &source);
    if (source_array != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = qllm_image_error(&packer, &image, &source, name, &figures, &error);
        Py_END_ALLOW_THREADS
    }
    bool read = source_array != NULL;
    Py_XDECREF(array);
    Py_XDECREF(source_array);
    if (!read || status != QLLM_OK)
        return read ? qllm_raise(state, &error) : NULL;
    return Py_BuildValue("{s:d,s:d,s:d,s:d}", "mean_abs", figures.mean_abs, "max_abs",
                         figures.max_abs, "rmse", figures.rmse, "sqnr_db", figures.sqnr_db);
}

static PyObject *py_image_dequantize(PyObject *module, PyObject *args)
{
    qllm_state *state = qllm_state_of(module);
    PyObject *object, *result = NULL;
    static const qllm_array_kind kinds[] = {QLLM_ARRAY_F32, QLLM_ARRAY_F16, QLLM_ARRAY_U16};
    long long first, n;
    const char *dtype_name = "float32";
    int dtype = QLLM_F32;
    qllm_packer packer;
    qllm_image image;
    qllm_qweight like;
    qllm_error error;
    qllm_status status;
    void *data;
    if (!PyArg_ParseTuple(args, "OLL|s:image_dequantize", &object, &first, &n, &dtype_name) ||
        choose_packer(state, &packer) < 0)
        return NULL;
    while (dtype <= QLLM_BF16 && strcmp(dtype_name, qllm_dtype_name((qllm_dtype)dtype)) != 0)
        dtype++;
    if (dtype > QLLM_BF16)
        return qllm_raise_value(state, "dtype: '%s' is unknown; known are float32, float16, "
                                "bfloat16", dtype_name);
    PyObject *array = parse_image(state, object, &image);
    if (array == NULL)
        return NULL;
    status = qllm_image_describe(&image, &like, &error);
    if (status == QLLM_OK) {
        int64_t shape[2] = {n >= 0 && n <= like.rows ? n : 0, like.cols};
        result = qllm_array_new(kinds[dtype], 2, shape, &data);
    }
    if (result != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = qllm_image_dequantize(&packer, &image, first, n, (qllm_dtype)dtype, data,
                                       &error);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(array);
    if (status == QLLM_OK)
        return result;
    Py_XDECREF(result);
    return qllm_raise(state, &error);
}

static PyObject *py_image_linear_name(PyObject *module, PyObject *args)
{
    qllm_state *state = qllm_state_of(module);
    PyObject *object;
    long long m;
    const char *compute_name, *name = "";
    qllm_compute compute;
    qllm_isa isa;
    qllm_image image;
    qllm_error error;
    if (!PyArg_ParseTuple(args, "OLs:image_linear_name", &object, &m, &compute_name) ||
        qllm_parse_compute(state, compute_name, &compute) < 0 ||
        qllm_choose_isa(state, NULL, &isa) < 0)
        return NULL;
    PyObject *array = parse_image(state, object, &image);
    if (array == NULL)
        return NULL;
    qllm_status status = qllm_image_linear_name(qllm_cpu_ops_get(isa), &image, m, compute, &name,
                                                &error);
    Py_DECREF(array);
    return status == QLLM_OK ? PyUnicode_FromString(name) : qllm_raise(state, &error);
}

/* products by address -------------------------------------------------------------------------- */

static int choose_multiplier(qllm_state *state, qllm_multiplier *by)
{
    qllm_isa isa;
    if (qllm_choose_isa(state, NULL, &isa) < 0)
        return -1;
    by->ops = qllm_cpu_ops_get(isa);
    by->encode = qllm_encode_ops_get(isa);
    by->threads = qllm_team_threads(state);
    return by->threads == NULL ? -1 : 0;
}

enum { PRODUCT_ARGUMENTS = 10 };

static void read_product(qllm_reader *from, qllm_image *image, qllm_image_product *product)
{
    image->data = qllm_read_address(from);
    image->bytes = qllm_read_int(from);
    product->x = qllm_read_address(from);
    product->dtype = qllm_read_dtype(from);
    product->m = qllm_read_int(from);
    product->cols = qllm_read_int(from);
    product->bias = qllm_read_address(from);
    product->bias_dtype = qllm_read_dtype(from);
    product->y = qllm_read_address(from);
    product->rows = qllm_read_int(from);
}

static void read_rounded(qllm_reader *from, qllm_rounded_x *rounded)
{
    rounded->q = qllm_read_address(from);
    rounded->absmax = qllm_read_address(from);
    rounded->outliers = qllm_read_address(from);
    rounded->n_outliers = qllm_read_int(from);
}

static int read_options(const qllm_state *state, qllm_reader *from, qllm_linear_options *options)
{
    const char *compute = PyUnicode_AsUTF8(*from->next++);
    options->int8_threshold = (float)PyFloat_AsDouble(*from->next++);
    return PyErr_Occurred() ? -1 : qllm_parse_compute(state, compute, &options->compute);
}

static PyObject *none_unless(const qllm_state *state, qllm_status status, const qllm_error *error)
{
    if (status != QLLM_OK)
        return qllm_raise(state, error);
    Py_RETURN_NONE;
}

/* A product with x as it is or, `is_rounded`, with one that the caller has rounded. */
static PyObject *multiply(qllm_state *state, PyObject *const *args, Py_ssize_t count,
                          bool is_rounded)
{
    qllm_reader from = {args};
    qllm_image image;
    qllm_image_product product = {.x = NULL};
    qllm_rounded_x rounded;
    qllm_multiplier by;
    qllm_error error;
    qllm_status status;
    if (qllm_wrong_count(is_rounded ? "image_linear_int8" : "image_linear", count,
                    PRODUCT_ARGUMENTS + (is_rounded ? 4 : 2)))
        return NULL;
    read_product(&from, &image, &product);
    if (is_rounded)
        read_rounded(&from, &rounded);
    else if (read_options(state, &from, &product.options) < 0)
        return NULL;
    if (PyErr_Occurred() || choose_multiplier(state, &by) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = is_rounded ? qllm_image_linear_int8(&by, &image, &product, &rounded, &error)
                        : qllm_image_linear(&by, &image, &product, &error);
    Py_END_ALLOW_THREADS
    return none_unless(state, status, &error);
}

static PyObject *py_image_linear(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return multiply(qllm_state_of(module), args, count, false);
}

static PyObject *py_image_linear_int8(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    return multiply(qllm_state_of(module), args, count, true);
}

static PyObject *py_round_int8(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    qllm_state *state = qllm_state_of(module);
    qllm_reader from = {args};
    qllm_multiplier by;
    qllm_error error;
    qllm_status status;
    if (qllm_wrong_count("round_int8", count, 8))
        return NULL;
    const void *x = qllm_read_address(&from);
    qllm_dtype dtype = qllm_read_dtype(&from);
    int64_t m = qllm_read_int(&from), cols = qllm_read_int(&from);
    float threshold = (float)PyFloat_AsDouble(*from.next++);
    int8_t *q = qllm_read_address(&from);
    float *absmax = qllm_read_address(&from);
    uint8_t *used = qllm_read_address(&from);
    if (PyErr_Occurred() || choose_multiplier(state, &by) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_round_int8(&by, x, dtype, m, cols, threshold, q, absmax, used, &error);
    Py_END_ALLOW_THREADS
    return none_unless(state, status, &error);
}

/* Words spread over the memory evenly, or all of its bytes where it is small, mixed into `sum`. */
static uint64_t sample(const uint8_t *memory, int64_t bytes, uint64_t sum)
{
    enum { WORDS = 32 };
    int64_t step = bytes / WORDS;
    for (int64_t i = 0; i < bytes && step < 8; i++)
        sum = (sum ^ memory[i]) * 0x9e3779b97f4a7c15u;
    for (int64_t i = 0; i < WORDS && step >= 8; i++) {
        uint64_t word;
        memcpy(&word, memory + i * step + (i * 8) % (step - 7), sizeof word);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
    }
    return sum;
}

static PyObject *py_sample_words(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    qllm_reader from = {args};
    uint64_t sum = 0;
    (void)module;
    if (qllm_wrong_count("sample_words", count, count + count % 2))
        return NULL;
    while (from.next < args + count) {
        const uint8_t *memory = qllm_read_address(&from);
        int64_t bytes = qllm_read_int(&from);
        if (PyErr_Occurred())
            return NULL;
        sum = sample(memory, bytes, sum);
    }
    return PyLong_FromUnsignedLongLong(sum);
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS
#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef functions[] = {
    {"image", py_image, METH_O,
     "image($module, weight, /)\n--\n\n"
     "A QuantizedTensor packed for the CPU kernels, as uint8 (n,) that owns its memory."},
    {"image_from_source", (PyCFunction)(void (*)(void))py_image_from_source, KEYWORDS,
     "image_from_source($module, array, format, blocksize=64, *, name='array', dtype=None)\n--\n\n"
     "image(quantize(array, format, blocksize)) without the standard bytes between."},
    {"image_sizes", py_image_sizes, METH_VARARGS,
     "image_sizes($module, format, rows, cols, blocksize, /)\n--\n\n"
     "Bytes of such an image, and nbytes of the weight."},
    {"image_weight", py_image_weight, METH_VARARGS,
     "image_weight($module, image, dtype_name=None, /)\n--\n\nThe QuantizedTensor of an image."},
    {"image_error", py_image_error, METH_VARARGS,
     "image_error($module, image, source, dtype=None, name='source', /)\n--\n\n"
     "image_weight(image).error(source) without a copy of the weight."},
    {"image_dequantize", py_image_dequantize, METH_VARARGS,
     "image_dequantize($module, image, first, n, dtype='float32', /)\n--\n\n"
     "Rows [first, first + n) of the weight (n, cols), exactly, rounded to dtype: float32,\n"
     "float16, or bfloat16 as its bits in uint16."},
    {"image_linear_name", py_image_linear_name, METH_VARARGS,
     "image_linear_name($module, image, m, compute, /)\n--\n\n"
     "Which kernel multiplies m rows by this weight."},
    {"image_linear", FAST(py_image_linear),
     "image_linear($module, image, nbytes, x, dtype, m, cols, bias, bias_dtype, y, rows, compute, "
     "int8_threshold, /)\n--\n\n"
     "y = x W^T + bias; image, x, bias (0 for none) and y are addresses of memory that the caller\n"
     "holds, x (m, cols) and y (m, rows) contiguous and of one dtype: 0 float32, 1 float16,\n"
     "2 bfloat16."},
    {"image_linear_int8", FAST(py_image_linear_int8),
     "image_linear_int8($module, image, nbytes, x, dtype, m, cols, bias, bias_dtype, y, rows, q, "
     "absmax, outliers, n_outliers, /)\n--\n\n"
     "The same for an int8 weight and an x that is rounded already: addresses of q int8 (m, cols)\n"
     "in units of absmax float32 (m,) / 127 and of outliers int64 (n_outliers,), the columns that\n"
     "are added from x in every row."},
    {"round_int8", FAST(py_round_int8),
     "round_int8($module, x, dtype, m, cols, threshold, q, absmax, used, /)\n--\n\n"
     "Rounds x (m, cols) as bitsandbytes does for LLM.int8(), by addresses: q int8 (m, cols),\n"
     "absmax float32 (m,), used uint8 (cols,) 1 for the columns that hold |x| >= threshold."},
    {"sample_words", FAST(py_sample_words),
     "sample_words($module, *addresses_and_nbytes)\n--\n\n"
     "A number that most changes of these pieces of memory change: address, nbytes, address, ..."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_image(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
