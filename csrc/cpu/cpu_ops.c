#include "cpu/cpu_ops.h"

#include "cpu/kernels.h"

const qllm_cpu_ops *qllm_cpu_ops_get(qllm_isa isa)
{
    (void)isa; /* one set is compiled so far */
    return &qllm_cpu_ops_scalar;
}
