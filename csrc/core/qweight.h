/* A weight matrix W (rows, cols) in one of the formats, as standard bytes: those that bitsandbytes
 * writes to checkpoints.  Device layouts are private, reversible repacks of this. docs/formats.md
 * draws the bytes. */
#ifndef QLLM_CORE_QWEIGHT_H
#define QLLM_CORE_QWEIGHT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/status.h"
#include "core/tensor.h"

typedef enum qllm_format {
    QLLM_FORMAT_F32 = 0,
    QLLM_FORMAT_F16 = 1,
    QLLM_FORMAT_BF16 = 2,
    QLLM_FORMAT_NF4 = 3,
    QLLM_FORMAT_FP4 = 4,
    QLLM_FORMAT_NF4_DQ = 5,
    QLLM_FORMAT_FP4_DQ = 6,
    QLLM_FORMAT_INT8 = 7
} qllm_format;

enum {
    QLLM_FORMAT_COUNT = 8,
    QLLM_BLOCKSIZE_MIN = 32,
    QLLM_BLOCKSIZE_MAX = 4096,
    QLLM_BLOCKSIZE_DEFAULT = 64,
    QLLM_NESTED_BLOCKSIZE = 256 /* absmax values that share one second-level absmax */
};

const char *qllm_format_name(qllm_format format); /* "nf4-dq" */
bool qllm_format_parse(const char *name, qllm_format *format);
bool qllm_format_is_4bit(qllm_format format);   /* nf4, fp4 and their -dq forms */
bool qllm_format_is_nested(qllm_format format); /* the -dq forms */
bool qllm_format_is_float(qllm_format format);  /* f32, f16, bf16 */

/* Element type of the data of a float format. */
qllm_dtype qllm_format_dtype(qllm_format format);

/* Owns every array.  n = rows * cols, blocks = ceil(n / blocksize), nested = ceil(blocks / 256).
 *
 *   field          f32 f16 bf16     nf4 fp4            nf4-dq fp4-dq        int8
 *   blocksize      0                32..4096 (2^k)     32..4096 (2^k)       0
 *   data           n elements       (n + 1) / 2 bytes  (n + 1) / 2 bytes    n int8
 *   absmax         -                blocks             -                    rows (SCB)
 *   absmax_codes   -                -                  blocks               -
 *   nested_absmax  -                -                  nested               -
 *   code           -                16 values          16 values            -
 *   nested_code    -                -                  256 values           -
 *
 * Element (r, c) of a 4-bit weight has flat index i = r * cols + c, its code is the high nibble of
 * byte i / 2 when i is even, else the low nibble, and it belongs to block i / blocksize: blocks run
 * across row ends.  Dequantized: code[c] * absmax[b] in float32, where for the nested forms
 * absmax[b] = nested_code[absmax_codes[b]] * nested_absmax[b / 256] + offset, two roundings.
 * int8: data * (absmax[r] * (1/127)), the bracket rounded to float32 first. */
typedef struct qllm_qweight {
    qllm_format format;
    int64_t rows, cols, blocksize;
    uint8_t *data;
    int64_t data_bytes;
    float *absmax;
    uint8_t *absmax_codes;
    float *nested_absmax;
    float offset;
    float code[16];
    float nested_code[256];
} qllm_qweight;

/* Checks format, sizes and blocksize and allocates zeroed arrays; tables are filled with the
 * standard ones.  `blocksize` is used by the 4-bit formats only and stored as 0 for the others.  On
 * failure *weight is empty.  `name` is used in the sentence. */
qllm_status qllm_qweight_init(qllm_qweight *weight, qllm_format format, int64_t rows, int64_t cols,
                              int64_t blocksize, const char *name, qllm_error *error);

/* The same without the arrays, which stay NULL: to compare sizes before memory is taken. */
qllm_status qllm_qweight_describe(qllm_qweight *weight, qllm_format format, int64_t rows,
                                  int64_t cols, int64_t blocksize, const char *name,
                                  qllm_error *error);

/* Frees the arrays and empties the struct. */
void qllm_qweight_clear(qllm_qweight *weight);

/* Element counts of the arrays as in the table above (0 where a format has none). */
int64_t qllm_qweight_blocks(const qllm_qweight *weight); /* of absmax or absmax_codes */
int64_t qllm_qweight_nested_blocks(const qllm_qweight *weight);

/* Bytes of data, absmax, codes and second-level values: what the format costs, tables excluded. */
int64_t qllm_qweight_nbytes(const qllm_qweight *weight);

/* The float32 absmax of every block into out (qllm_qweight_blocks), nested forms read back. */
void qllm_qweight_absmax(const qllm_qweight *weight, float *out);

/* The float32 absmax of one block of a nested form. */
float qllm_nested_absmax_at(const qllm_qweight *weight, int64_t block);

/* QLLM_VALUE unless `cols` values a row of x and `rows` a row of y are what a weight takes. */
qllm_status qllm_check_product(int64_t weight_rows, int64_t weight_cols, int64_t cols, int64_t rows,
                               qllm_error *error);

/* Checks contents that came from outside: scales finite and not negative, nested scales finite when
 * read back, tables finite, int8 codes in -127 .. 127 and all 0 where the scale is 0, float values
 * finite.  With allow_nonfinite NaN scales (what qllm_quantize writes for blocks with NaN or
 * infinity) and any float value pass. */
qllm_status qllm_qweight_check(const qllm_qweight *weight, bool allow_nonfinite, const char *name,
                               qllm_error *error);

#endif
