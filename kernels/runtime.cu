#include "runtime.h"

#include <inttypes.h>

#include <map>
#include <mutex>

#include "driver.h"

enum { OLDEST_MAJOR = 8 }; /* mma of bf16 and cp.async */
enum { RESERVE = 20 }; /* 1/20 of the memory stays free: for the driver, and who shares the device */

/* Who holds what: gpu_free knows only the pointer. */
struct holding {
    gpu_device *device;
    int64_t bytes;
    int memory;
};

static std::mutex holdings_mutex;

static std::map<void *, holding> &holdings()
{
    static auto *all = new std::map<void *, holding>; /* lives as long as the process */
    return *all;
}

qllm_status gpu_check(qllm_gpu_error code, const char *what, qllm_error *error)
{
    if (code == 0)
        return QLLM_OK;
    qllm_status status = gpu_driver_lacks_memory(code) ? QLLM_MEMORY : QLLM_INTERNAL;
    return qllm_fail(error, status, "%s failed on the device: %s", what, gpu_driver_text(code));
}

qllm_status gpu_device_open(int index, gpu_device *out, qllm_error *error)
{
    *out = {};
    int count = 0;
    qllm_gpu_error code = gpu_driver_count(&count);
    if (gpu_driver_is_absent(code) || (code == 0 && count == 0))
        return qllm_fail(error, QLLM_UNSUPPORTED,
                         "device \"%s\": no GPU can be used: %s; use device=\"cpu\"",
                         GPU_BACKEND_NAME, code == 0 ? "there is none" : gpu_driver_text(code));
    qllm_status status = gpu_check(code, "looking for devices", error);
    if (status != QLLM_OK)
        return status;
    if (index < 0 || index >= count)
        return qllm_fail(error, QLLM_VALUE, "device \"%s:%d\": there are %d, counted from 0; use "
                         "device=\"%s\"", GPU_BACKEND_NAME, index, count, GPU_BACKEND_NAME);
    code = gpu_driver_use(index);
    if (code == 0)
        code = gpu_driver_describe(index, out);
    if (gpu_driver_is_absent(code))
        return qllm_fail(error, QLLM_UNSUPPORTED, "device \"%s:%d\" cannot be used: %s",
                         GPU_BACKEND_NAME, index, gpu_driver_text(code));
    status = gpu_check(code, "opening the device", error);
    if (status == QLLM_OK && out->major < OLDEST_MAJOR)
        status = qllm_fail(error, QLLM_UNSUPPORTED,
                           "device \"%s:%d\" (%s) has compute capability %d.%d; the kernels need "
                           "%d.0 or later; use device=\"cpu\"",
                           GPU_BACKEND_NAME, index, out->name, out->major, out->minor,
                           OLDEST_MAJOR);
    return status;
}

qllm_status gpu_device_use(const gpu_device *device, qllm_error *error)
{
    return gpu_check(gpu_driver_use(device->index), "choosing the device", error);
}

qllm_status gpu_alloc(gpu_device *device, int64_t bytes, void **out, int memory, const char *what,
                      qllm_error *error)
{
    *out = NULL;
    if (bytes < 0)
        return qllm_fail(error, QLLM_INTERNAL, "%s: %" PRId64 " bytes of memory", what, bytes);
    int64_t usable = 0;
    qllm_gpu_error code = gpu_driver_memory(&usable);
    usable -= device->memory_bytes / RESERVE;
    bool lacks = code == 0 && bytes > usable;
    if (code == 0 && !lacks)
        code = gpu_driver_alloc(bytes > 0 ? bytes : 1, out);
    if (lacks || gpu_driver_lacks_memory(code))
        return qllm_fail(error, QLLM_MEMORY,
                         "%s: needs %" PRId64 " bytes of memory on %s, where %" PRId64 " of %" PRId64
                         " can be used; use a smaller model, batch or format", what, bytes,
                         device->name, usable > 0 ? usable : 0, device->memory_bytes);
    if (code != 0)
        return gpu_check(code, what, error);
    std::lock_guard<std::mutex> lock(holdings_mutex);
    holdings()[*out] = {device, bytes, memory};
    device->held[memory] += bytes;
    return QLLM_OK;
}

void gpu_free(void *memory)
{
    if (memory == NULL)
        return;
    {
        std::lock_guard<std::mutex> lock(holdings_mutex);
        auto found = holdings().find(memory);
        if (found == holdings().end())
            return;
        found->second.device->held[found->second.memory] -= found->second.bytes;
        holdings().erase(found);
    }
    gpu_driver_free(memory);
}

qllm_status gpu_alloc_host(int64_t bytes, void **out, const char *what, qllm_error *error)
{
    *out = NULL;
    if (bytes < 0)
        return qllm_fail(error, QLLM_INTERNAL, "%s: %" PRId64 " bytes of memory", what, bytes);
    qllm_gpu_error code = gpu_driver_alloc_host(bytes > 0 ? bytes : 1, out);
    if (gpu_driver_lacks_memory(code))
        return qllm_fail(error, QLLM_MEMORY,
                         "%s: could not allocate %" PRId64 " bytes that a device can read; use a "
                         "smaller model, batch or format", what, bytes);
    return gpu_check(code, what, error);
}

qllm_status gpu_stream_create(gpu_stream *out, qllm_error *error)
{
    *out = NULL;
    return gpu_check(gpu_driver_stream(out), "creating a stream", error);
}
