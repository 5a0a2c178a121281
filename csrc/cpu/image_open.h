/* Inside the CPU device: an image as the packed weight that it holds. */
#ifndef QLLM_CPU_IMAGE_OPEN_H
#define QLLM_CPU_IMAGE_OPEN_H

#include "cpu/image.h"
#include "cpu/packed_layout.h"

/* *out views the image, owns nothing and is valid as long as the image is.  Sizes are derived and
 * compared anew, so that reading stays within the image whatever its bytes are. */
qllm_status qllm_image_open(const qllm_image *image, qllm_packed *out, qllm_error *error);

#endif
