#include "python/state.h"

int qllm_setup_quant(PyObject *module)
{
    (void)module;
    return 0;
}
