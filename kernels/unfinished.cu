/* Refusals for what is not there yet: each goes when its file comes. */
#include "decoder.h"

#define GPU_UNFINISHED __attribute__((weak))

static qllm_status refuse(const char *what, qllm_error *error)
{
    return qllm_fail(error, QLLM_UNSUPPORTED, "device '%s': %s is not part of this build",
                     GPU_BACKEND_NAME, what);
}

#define REFUSED_LAYERS(name)                                                                     \
    GPU_UNFINISHED qllm_status name(qllm_decoder *, const gpu_rows *, qllm_error *error)         \
    {                                                                                            \
        return refuse(#name, error);                                                             \
    }
REFUSED_LAYERS(gpu_auto_embed)
REFUSED_LAYERS(gpu_auto_layers)

GPU_UNFINISHED qllm_status gpu_auto_head(qllm_decoder *, const gpu_rows *, int, qllm_error *error)
{
    return refuse("gpu_auto_head", error);
}

GPU_UNFINISHED int64_t gpu_auto_scratch(const qllm_decoder *, int64_t, int64_t)
{
    return 0;
}

GPU_UNFINISHED void gpu_auto_graphs_destroy(gpu_graphs *)
{
}
