#include "cpu/lanes_neon.h"

#include "cpu/dlanes_neon.h"
#include "cpu/logits.h"
#include "cpu/logits_body.h"

const qllm_logit_ops qllm_logit_ops_neon = {
    .name = LANES_ISA,
    .scan = scan,
    .weights = weights,
    .count = count,
    .mass = mass,
    .pick = pick,
    .contenders = contenders,
    .pair_sums = pair_sums,
};
