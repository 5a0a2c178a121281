#include "python/state.h"

int qllm_setup_decoder(PyObject *module)
{
    (void)module;
    return 0;
}
