/* Arguments of functions that take memory of other libraries by its address, as integers. */
#ifndef QLLM_PYTHON_ADDRESSES_H
#define QLLM_PYTHON_ADDRESSES_H

#include "core/dtype.h"
#include "python/state.h"

/* Integers from a vector of arguments; an error stays in Python's own place until it is
 * asked for with PyErr_Occurred. */
typedef struct qllm_reader {
    PyObject *const *next;
} qllm_reader;

static inline int64_t qllm_read_int(qllm_reader *from)
{
    return PyLong_AsLongLong(*from->next++);
}

static inline void *qllm_read_address(qllm_reader *from)
{
    return PyLong_AsVoidPtr(*from->next++);
}

static inline qllm_dtype qllm_read_dtype(qllm_reader *from)
{
    long number = PyLong_AsLong(*from->next++);
    if ((number < QLLM_F32 || number > QLLM_BF16) && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "dtype number %ld; 0 to 2 were expected", number);
    return (qllm_dtype)number;
}

static inline int qllm_wrong_count(const char *name, Py_ssize_t found, Py_ssize_t expected)
{
    if (found == expected)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, expected, found);
    return 1;
}

#endif
