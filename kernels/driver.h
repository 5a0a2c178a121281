/* What runtime.cu needs of a driver besides copies, streams and graphs, which are the driver's
 * alone.  The current device of a thread is 0 until gpu_driver_use. */
#ifndef QLLM_KERNELS_DRIVER_H
#define QLLM_KERNELS_DRIVER_H

#include "runtime.h"

qllm_gpu_error gpu_driver_count(int *count);
qllm_gpu_error gpu_driver_use(int index);
qllm_gpu_error gpu_driver_current(int *index);                  /* of the calling thread */
qllm_gpu_error gpu_driver_wait();                               /* for the current device */
qllm_gpu_error gpu_driver_describe(int index, gpu_device *out); /* all but `held` */
qllm_gpu_error gpu_driver_memory(int64_t *free_bytes);          /* of the current device */
void gpu_driver_version(char *out, int64_t capacity);           /* of the driver, as a text */
qllm_gpu_error gpu_driver_alloc(int64_t bytes, void **out);     /* bytes > 0 */
void gpu_driver_free(void *memory);
qllm_gpu_error gpu_driver_alloc_host(int64_t bytes, void **out); /* bytes > 0 */
qllm_gpu_error gpu_driver_stream(gpu_stream *out);

/* The words of an error code; valid until the thread's next call. */
const char *gpu_driver_text(qllm_gpu_error code);

/* Whether a code says that memory is missing, and that there is no driver or device to use. */
bool gpu_driver_lacks_memory(qllm_gpu_error code);
bool gpu_driver_is_absent(qllm_gpu_error code);

#endif
