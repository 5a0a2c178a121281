#include <string.h>

#include "python/arguments.h"
#include "python/array.h"
#include "python/py_decoder.h"

static const char *const known_keys[] = {
    "vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "max_positions",
    "block", "norm", "norm_eps", "activation", "gated", "fused_qkv", "qk_norm", "attention_scale",
    "position", "rotary_dim", "rope_inv_freq", "rope_scale", "rope_dynamic_factor", "rope_base",
    "rope_original_positions", "alibi_slopes", "sliding_window",
};

static int check_keys(const qllm_state *state, PyObject *dict)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
        const char *text = PyUnicode_Check(key) ? PyUnicode_AsUTF8(key) : NULL;
        int known = 0;
        for (size_t i = 0; text != NULL && i < sizeof known_keys / sizeof known_keys[0]; i++)
            known |= strcmp(text, known_keys[i]) == 0;
        if (!known) {
            PyErr_Clear();
            qllm_raise_value(state, "config: unknown key %R; the fields are those of "
                             "csrc/decoder/config.h", key);
            return -1;
        }
    }
    return 0;
}

/* A borrowed field; NULL without an exception where it is absent or None and not required. */
static PyObject *field(const qllm_state *state, PyObject *dict, const char *name, int required)
{
    PyObject *value = PyDict_GetItemString(dict, name);
    if (value == Py_None)
        value = NULL;
    if (value == NULL && required)
        qllm_raise_value(state, "config: '%s' is missing", name);
    return value;
}

static int read_int(const qllm_state *state, PyObject *dict, const char *name, int required,
                    int64_t *out)
{
    PyObject *value = field(state, dict, name, required);
    if (value == NULL)
        return PyErr_Occurred() ? -1 : 0;
    return qllm_to_int64(state, value, name, out);
}

static int read_double(const qllm_state *state, PyObject *dict, const char *name, int required,
                       double *out)
{
    PyObject *value = field(state, dict, name, required);
    if (value == NULL)
        return PyErr_Occurred() ? -1 : 0;
    return qllm_to_double(state, value, name, out);
}

static int read_float(const qllm_state *state, PyObject *dict, const char *name, int required,
                      float *out)
{
    double value = *out;
    if (read_double(state, dict, name, required, &value) < 0)
        return -1;
    *out = (float)value;
    return 0;
}

static int read_bool(const qllm_state *state, PyObject *dict, const char *name, bool *out)
{
    PyObject *value = field(state, dict, name, 0);
    if (value == NULL)
        return 0;
    if (!PyBool_Check(value)) {
        qllm_raise_value(state, "config: '%s' is %R, expected True or False", name, value);
        return -1;
    }
    *out = value == Py_True;
    return 0;
}

/* The index of a text among `choices`, which ends with NULL. */
static int read_choice(const qllm_state *state, PyObject *dict, const char *name,
                       const char *const *choices, int *out)
{
    PyObject *value = field(state, dict, name, 1);
    if (value == NULL)
        return -1;
    for (int i = 0; PyUnicode_Check(value) && choices[i] != NULL; i++)
        if (PyUnicode_CompareWithASCIIString(value, choices[i]) == 0) {
            *out = i;
            return 0;
        }
    PyObject *list = PyUnicode_FromFormat("'%s' or '%s'", choices[0], choices[1]);
    if (choices[2] != NULL)
        Py_XSETREF(list, PyUnicode_FromFormat("'%s', '%s' or '%s'", choices[0], choices[1],
                                              choices[2]));
    if (list != NULL)
        qllm_raise_value(state, "config: '%s' is %R, expected %U", name, value, list);
    Py_XDECREF(list);
    return -1;
}

/* An array of n values, kept in *owner; absent: *out stays. */
static int read_array(const qllm_state *state, PyObject *dict, const char *name, int required,
                      qllm_array_kind kind, int64_t n, PyObject **owner, const void **out)
{
    PyObject *value = field(state, dict, name, required);
    if (value == NULL)
        return PyErr_Occurred() ? -1 : 0;
    *owner = qllm_array_input(state, value, kind, 1, 1, name);
    if (*owner == NULL)
        return -1;
    if (qllm_array_size(*owner) != n) {
        qllm_raise_value(state, "config: '%s' has %lld values, expected %lld", name,
                         (long long)qllm_array_size(*owner), (long long)n);
        return -1;
    }
    *out = qllm_array_data(*owner);
    return 0;
}

static int read_sizes(const qllm_state *state, PyObject *dict, qllm_decoder_config *c)
{
    const struct { const char *name; int64_t *out; } sizes[] = {
        {"vocab", &c->vocab},       {"hidden", &c->hidden},     {"layers", &c->layers},
        {"heads", &c->heads},       {"kv_heads", &c->kv_heads}, {"head_dim", &c->head_dim},
        {"intermediate", &c->intermediate}, {"max_positions", &c->max_positions},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (read_int(state, dict, sizes[i].name, 1, sizes[i].out) < 0)
            return -1;
    return 0;
}

static int read_kinds(const qllm_state *state, PyObject *dict, qllm_decoder_config *c)
{
    static const char *const blocks[] = {"serial", "parallel", "parallel2", NULL};
    static const char *const norms[] = {"rms", "layer", NULL};
    static const char *const activations[] = {"silu", "gelu", "gelu_tanh", NULL};
    static const char *const positions[] = {"rope", "alibi", NULL};
    int block, norm, act, position;
    if (read_choice(state, dict, "block", blocks, &block) < 0 ||
        read_choice(state, dict, "norm", norms, &norm) < 0 ||
        read_choice(state, dict, "activation", activations, &act) < 0 ||
        read_choice(state, dict, "position", positions, &position) < 0)
        return -1;
    c->block = (qllm_block_kind)block;
    c->norm = (qllm_norm_kind)norm;
    c->activation = (qllm_activation)act;
    c->position = (qllm_position_kind)position;
    c->gated = true;
    return read_float(state, dict, "norm_eps", 1, &c->norm_eps) < 0 ||
                   read_float(state, dict, "attention_scale", 1, &c->attention_scale) < 0 ||
                   read_bool(state, dict, "gated", &c->gated) < 0 ||
                   read_bool(state, dict, "fused_qkv", &c->fused_qkv) < 0 ||
                   read_bool(state, dict, "qk_norm", &c->qk_norm) < 0 ? -1 : 0;
}

/* An array that belongs to the other kind of position would have no effect. */
static int refuse_field(const qllm_state *state, PyObject *dict, const char *name,
                        const char *position)
{
    if (field(state, dict, name, 0) == NULL)
        return 0;
    qllm_raise_value(state, "config: '%s' is given, but has no meaning with position '%s'; leave "
                     "it out", name, position);
    return -1;
}

static int read_positions(const qllm_state *state, PyObject *dict, qllm_parsed_config *parsed)
{
    qllm_decoder_config *c = &parsed->config;
    const void *data = NULL;
    if (c->position == QLLM_POSITION_ALIBI) {
        if (refuse_field(state, dict, "rope_inv_freq", "alibi") < 0 ||
            read_array(state, dict, "alibi_slopes", 1, QLLM_ARRAY_F32, c->heads,
                       &parsed->arrays[0], &data) < 0)
            return -1;
        c->alibi_slopes = data;
        return 0;
    }
    c->rope_scale = 1.0f;
    if (refuse_field(state, dict, "alibi_slopes", "rope") < 0 ||
        read_int(state, dict, "rotary_dim", 1, &c->rotary_dim) < 0 ||
        read_float(state, dict, "rope_scale", 0, &c->rope_scale) < 0 ||
        read_double(state, dict, "rope_dynamic_factor", 0, &c->rope_dynamic_factor) < 0)
        return -1;
    int dynamic = c->rope_dynamic_factor != 0;
    if (read_double(state, dict, "rope_base", dynamic, &c->rope_base) < 0 ||
        read_int(state, dict, "rope_original_positions", dynamic,
                 &c->rope_original_positions) < 0 ||
        read_array(state, dict, "rope_inv_freq", 1, QLLM_ARRAY_F32, c->rotary_dim / 2,
                   &parsed->arrays[0], &data) < 0)
        return -1;
    c->rope_inv_freq = data;
    return 0;
}

static int parse(const qllm_state *state, PyObject *dict, qllm_parsed_config *out)
{
    const void *window = NULL;
    if (check_keys(state, dict) < 0 || read_sizes(state, dict, &out->config) < 0 ||
        read_kinds(state, dict, &out->config) < 0 || read_positions(state, dict, out) < 0 ||
        read_array(state, dict, "sliding_window", 0, QLLM_ARRAY_I64, out->config.layers,
                   &out->arrays[1], &window) < 0)
        return -1;
    out->config.sliding_window = window;
    return 0;
}

int qllm_parse_config(const qllm_state *state, PyObject *dict, qllm_parsed_config *out)
{
    memset(out, 0, sizeof *out);
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "config: expected a dict, found %s", Py_TYPE(dict)->tp_name);
        return -1;
    }
    /* A copy, since converting a value may run code that changes the dict. */
    PyObject *copy = PyDict_Copy(dict);
    int result = copy == NULL ? -1 : parse(state, copy, out);
    Py_XDECREF(copy);
    return result;
}

void qllm_parsed_config_clear(qllm_parsed_config *parsed)
{
    for (int i = 0; i < QLLM_CONFIG_ARRAYS; i++)
        Py_CLEAR(parsed->arrays[i]);
}
