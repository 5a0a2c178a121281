#include "cpu/limits_neon_body.h"

const qllm_limits qllm_limits_neon = {
    .name = "neon",
    .read = read_all,
    .multiply = multiply,
    .instruction = {[QLLM_UNIT_F32] = "fmla", [QLLM_UNIT_INT16] = "smlal",
                    [QLLM_UNIT_INT8] = "smull, sadalp"},
};
