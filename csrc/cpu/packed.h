/* A weight in the CPU's own layout: tiles of 16 output rows, interleaved so that one vector holds
 * the same columns of 16 rows.  Private and reversible: qllm_unpack gives the standard bytes back.
 * Several instruction sets read the same layout. */
#ifndef QLLM_CPU_PACKED_H
#define QLLM_CPU_PACKED_H

#include "core/qweight.h"

enum { QLLM_TILE_ROWS = 16 };

typedef struct qllm_packed qllm_packed;

/* Packs a weight; it may be cleared afterwards.  `name` is used in error sentences. */
qllm_status qllm_pack(const qllm_qweight *weight, const char *name, qllm_packed **out,
                      qllm_error *error);
void qllm_packed_destroy(qllm_packed *packed);

/* The same weight as standard bytes, equal to those that were packed, bit for bit. */
qllm_status qllm_unpack(const qllm_packed *packed, qllm_qweight *out, qllm_error *error);

qllm_format qllm_packed_format(const qllm_packed *packed);
int64_t qllm_packed_rows(const qllm_packed *packed);
int64_t qllm_packed_cols(const qllm_packed *packed);
int64_t qllm_packed_nbytes(const qllm_packed *packed); /* bytes of memory held, padding included */

#endif
