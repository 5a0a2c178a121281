/* From unquantized rows to standard bytes and tiles at the speed of memory: one table of functions
 * per instruction set.  Each gives exactly the bytes and numbers of the plain reference in core
 * (quant_4bit.c, quant_int8.c, quant_dq.c, dtype.c, quant.c). */
#ifndef QLLM_CPU_ENCODE_H
#define QLLM_CPU_ENCODE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/quant.h"
#include "cpu/features.h"

/* The thresholds of a 4-bit format (core/codebook.h) in the forms that lanes search them in.
 *
 * Bins: [-1, 1] falls into 31 bins, x into number 16 + round(QLLM_BIN_SCALE * x), which grows with
 * x.  A bin holds at most one threshold besides the few in `extra`, so that the number of
 * thresholds below x is that of the bins before (`base`), plus one where x exceeds the bin's own,
 * plus those of `extra` that it exceeds. */
enum { QLLM_BIN_COUNT = 32, QLLM_EXTRA_COUNT = 2 };
#define QLLM_BIN_SCALE 15.49f

typedef struct qllm_code_table {
    bool is_fp4;
    float thresholds[16]; /* ascending; the last is infinite */
    uint8_t codes[16];    /* number of thresholds below x -> code */
    uint8_t zero;         /* the code of 0 in both halves of a byte */
    float bin_threshold[QLLM_BIN_COUNT]; /* infinite where a bin holds none */
    int32_t base[QLLM_BIN_COUNT];
    float extra[QLLM_EXTRA_COUNT]; /* fp4: -1/384 and 1/384, which share the bin of 0 */
} qllm_code_table;

void qllm_code_table_init(qllm_code_table *table, bool is_fp4);

/* The midpoints of qllm_dynamic_map in bins of equal leading bits: the bin of x is, for the
 * magnitude m of its bits raised to at least QLLM_NESTED_LOWEST, (m - QLLM_NESTED_LOWEST) >>
 * QLLM_NESTED_SHIFT, and QLLM_NESTED_BINS more when x is negative.  The code of x in [-1, 1] is the
 * bin's base, and one more where x exceeds the bin's threshold. */
enum { QLLM_NESTED_SHIFT = 17, QLLM_NESTED_BINS = 23 * 64, QLLM_NESTED_LOWEST = 105 << 23 };

typedef struct qllm_nested_table {
    float threshold[2 * QLLM_NESTED_BINS];
    float base[2 * QLLM_NESTED_BINS]; /* integers */
} qllm_nested_table;

void qllm_nested_table_init(qllm_nested_table *table);

/* Where the lines of a tile stand: `run` consecutive ones, then the next run `run_bytes` behind the
 * start of this one. */
typedef struct qllm_lines {
    int64_t count, run, run_bytes;
} qllm_lines;

typedef struct qllm_encode_ops {
    /* Whole blocks of `dtype` at source (any alignment) -> blocks * blocksize / 2 bytes and
     * (blocks) absmax.  False when NaN or infinity is among them: their blocks get the absmax NaN
     * and codes of 0. */
    bool (*blocks)(const qllm_code_table *table, const void *source, qllm_dtype dtype,
                   int64_t blocks, int64_t blocksize, uint8_t *bytes, float *absmax);
    /* One row -> (cols) codes and its absmax.  False when it holds NaN or infinity: then the absmax
     * is NaN and the codes are 0. */
    bool (*int8_row)(const void *source, qllm_dtype dtype, int64_t cols, int8_t *codes,
                     float *absmax);
    /* Codes of absmax values: (absmax - offset) / largest, for largest > 0. */
    void (*nested_codes)(const qllm_nested_table *table, const float *absmax, int64_t n,
                         float offset, float largest, uint8_t *codes);
    /* And back: whole blocks of a 4-bit format, code[c] * absmax[b] each. */
    void (*decode_blocks)(const float code[16], const uint8_t *bytes, const float *absmax,
                          int64_t blocks, int64_t blocksize, float *out);
    bool (*all_finite)(const void *source, qllm_dtype dtype, int64_t n);
    void (*to_float)(const void *source, qllm_dtype dtype, int64_t n, float *out);
    void (*from_float)(const float *source, qllm_dtype dtype, int64_t n, void *out);

    /* Dword i of row r (r < n_rows <= 16, row r at rows + r * stride, row_bytes long) <-> dword r
     * of line i.  Into a tile, what is behind a row's end and the rows from n_rows on are zeros;
     * `lines` has at least as many lines as a row has dwords. */
    void (*interleave)(const uint8_t *rows, int64_t stride, int64_t row_bytes, int n_rows,
                       qllm_lines lines, uint8_t *tile);
    void (*deinterleave)(const uint8_t *tile, qllm_lines lines, uint8_t *rows, int64_t stride,
                         int64_t row_bytes, int n_rows);
    /* The same for elements of two bytes: element k of row r <-> element r of half line k; `lines`
     * of consecutive lines hold two half lines each. */
    void (*interleave_halves)(const uint8_t *rows, int64_t stride, int64_t row_bytes, int n_rows,
                              int64_t lines, uint8_t *tile);
    void (*deinterleave_halves)(const uint8_t *tile, int64_t lines, uint8_t *rows, int64_t stride,
                                int64_t row_bytes, int n_rows);

    /* The sums of one row, y against x, in the order of core/quant.h. */
    void (*row_error)(const float *x, const float *y, int64_t n, qllm_error_sums *out);
} qllm_encode_ops;

/* The table of a compiled and supported set (cpu/features.h).  A set without one of its own has the
 * portable table. */
const qllm_encode_ops *qllm_encode_ops_get(qllm_isa isa);

extern const qllm_encode_ops qllm_encode_ops_scalar, qllm_encode_ops_avx2, qllm_encode_ops_avx512;
extern const qllm_encode_ops qllm_encode_ops_neon, qllm_encode_ops_neondot;

#endif
