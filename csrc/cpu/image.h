/* A packed weight as one run of bytes, in memory that somebody else owns, such as a tensor of
 * another library: it is copied, moved and shared between processes as any memory is, and opened
 * anew by every call, whatever is in it.  Private to a build of the library; what is kept for later
 * is the standard bytes. */
#ifndef QLLM_CPU_IMAGE_H
#define QLLM_CPU_IMAGE_H

#include "cpu/linear.h"

enum { QLLM_IMAGE_ALIGNMENT = 64 };

typedef struct qllm_image {
    const void *data; /* QLLM_IMAGE_ALIGNMENT */
    int64_t bytes;
} qllm_image;

/* The bytes of the image of a described weight, and of one that is there. */
qllm_status qllm_image_size(const qllm_qweight *like, const char *name, int64_t *bytes,
                            qllm_error *error);
int64_t qllm_image_bytes(const qllm_packed *packed);
void qllm_image_write(const qllm_packed *packed, void *data);

/* Format, shape and blocksize, without the arrays. */
qllm_status qllm_image_describe(const qllm_image *image, qllm_qweight *out, qllm_error *error);

/* qllm_unpack, qllm_packed_error and qllm_packed_dequantize. */
qllm_status qllm_image_unpack(const qllm_packer *packer, const qllm_image *image,
                              qllm_qweight *out, qllm_error *error);
qllm_status qllm_image_error(const qllm_packer *packer, const qllm_image *image,
                             const qllm_tensor *source, const char *name, qllm_quant_error *out,
                             qllm_error *error);
qllm_status qllm_image_dequantize(const qllm_packer *packer, const qllm_image *image,
                                  int64_t first, int64_t n, qllm_dtype dtype, void *out,
                                  qllm_error *error);

/* What multiplies: the functions of an instruction set, and threads. */
typedef struct qllm_multiplier {
    const qllm_cpu_ops *ops;
    const qllm_encode_ops *encode;
    qllm_threads *threads;
} qllm_multiplier;

/* y = x W^T + bias; x (m, cols) and y (m, rows) contiguous and of one dtype, bias (rows) of
 * bias_dtype or NULL.  Sums as in core/linear_ref.h, in float32; y is rounded once. */
typedef struct qllm_image_product {
    const void *x;
    qllm_dtype dtype;
    int64_t m, cols, rows;
    const void *bias;
    qllm_dtype bias_dtype;
    void *y;
    qllm_linear_options options;
} qllm_image_product;

qllm_status qllm_image_linear(const qllm_multiplier *by, const qllm_image *image,
                              const qllm_image_product *product, qllm_error *error);

/* The same for an int8 weight and a caller that has rounded x himself: q (m, cols) int8 in units of
 * absmax (m) / 127, outliers (n_outliers) the columns that are to be added from x, ascending, in
 * every row.  x may be NULL when there are none. */
typedef struct qllm_rounded_x {
    const int8_t *q;
    const float *absmax;
    const int64_t *outliers;
    int64_t n_outliers;
} qllm_rounded_x;

qllm_status qllm_image_linear_int8(const qllm_multiplier *by, const qllm_image *image,
                                   const qllm_image_product *product, const qllm_rounded_x *rounded,
                                   qllm_error *error);

/* Which kernel runs; see qllm_cpu_ops.linear_name. */
qllm_status qllm_image_linear_name(const qllm_cpu_ops *ops, const qllm_image *image, int64_t m,
                                   qllm_compute compute, const char **name, qllm_error *error);

#endif
