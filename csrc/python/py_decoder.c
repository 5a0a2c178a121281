/* The type qllm._core.Decoder, over the table of a device. */
#include "python/py_decoder.h"

#include <math.h>
#include <string.h>

#include "decoder/cpu_backend.h"
#include "python/arguments.h"
#include "python/array.h"
#include "python/py_cpu.h"
#include "python/py_quant.h"

/* making and freeing --------------------------------------------------------------------------- */

static int parse_options(const qllm_state *state, PyObject *threads, PyObject *threshold,
                         const char *outliers, qllm_decoder_options *options)
{
    double limit;
    int64_t count;
    if (threads != Py_None) {
        if (qllm_to_int64(state, threads, "threads", &count) < 0)
            return -1;
        if (count < 1 || count > 65536) {
            qllm_raise_value(state, "threads: %lld, expected 1 to 65536, or None for all that this "
                             "process may use", (long long)count);
            return -1;
        }
        options->threads = (int)count;
    }
    if (threshold != NULL) {
        if (qllm_to_double(state, threshold, "int8_threshold", &limit) < 0)
            return -1;
        if (!isfinite(limit)) {
            qllm_raise_value(state, "int8_threshold: %R, expected a finite number (0 or less "
                             "switches the outliers off)", threshold);
            return -1;
        }
        options->int8_threshold = (float)limit;
    }
    options->int8_batch = strcmp(outliers, "batch") == 0;
    if (!options->int8_batch && strcmp(outliers, "row") != 0) {
        qllm_raise_value(state, "int8_outliers: '%s', expected 'row' or 'batch'", outliers);
        return -1;
    }
    return 0;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "device", "threads", "isa", "int8_threshold", "int8_outliers",
                            "compute", NULL};
    const qllm_state *state = qllm_state_of_type(type);
    PyObject *dict, *threads = Py_None, *threshold = NULL;
    const char *device = "cpu", *outliers = "row", *compute = "exact";
    qllm_decoder_options options = {.variant = NULL, .int8_threshold = 6.0f};
    qllm_parsed_config parsed;
    qllm_error error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$sOzOss:Decoder", names, &dict, &device,
                                     &threads, &options.variant, &threshold, &outliers,
                                     &compute) ||
        qllm_parse_compute(state, compute, &options.compute) < 0 ||
        parse_options(state, threads, threshold, outliers, &options) < 0)
        return NULL;
    qllm_decoder_object *self = (qllm_decoder_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    int failed = qllm_parse_config(state, dict, &parsed) < 0;
    if (!failed)
        failed = qllm_find_device(type, device, &self->backend, &options.index) < 0;
    if (!failed && self->backend->decoder_create(&parsed.config, &options, &self->decoder,
                                                 &error) != QLLM_OK) {
        qllm_raise(state, &error);
        failed = 1;
    }
    qllm_format_text(self->device, sizeof self->device, "%s", device);
    qllm_parsed_config_clear(&parsed);
    if (failed)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static int decoder_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void decoder_dealloc(PyObject *object)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->backend != NULL)
        self->backend->decoder_destroy(self->decoder);
    type->tp_free(object);
    Py_DECREF(type);
}

/* weights -------------------------------------------------------------------------------------- */

/* Asks for one slot without the GIL: a step in another thread may hold the device's lock. */
static void describe_slot(const qllm_decoder_object *self, int64_t index, qllm_slot *slot)
{
    Py_BEGIN_ALLOW_THREADS
    self->backend->slot(self->decoder, index, slot);
    Py_END_ALLOW_THREADS
}

static PyObject *decoder_slots(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    PyObject *result = PyDict_New();
    (void)unused;
    for (int64_t i = 0; result != NULL && i < self->backend->slot_count(self->decoder); i++) {
        qllm_slot slot;
        describe_slot(self, i, &slot);
        PyObject *shape = slot.kind == QLLM_SLOT_VECTOR
                              ? Py_BuildValue("(L)", (long long)slot.rows)
                              : Py_BuildValue("(LL)", (long long)slot.rows, (long long)slot.cols);
        if (shape == NULL || PyDict_SetItemString(result, slot.name, shape) < 0)
            Py_CLEAR(result);
        Py_XDECREF(shape);
    }
    return result;
}

static PyObject *decoder_missing(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    PyObject *result = PyList_New(0);
    (void)unused;
    for (int64_t i = 0; result != NULL && i < self->backend->slot_count(self->decoder); i++) {
        qllm_slot slot;
        describe_slot(self, i, &slot);
        if (slot.set || slot.optional)
            continue;
        PyObject *name = PyUnicode_FromString(slot.name);
        if (name == NULL || PyList_Append(result, name) < 0)
            Py_CLEAR(result);
        Py_XDECREF(name);
    }
    return result;
}

static PyObject *decoder_set_linear(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "weight", "bias", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *tensor, *bias_object = Py_None, *bias = NULL;
    const char *slot;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO|O:set_linear", names, &slot, &tensor,
                                     &bias_object))
        return NULL;
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, tensor);
    if (weight == NULL)
        return NULL;
    if (bias_object != Py_None) {
        bias = qllm_array_input(state, bias_object, QLLM_ARRAY_F32, 1, 1, "bias");
        if (bias == NULL)
            return NULL;
    }
    const float *values = bias != NULL ? qllm_array_data(bias) : NULL;
    int64_t length = bias != NULL ? qllm_array_size(bias) : 0;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->set_linear(self->decoder, slot, weight, values, length, &error);
    Py_END_ALLOW_THREADS
    Py_XDECREF(bias);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

static PyObject *decoder_set_vector(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"slot", "values", NULL};
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    PyObject *values;
    const char *slot;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO:set_vector", names, &slot, &values))
        return NULL;
    PyObject *array = qllm_array_input(state, values, QLLM_ARRAY_F32, 1, 1, slot);
    if (array == NULL)
        return NULL;
    const float *data = qllm_array_data(array);
    int64_t n = qllm_array_size(array);
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->set_vector(self->decoder, slot, data, n, &error);
    Py_END_ALLOW_THREADS
    Py_DECREF(array);
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

static PyObject *decoder_set_embedding(PyObject *object, PyObject *tensor)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    const qllm_qweight *weight = qllm_quantized_tensor_weight(state, tensor);
    qllm_error error;
    qllm_status status;
    if (weight == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->set_embedding(self->decoder, weight, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    Py_RETURN_NONE;
}

static PyObject *decoder_linear(PyObject *object, PyObject *argument)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    const qllm_state *state = qllm_state_of_type(Py_TYPE(object));
    qllm_qweight weight;
    qllm_error error;
    qllm_status status;
    if (!PyUnicode_Check(argument)) {
        PyErr_Format(PyExc_TypeError, "slot: expected a str, found %s", Py_TYPE(argument)->tp_name);
        return NULL;
    }
    const char *slot = PyUnicode_AsUTF8(argument);
    if (slot == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = self->backend->get_linear(self->decoder, slot, &weight, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(state, &error);
    return qllm_quantized_tensor_wrap(state, &weight, NULL);
}

/* steps ---------------------------------------------------------------------------------------- */

static PyObject *decoder_sequence(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    qllm_sequence *sequence;
    qllm_error error;
    (void)unused;
    if (self->backend->sequence_create(self->decoder, &sequence, &error) != QLLM_OK)
        return qllm_raise(qllm_state_of_type(Py_TYPE(object)), &error);
    return qllm_wrap_sequence(self, sequence);
}

/* reports -------------------------------------------------------------------------------------- */

static PyObject *decoder_nbytes(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    qllm_decoder_bytes bytes;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    self->backend->nbytes(self->decoder, &bytes);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("{s:L,s:L,s:L,s:L}", "weights", (long long)bytes.weights, "embedding",
                         (long long)bytes.embedding, "kv_cache", (long long)bytes.kv_cache,
                         "scratch", (long long)bytes.scratch);
}

/* The names of the kernels of one format as a list; NULL without an exception: there are none. */
static PyObject *kernel_list(const qllm_decoder_object *self, qllm_format format)
{
    enum { CAPACITY = 32 };
    const char *texts[CAPACITY];
    int count;
    Py_BEGIN_ALLOW_THREADS
    count = self->backend->kernels(self->decoder, format, texts, CAPACITY);
    Py_END_ALLOW_THREADS
    PyObject *list = count > 0 ? PyList_New(0) : NULL;
    for (int i = 0; list != NULL && i < count; i++) {
        PyObject *text = PyUnicode_FromString(texts[i]);
        if (text == NULL || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

static PyObject *decoder_info(PyObject *object, PyObject *unused)
{
    qllm_decoder_object *self = (qllm_decoder_object *)object;
    qllm_decoder_info info;
    (void)unused;
    PyObject *kernels = PyDict_New();
    for (int f = 0; kernels != NULL && f < QLLM_FORMAT_COUNT; f++) {
        PyObject *list = kernel_list(self, (qllm_format)f);
        if (list == NULL && !PyErr_Occurred())
            continue;
        const char *format = qllm_format_name((qllm_format)f);
        if (list == NULL || PyDict_SetItemString(kernels, format, list) < 0)
            Py_CLEAR(kernels);
        Py_XDECREF(list);
    }
    if (kernels == NULL)
        return NULL;
    self->backend->info(self->decoder, &info);
    return Py_BuildValue("{s:s,s:s,s:i,s:s,s:s,s:s,s:N,s:d,s:s}", "device", self->device, "isa",
                         info.variant, "threads", info.threads, "cpu_model", info.model, "compute",
                         info.compute, "attention", info.attention, "kernels", kernels,
                         "int8_threshold", (double)info.int8_threshold, "int8_outliers",
                         info.int8_batch ? "batch" : "row");
}

static PyMethodDef decoder_methods[] = {
    {"slots", decoder_slots, METH_NOARGS,
     "slots($self, /)\n--\n\n"
     "Every slot this config needs and its shape, in a stable order; those of "
     "linear layers and of the\nembedding are (rows, cols)."},
    {"missing", decoder_missing, METH_NOARGS,
     "missing($self, /)\n--\n\n"
     "The slots that are needed and not set; step raises while there are any."},
    {"set_linear", (PyCFunction)(void (*)(void))decoder_set_linear, METH_VARARGS | METH_KEYWORDS,
     "set_linear($self, slot, weight, bias=None)\n--\n\n"
     "Packs a QuantizedTensor (rows, cols) of any "
     "format and a bias, float32 (rows,), into a linear\nslot; what was there is kept on failure."},
    {"set_vector", (PyCFunction)(void (*)(void))decoder_set_vector, METH_VARARGS | METH_KEYWORDS,
     "set_vector($self, slot, values)\n--\n\n"
     "Sets the weight or bias of a norm, float32 (n,)."},
    {"set_embedding", decoder_set_embedding, METH_O,
     "set_embedding($self, weight, /)\n--\n\n"
     "Sets the input embedding: a QuantizedTensor (vocab, hidden) "
     "of a float format."},
    {"load_linear", (PyCFunction)(void (*)(void))qllm_decoder_load_linear,
     METH_VARARGS | METH_KEYWORDS,
     "load_linear($self, slot, array, format, blocksize=64, bias=None, *, name='array', "
     "dtype=None)\n--\n\n"
     "Quantizes an unquantized array (as quantize takes it) straight into a linear slot: the bytes "
     "of\nset_linear(slot, quantize(array, format, blocksize), bias) without a second copy.  "
     "Returns\nnbytes of that QuantizedTensor."},
    {"load_embedding", (PyCFunction)(void (*)(void))qllm_decoder_load_embedding,
     METH_VARARGS | METH_KEYWORDS,
     "load_embedding($self, array, format, *, name='array', dtype=None)\n--\n\n"
     "The same for the input embedding and a float format."},
    {"set_random", (PyCFunction)(void (*)(void))qllm_decoder_set_random,
     METH_VARARGS | METH_KEYWORDS,
     "set_random($self, slot, format, blocksize=64, seed=0)\n--\n\n"
     "Fills a linear slot or \"embedding\" with random weights, made on the device where it offers "
     "that: to\nmeasure speed with. Returns nbytes of that QuantizedTensor."},
    {"tie_embedding", qllm_decoder_tie_embedding, METH_NOARGS,
     "tie_embedding($self, /)\n--\n\n"
     "Makes the weight that the slot 'head' has now, of a float format, the input embedding too, "
     "held once.\nThe embedding stays what it is when the head is set anew."},
    {"linear_error", (PyCFunction)(void (*)(void))qllm_decoder_linear_error,
     METH_VARARGS | METH_KEYWORDS,
     "linear_error($self, slot, array, *, name='array', dtype=None)\n--\n\n"
     "linear(slot).error(array) without a copy of the weight."},
    {"linear", decoder_linear, METH_O,
     "linear($self, slot, /)\n--\n\n"
     "The weight of a linear slot or of the embedding as a QuantizedTensor: "
     "the bytes that were set."},
    {"sequence", decoder_sequence, METH_NOARGS, "sequence($self, /)\n--\n\n"
     "A new, empty Sequence."},
    {"step", (PyCFunction)(void (*)(void))qllm_decoder_step, METH_VARARGS | METH_KEYWORDS,
     "step($self, sequences, tokens, want=None)\n--\n\n"
     "Logits, float32 (wanted rows, vocab), of one row "
     "per (sequences[i], tokens[i]): the rows of a\nsequence are consecutive and are its next "
     "positions. want: bool (n,), default all.  On any error no\nsequence has changed.  A row's "
     "logits are the same bits whatever stands beside it, except with\nint8_outliers=\"batch\", "
     "where the rows of a chunk share their outlier columns by definition."},
    {"step_draw", (PyCFunction)(void (*)(void))qllm_decoder_step_draw, METH_VARARGS | METH_KEYWORDS,
     "step_draw($self, sequences, tokens, want, rows, *, temperature=1.0, top_k=0, top_p=1.0, "
     "min_p=0.0,\nrepetition_penalty=1.0, seed=0, prompt=0, step=0, keep_ties=False, "
     "round_bf16=False, history=None,\nlogits=False, threads=None)\n--\n\n"
     "A step and the draws from its logits: (tokens, logprobs, sampling_logprobs, logits or None), "
     "the bits\nof step and sample. rows: the wanted row of each draw, in ascending order; the "
     "parameters of sample are\none value or one for each draw. Drawn on the device where it "
     "offers that, else here by `threads` threads.\nOn any error no sequence has changed."},
    {"embed", qllm_decoder_embed, METH_O,
     "embed($self, tokens, /)\n--\n\n"
     "Hidden states, float32 (n, hidden): the embedding's rows of token ids. Needs no other slot."},
    {"blocks", (PyCFunction)(void (*)(void))qllm_decoder_blocks, METH_VARARGS | METH_KEYWORDS,
     "blocks($self, sequences, hidden)\n--\n\n"
     "The hidden states that all layers of this decoder make of others, float32 (n, hidden), one "
     "row per\nsequences[i] as in step. Needs the slots of the layers alone."},
    {"head", qllm_decoder_head, METH_O,
     "head($self, hidden, /)\n--\n\n"
     "Logits, float32 (n, vocab), of hidden states (n, hidden): the final norm and the output "
     "embedding,\nwhich are all that is needed. head(blocks(sequences, embed(tokens))) has the "
     "bits of step."},
    {"info", decoder_info, METH_NOARGS,
     "info($self, /)\n--\n\ndevice, isa, threads, cpu_model, compute, attention, kernels ({format: "
     "[names]}), int8_threshold,\nint8_outliers."},
    {"nbytes", decoder_nbytes, METH_NOARGS,
     "nbytes($self, /)\n--\n\n"
     "Bytes held now: weights, embedding, kv_cache, scratch."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot decoder_type_slots[] = {
    {Py_tp_doc, "Decoder(config, *, device='cpu', threads=None, isa=None, int8_threshold=6.0, "
                "int8_outliers='row', compute='exact')\n--\n\n"
                "A decoder of transformer blocks: weights by slot, sequences that fork, steps of a "
                "batch.\n"
                "config: the fields of csrc/decoder/config.h."},
    {Py_tp_new, decoder_new},
    {Py_tp_dealloc, decoder_dealloc},
    {Py_tp_traverse, decoder_traverse},
    {Py_tp_methods, decoder_methods},
    {0, NULL},
};

static PyType_Spec decoder_spec = {
    .name = "qllm._core.Decoder",
    .basicsize = sizeof(qllm_decoder_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = decoder_type_slots,
};

int qllm_setup_decoder(PyObject *module)
{
    qllm_state *state = qllm_state_of(module);
    qllm_error error;
    if (qllm_backend_register(&qllm_cpu_backend, &error) != QLLM_OK) {
        qllm_raise(state, &error);
        return -1;
    }
    if (qllm_setup_sequence(module) < 0 || qllm_setup_device(module) < 0 ||
        qllm_setup_device_linear(module) < 0)
        return -1;
    state->decoder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &decoder_spec, NULL);
    return state->decoder_type == NULL ? -1 : PyModule_AddType(module, state->decoder_type);
}
