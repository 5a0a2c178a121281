/* Refusals for what is not there yet: each goes when its file comes. */
#include "decoder.h"
#include "skinny.h"

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

GPU_UNFINISHED const char *gpu_linear_name(qllm_format, int64_t)
{
    return "none";
}

GPU_UNFINISHED bool gpu_weight_tiles(qllm_format, int64_t, int64_t, int64_t)
{
    return false;
}

GPU_UNFINISHED qllm_status gpu_weight_set(gpu_device *, gpu_weight *, const qllm_qweight *, bool,
                                          int, gpu_stream, qllm_error *error)
{
    return refuse("gpu_weight_set", error);
}

GPU_UNFINISHED qllm_status gpu_weight_load(gpu_device *, gpu_weight *, const qllm_tensor *,
                                           qllm_format, int64_t, const char *, bool, int,
                                           gpu_stream, qllm_error *error)
{
    return refuse("gpu_weight_load", error);
}

GPU_UNFINISHED qllm_status gpu_weight_get(gpu_device *, const gpu_weight *, qllm_qweight *,
                                          gpu_stream, qllm_error *error)
{
    return refuse("gpu_weight_get", error);
}

GPU_UNFINISHED void gpu_weight_clear(gpu_weight *)
{
}
