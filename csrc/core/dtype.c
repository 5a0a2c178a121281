#include "core/dtype.h"

int64_t qllm_dtype_size(qllm_dtype dtype)
{
    return dtype == QLLM_F32 ? 4 : 2;
}

const char *qllm_dtype_name(qllm_dtype dtype)
{
    switch (dtype) {
    case QLLM_F32: return "float32";
    case QLLM_F16: return "float16";
    case QLLM_BF16: return "bfloat16";
    }
    return "";
}
