/* What the files of functions for tests (test_hooks*.cu) share. */
#ifndef QLLM_KERNELS_TEST_HOOKS_H
#define QLLM_KERNELS_TEST_HOOKS_H

#include "runtime.h"

/* The device that tests use, opened with the first call; it stays open. */
GPU_EXPORT qllm_status gpu_test_device(gpu_device **out, qllm_error *error);

/* Waits for the default stream; the status of `code`, or of what the wait found. */
qllm_status gpu_test_finish(qllm_gpu_error code, qllm_error *error);

#endif
