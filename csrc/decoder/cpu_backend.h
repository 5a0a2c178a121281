/* The CPU's entry in the table of devices; whoever sets the program up registers it. */
#ifndef QLLM_DECODER_CPU_BACKEND_H
#define QLLM_DECODER_CPU_BACKEND_H

#include "core/backend.h"

extern const qllm_backend qllm_cpu_backend;

#endif
