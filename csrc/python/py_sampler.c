#include "python/state.h"

int qllm_setup_sampler(PyObject *module)
{
    (void)module;
    return 0;
}
