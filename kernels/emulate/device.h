/* What the parts of the emulated device share. */
#ifndef QLLM_KERNELS_EMULATE_DEVICE_H
#define QLLM_KERNELS_EMULATE_DEVICE_H

#include "driver.h"

enum {
    EMULATED_OUT_OF_MEMORY = 2,
    EMULATED_FAILURE = 1000, /* emulated_message has the sentence */
    EMULATED_SHARED_BYTES = 227 << 10
};

/* Keeps the sentence for the calling thread; EMULATED_FAILURE. */
qllm_gpu_error emulated_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *emulated_message();

/* Whether an environment variable has this value now. */
bool emulated_option(const char *name, const char *value);

/* The device's memory can be touched while one of these lives: in kernels and copies.  The host
 * that follows a pointer of the device by itself meets memory without any right, as it would on a
 * GPU.  (Under AddressSanitizer it is plain heap memory, whose ends are watched instead.) */
struct emulated_memory_open {
    emulated_memory_open();
    ~emulated_memory_open();
};

/* Whether [pointer, pointer + bytes) lies in one allocation of the device, or of gpu_alloc_host. */
bool emulated_on_device(const void *pointer, int64_t bytes);
bool emulated_pinned(const void *pointer, int64_t bytes);

int64_t emulated_capacity(); /* bytes of memory in all */

/* Does what is left to do in all streams, as freeing memory does on a GPU. */
void emulated_finish_streams();

#endif
