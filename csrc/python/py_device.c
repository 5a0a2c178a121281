/* Devices by name: "cpu", "cuda", or "cuda:1" for the second GPU.  The processor is compiled in;
 * others are plugins, shared libraries with the one function of core/backend.h, opened when
 * somebody asks for them.  A plugin that was opened stays, as its table must; one that cannot be
 * used is closed again, and may be tried once more. */
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

#include "python/py_decoder.h"

/* The plugin of a name, a file beside this extension; NULL: there is none of that name. */
static const char *plugin_of(const char *name)
{
    return strcmp(name, "cuda") == 0 ? "_cuda.so" : NULL;
}

/* The table that an open plugin gives, registered. */
static qllm_status register_plugin(void *library, const char *who, const char *path,
                                   const qllm_backend **out, qllm_error *error)
{
    qllm_device_table_function table = NULL;
    *(void **)&table = dlsym(library, QLLM_DEVICE_TABLE);
    if (table == NULL)
        return qllm_fail(error, QLLM_UNSUPPORTED, "%s: %s has no function " QLLM_DEVICE_TABLE
                         ", so it holds no kernels of qllm", who, path);
    *out = table(error);
    return *out == NULL ? error->status : qllm_backend_register(*out, error);
}

/* `who` begins the sentences: "device 'cuda'". */
static qllm_status load_plugin(const char *who, const char *path, const qllm_backend **out,
                               qllm_error *error)
{
    *out = NULL;
    if (access(path, F_OK) != 0)
        return qllm_fail(error, QLLM_UNSUPPORTED, "%s: this installation has no kernels for it, "
                         "there is no %s; build qllm where nvcc is found, or use device='cpu'",
                         who, path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return qllm_fail(error, QLLM_UNSUPPORTED, "%s: its kernels cannot be opened: %s; build "
                         "qllm anew, or use device='cpu'", who, dlerror());
    qllm_status status = register_plugin(library, who, path, out, error);
    if (status != QLLM_OK)
        dlclose(library);
    return status;
}

/* Loads a plugin without the GIL: opening a driver may take seconds. */
static int load(const qllm_state *state, const char *who, const char *path,
                const qllm_backend **out)
{
    qllm_error error;
    qllm_status status;
    Py_BEGIN_ALLOW_THREADS
    status = load_plugin(who, path, out, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        qllm_raise(state, &error);
    return status == QLLM_OK ? 0 : -1;
}

/* The path of a file beside this extension, as bytes of the file system; NULL with an exception. */
static PyObject *path_beside(PyObject *module, const char *file)
{
    PyObject *here = PyModule_GetFilenameObject(module), *path = NULL, *bytes = NULL;
    if (here == NULL)
        return NULL;
    Py_ssize_t length = PyUnicode_GetLength(here);
    Py_ssize_t slash = PyUnicode_FindChar(here, '/', 0, length, -1);
    PyObject *folder = slash == -2 ? NULL : PyUnicode_Substring(here, 0, slash + 1);
    if (folder != NULL)
        path = PyUnicode_FromFormat("%U%s", folder, file);
    if (path != NULL)
        bytes = PyUnicode_EncodeFSDefault(path);
    Py_XDECREF(path);
    Py_XDECREF(folder);
    Py_DECREF(here);
    return bytes;
}

static int find_backend(PyObject *module, const char *name, const qllm_backend **out)
{
    const qllm_state *state = qllm_state_of(module);
    qllm_error error;
    if (qllm_backend_find(name, out, &error) == QLLM_OK)
        return 0;
    if (plugin_of(name) == NULL) {
        qllm_raise(state, &error);
        return -1;
    }
    char who[64];
    qllm_format_text(who, sizeof who, "device '%s'", name);
    PyObject *path = path_beside(module, plugin_of(name));
    int result = path == NULL ? -1 : load(state, who, PyBytes_AS_STRING(path), out);
    Py_XDECREF(path);
    return result;
}

/* The number behind the colon of a device's name; -1: there is none such. */
static int number_of(const char *digits)
{
    int number = 0;
    if (digits[0] == '\0')
        return -1;
    for (; *digits != '\0'; digits++) {
        if (*digits < '0' || *digits > '9' || number > 9999)
            return -1;
        number = 10 * number + (*digits - '0');
    }
    return number;
}

static int find_device(PyObject *module, const char *name, const qllm_backend **out, int *index)
{
    char kind[32];
    const char *colon = strchr(name, ':');
    *index = 0;
    if (colon == NULL || colon - name >= (ptrdiff_t)sizeof kind)
        return find_backend(module, name, out);
    qllm_format_text(kind, sizeof kind, "%.*s", (int)(colon - name), name);
    if (find_backend(module, kind, out) < 0)
        return -1;
    *index = number_of(colon + 1);
    if ((*out)->device != NULL && *index >= 0)
        return 0;
    const char *text = (*out)->device == NULL
        ? "device '%s': a processor has no number; use device='%s'"
        : "device '%s': expected the number of a GPU behind the colon, as in '%s:0'";
    qllm_raise_value(qllm_state_of(module), text, name, kind);
    return -1;
}

int qllm_find_device(PyTypeObject *type, const char *name, const qllm_backend **out, int *index)
{
    return find_device(PyType_GetModule(type), name, out, index);
}

static PyObject *py_load_device(PyObject *module, PyObject *argument)
{
    PyObject *path;
    const qllm_backend *backend;
    if (!PyUnicode_FSConverter(argument, &path))
        return NULL;
    int failed = load(qllm_state_of(module), "this device", PyBytes_AS_STRING(path), &backend) < 0;
    Py_DECREF(path);
    return failed ? NULL : PyUnicode_FromString(backend->name);
}

static PyObject *py_device_info(PyObject *module, PyObject *argument)
{
    const char *name = PyUnicode_Check(argument) ? PyUnicode_AsUTF8(argument) : NULL;
    const qllm_backend *backend;
    int index;
    qllm_device_facts facts;
    qllm_error error;
    qllm_status status;
    if (name == NULL) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "device: expected a str, found %s",
                         Py_TYPE(argument)->tp_name);
        return NULL;
    }
    if (find_device(module, name, &backend, &index) < 0)
        return NULL;
    if (backend->device == NULL)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    status = backend->device(index, &facts, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(qllm_state_of(module), &error);
    return Py_BuildValue("{s:s,s:s,s:s,s:L,s:L}", "name", facts.name, "variant", facts.variant,
                         "driver", facts.driver, "memory", (long long)facts.memory_bytes, "free",
                         (long long)facts.free_bytes);
}

static PyObject *py_device_limits(PyObject *module, PyObject *args)
{
    const char *name;
    long long nbytes;
    int index;
    const qllm_backend *backend;
    qllm_device_limits limits;
    qllm_error error;
    qllm_status status;
    if (!PyArg_ParseTuple(args, "sL:device_limits", &name, &nbytes) ||
        find_device(module, name, &backend, &index) < 0)
        return NULL;
    if (backend->limits == NULL)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    status = backend->limits(index, nbytes, &limits, &error);
    Py_END_ALLOW_THREADS
    if (status != QLLM_OK)
        return qllm_raise(qllm_state_of(module), &error);
    return Py_BuildValue("{s:d,s:d,s:d,s:d}", "read_bytes_per_second",
                         limits.read_bytes_per_second, "copy_bytes_per_second",
                         limits.copy_bytes_per_second, "edge_seconds", limits.edge_seconds,
                         "dependent_edge_seconds", limits.dependent_edge_seconds);
}

static PyMethodDef functions[] = {
    {"device_info", py_device_info, METH_O,
     "device_info($module, device, /)\n--\n\n"
     "A device that is not the processor (\"cuda\", or \"cuda:1\"): name, variant (of its "
     "kernels), driver, memory and\nfree (bytes); None for \"cpu\". Opens it, and raises "
     "QllmUnsupportedError where it cannot be used."},
    {"device_limits", py_device_limits, METH_VARARGS,
     "device_limits($module, device, nbytes, /)\n--\n\n"
     "What a device that is not the processor can do at best, measured on twice nbytes of its "
     "memory:\nread_bytes_per_second, copy_bytes_per_second (reads and writes added), edge_seconds "
     "and\ndependent_edge_seconds (from one kernel of a graph to the next). None for \"cpu\"."},
    {"_load_device", py_load_device, METH_O,
     "_load_device($module, path, /)\n--\n\n"
     "Opens the plugin of a device; returns the name under which it is there from then on."},
    {NULL, NULL, 0, NULL},
};

int qllm_setup_device(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
