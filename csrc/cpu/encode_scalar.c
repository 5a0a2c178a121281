#include "cpu/encode_lanes_scalar.h"

#include "cpu/encode_body.h"

const qllm_encode_ops qllm_encode_ops_scalar = ENCODE_OPS;
