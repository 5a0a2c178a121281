#include "cpu/encode_lanes_neon.h"

#include "cpu/encode_body.h"

const qllm_encode_ops qllm_encode_ops_neon = ENCODE_OPS;
