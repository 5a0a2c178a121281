#include "cpu/encode_lanes_avx2.h"

#include "cpu/encode_body.h"

const qllm_encode_ops qllm_encode_ops_avx2 = ENCODE_OPS;
