/* Inside the CPU device: what the files that fill and read tiles share. */
#ifndef QLLM_CPU_PACKING_H
#define QLLM_CPU_PACKING_H

#include "cpu/packed_layout.h"

/* Fills in what follows from the format and shape of *like (a described weight): layout, sizes,
 * counts.  Fails for what is too large to address or to sum. */
qllm_status qllm_packed_measure(const qllm_qweight *like, const char *name, qllm_packed *packed,
                                qllm_error *error);

/* Memory for a weight of the format and shape of *like (a described or a full weight), with its
 * tables and offset.  Nothing else is set. */
qllm_status qllm_packed_create(const qllm_qweight *like, const char *name, qllm_packed **out,
                               qllm_error *error);

/* Up to 16 rows as standard bytes: row r at bytes + r * stride, its scales (4-bit) at absmax or,
 * for nested forms, codes + r * row_blocks. */
typedef struct qllm_tile_rows {
    int n; /* rows */
    uint8_t *bytes;
    int64_t stride;
    float *absmax;
    uint8_t *codes;
} qllm_tile_rows;

/* The rows of a tile that there are: 16, in the last tile those left over. */
int qllm_tile_row_count(const qllm_packed *packed, int64_t tile);

/* Standard bytes of one row; 4-bit rows are whole bytes in BLOCKS. */
int64_t qllm_packed_row_bytes(const qllm_packed *packed);

/* Every byte of a tile from standard rows, the row sums of int8 included.  codes NULL: a nested
 * form whose lines of absmax codes follow with qllm_tile_put_codes. */
void qllm_tile_put(qllm_packed *packed, const qllm_encode_ops *ops, int64_t tile,
                   const qllm_tile_rows *rows);
void qllm_tile_put_codes(qllm_packed *packed, int64_t tile, int n, const uint8_t *codes);

/* And back.  Not for BYTES. */
void qllm_tile_take(const qllm_packed *packed, const qllm_encode_ops *ops, int64_t tile,
                    const qllm_tile_rows *rows);

/* Row `r` of a tile as float32 (cols): of `rows`, into which the tile was taken.  For BYTES, which
 * are in no tile, rows may hold anything. */
void qllm_tile_row_values(const qllm_packed *packed, const qllm_encode_ops *ops,
                          const qllm_tile_rows *rows, int64_t tile, int64_t r, float *out);

/* Where a thread keeps the rows of a tile: their bytes, absmax and codes, and behind them `values`
 * floats. */
typedef struct qllm_tile_buffer {
    int64_t stride, absmax_at, codes_at, values_at, bytes;
} qllm_tile_buffer;

qllm_tile_buffer qllm_tile_buffer_of(const qllm_packed *packed, int64_t values);
qllm_tile_rows qllm_tile_buffer_rows(const qllm_tile_buffer *buffer, uint8_t *memory);

/* Runs `work` over the tiles, on the packer's threads when there is enough to do. */
void qllm_packer_run(const qllm_packer *packer, const qllm_packed *packed,
                     void (*work)(void *context, int64_t begin, int64_t end, int thread),
                     void *context);
int qllm_packer_threads(const qllm_packer *packer);

/* The second level of double quantization: exactly qllm_quantize_nested.  absmax and codes
 * (blocks), nested_absmax (ceil(blocks / 256)). */
qllm_status qllm_nested_by(const qllm_packer *packer, const float *absmax, int64_t blocks,
                           float *offset, float *nested_absmax, uint8_t *codes, qllm_error *error);

#endif
