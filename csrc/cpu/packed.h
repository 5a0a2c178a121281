/* A weight in the CPU's own layout: tiles of 16 output rows, interleaved so that one vector holds
 * the same columns of 16 rows.  Private and reversible: qllm_unpack gives the standard bytes back.
 * Several instruction sets read the same layout. */
#ifndef QLLM_CPU_PACKED_H
#define QLLM_CPU_PACKED_H

#include "core/quant.h"
#include "core/qweight.h"
#include "cpu/encode.h"
#include "cpu/threads.h"

enum { QLLM_TILE_ROWS = 16 };

typedef struct qllm_packed qllm_packed;

/* What packs: the functions of an instruction set, and a pool or NULL for the calling thread alone.
 * Results depend on neither. */
typedef struct qllm_packer {
    const qllm_encode_ops *ops;
    qllm_threads *threads;
} qllm_packer;

/* Packs a weight; it may be cleared afterwards.  `name` is used in error sentences. */
qllm_status qllm_pack(const qllm_packer *packer, const qllm_qweight *weight, const char *name,
                      qllm_packed **out, qllm_error *error);

/* Quantizes the matrix `source` to `format` and packs it on the way, tile by tile: what
 * qllm_quantize without allow_nonfinite and qllm_pack give, errors included, in one pass over the
 * source and without a second copy. */
qllm_status qllm_pack_source(const qllm_packer *packer, const qllm_tensor *source,
                             qllm_format format, int64_t blocksize, const char *name,
                             qllm_packed **out, qllm_error *error);
void qllm_packed_destroy(qllm_packed *packed);

/* The same weight as standard bytes, equal to those that were packed, bit for bit. */
qllm_status qllm_unpack(const qllm_packer *packer, const qllm_packed *packed, qllm_qweight *out,
                        qllm_error *error);

/* Row `row` of a float format as float32 (cols). */
void qllm_packed_row(const qllm_packed *packed, int64_t row, float *out);

/* Rows [first, first + n) of any format, exactly as qllm_dequantize, each value rounded to `dtype`:
 * out (n, cols). */
qllm_status qllm_packed_dequantize(const qllm_packer *packer, const qllm_packed *packed,
                                   int64_t first, int64_t n, qllm_dtype dtype, void *out,
                                   qllm_error *error);

/* As qllm_quantization_error, without a copy of the weight. */
qllm_status qllm_packed_error(const qllm_packer *packer, const qllm_packed *packed,
                              const qllm_tensor *source, const char *name, qllm_quant_error *out,
                              qllm_error *error);

qllm_format qllm_packed_format(const qllm_packed *packed);
int64_t qllm_packed_rows(const qllm_packed *packed);
int64_t qllm_packed_cols(const qllm_packed *packed);
int64_t qllm_packed_nbytes(const qllm_packed *packed); /* bytes of memory held, padding included */

#endif
