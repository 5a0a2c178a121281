#include "cpu/encode_lanes_avx512.h"

#include "cpu/encode_body.h"

const qllm_encode_ops qllm_encode_ops_avx512 = ENCODE_OPS;
