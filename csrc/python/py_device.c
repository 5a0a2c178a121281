#include "python/state.h"

int qllm_setup_device(PyObject *module)
{
    (void)module;
    return 0;
}
