/* Packing and quantizing at the speed of memory in the hands of tests and benchmarks:
 * pack_roundtrip, pack_source, quantize_pass. */
#include "cpu/packed.h"

#include "cpu/quantize.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_quant.h"

/* The functions and threads that a call asks for. */
static int parse_packer(qllm_state *state, const char *isa_name, PyObject *threads_object,
                        qllm_packer *packer)
{
    qllm_isa isa;
    int threads;
    if (qllm_choose_isa(state, isa_name, &isa) < 0 ||
        qllm_parse_threads(state, threads_object, &threads) < 0)
        return -1;
    packer->ops = qllm_encode_ops_get(isa);
    packer->threads = qllm_shared_threads(state, threads);
    return packer->threads == NULL ? -1 : 0;
}

static PyObject *py_pack_roundtrip(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"weight", "isa", "threads", NULL};
    qllm_state *state = qllm_state_of(module);
    PyObject *object, *threads = Py_None;
    const char *isa = NULL;
    qllm_packer packer;
    qllm_packed *packed = NULL;
    qllm_qweight copy;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$zO:pack_roundtrip", names, &object, &isa,
                                     &threads) ||
        parse_packer(state, isa, threads, &packer) < 0)
        return NULL;
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, object);
    if (weight == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_pack(&packer, weight, "the weight", &packed, &error);
    if (status == QLLM_OK)
        status = qllm_unpack(&packer, packed, &copy, &error);
    qllm_packed_destroy(packed);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_quantized_tensor_wrap(state, &copy, NULL);
}

/* What pack_source and quantize_pass are given. */
typedef struct source_arguments {
    PyObject *array; /* owned */
    qllm_tensor tensor;
    qllm_format format;
    int64_t blocksize;
    const char *name;
    qllm_packer packer;
} source_arguments;

static int parse_source(qllm_state *state, PyObject *args, PyObject *kwargs, source_arguments *out)
{
    static char *names[] = {"array", "format", "blocksize", "name", "dtype", "isa", "threads",
                            NULL};
    PyObject *object, *blocksize = NULL, *threads = Py_None;
    const char *format, *dtype = NULL, *isa = NULL;
    out->name = "array";
    out->blocksize = QLLM_BLOCKSIZE_DEFAULT;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os|O$szzO", names, &object, &format, &blocksize,
                                     &out->name, &dtype, &isa, &threads) ||
        qllm_parse_format(state, format, &out->format) < 0 ||
        (blocksize != NULL &&
         qllm_parse_int64(state, blocksize, "blocksize", &out->blocksize) < 0) ||
        parse_packer(state, isa, threads, &out->packer) < 0)
        return -1;
    out->array = qllm_array_tensor(state, object, dtype, out->name, &out->tensor);
    return out->array == NULL ? -1 : 0;
}

static PyObject *py_pack_source(PyObject *module, PyObject *args, PyObject *kwargs)
{
    qllm_state *state = qllm_state_of(module);
    source_arguments source;
    qllm_packed *packed = NULL;
    qllm_qweight copy;
    qllm_quant_error figures;
    qllm_error error;
    qllm_status status;
    if (parse_source(state, args, kwargs, &source) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_pack_source(&source.packer, &source.tensor, source.format, source.blocksize,
                              source.name, &packed, &error);
    if (status == QLLM_OK)
        status = qllm_packed_error(&source.packer, packed, &source.tensor, source.name, &figures,
                                   &error);
    if (status == QLLM_OK)
        status = qllm_unpack(&source.packer, packed, &copy, &error);
    qllm_packed_destroy(packed);
    Py_END_ALLOW_THREADS
    Py_DECREF(source.array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    PyObject *tensor = qllm_quantized_tensor_wrap(state, &copy, NULL);
    return tensor == NULL ? NULL
                          : Py_BuildValue("(N{s:d,s:d,s:d,s:d})", tensor, "mean_abs",
                                          figures.mean_abs, "max_abs", figures.max_abs, "rmse",
                                          figures.rmse, "sqnr_db", figures.sqnr_db);
}

static PyObject *py_quantize_pass(PyObject *module, PyObject *args, PyObject *kwargs)
{
    qllm_state *state = qllm_state_of(module);
    source_arguments source;
    qllm_error error;
    qllm_status status;
    if (parse_source(state, args, kwargs, &source) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = qllm_cpu_quantize_pass(&source.packer, &source.tensor, source.format,
                                    source.blocksize, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(source.array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

#define KEYWORDS METH_VARARGS | METH_KEYWORDS

static PyMethodDef functions[] = {
    {"pack_roundtrip", (PyCFunction)(void (*)(void))py_pack_roundtrip, KEYWORDS,
     "pack_roundtrip($module, weight, *, isa=None, threads=None)\n--\n\n"
     "The weight, packed for the CPU kernels and unpacked again: equal bit for bit."},
    {"pack_source", (PyCFunction)(void (*)(void))py_pack_source, KEYWORDS,
     "pack_source($module, array, format, blocksize=64, *, name='array', dtype=None, isa=None, "
     "threads=None)\n--\n\n"
     "An array quantized straight into the CPU's layout and unpacked again, and its error: equal "
     "to\nquantize(array, ...) and to its error(array), bit for bit."},
    {"quantize_pass", (PyCFunction)(void (*)(void))py_quantize_pass, KEYWORDS,
     "quantize_pass($module, array, format, blocksize=64, *, name='array', dtype=None, isa=None, "
     "threads=None)\n--\n\n"
     "Reads and quantizes an array and keeps nothing: what that costs by itself."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_encode(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
