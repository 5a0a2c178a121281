#include "core/compute.h"

#include <string.h>

static const char *const compute_names[QLLM_COMPUTE_COUNT] = {"exact", "auto", "int8"};
static const char *const tier_names[QLLM_TIER_COUNT] = {"exact", "int16", "int8", "bf16",
                                                         "bf16x2"};

static int find(const char *const *names, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    return -1;
}

const char *qllm_compute_name(qllm_compute compute)
{
    return compute_names[compute];
}

qllm_status qllm_compute_find(const char *name, qllm_compute *out, qllm_error *error)
{
    int i = find(compute_names, QLLM_COMPUTE_COUNT, name);
    if (i < 0)
        return qllm_fail(error, QLLM_UNSUPPORTED, "compute is '%.40s'; supported are exact, auto "
                         "and int8", name);
    *out = (qllm_compute)i;
    return QLLM_OK;
}

const char *qllm_tier_name(qllm_tier tier)
{
    return tier_names[tier];
}

qllm_status qllm_tier_find(const char *name, qllm_tier *out, qllm_error *error)
{
    int i = find(tier_names, QLLM_TIER_COUNT, name);
    if (i < 0)
        return qllm_fail(error, QLLM_VALUE, "tier is '%.40s'; there are exact, int16, int8, "
                         "bf16 and bf16x2", name);
    *out = (qllm_tier)i;
    return QLLM_OK;
}
