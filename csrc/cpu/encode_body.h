/* The functions of encode.h, written once on top of sixteen lanes.  Included by encode_<set>.c
 * after its encode_lanes_<set>.h. */
#ifndef QLLM_CPU_ENCODE_BODY_H
#define QLLM_CPU_ENCODE_BODY_H

#include <math.h>
#include <string.h>

#include "core/quant.h"
#include "cpu/encode.h"

enum { ENCODE_PAIRS = 32, ENCODE_INFINITY = 0x7f800000 }; /* values in one pair of vectors */

QLLM_INLINE lanes load_16(const uint8_t *at, qllm_dtype dtype)
{
    switch (dtype) {
    case QLLM_BF16: return lanes_load_bf16(at);
    case QLLM_F16: return lanes_load_f16(at);
    default: return ilanes_as_float(ilanes_load(at)); /* of any alignment */
    }
}

/* The even and the odd ones of 32 values. */
QLLM_INLINE void load_pairs(const uint8_t *at, qllm_dtype dtype, lanes *even, lanes *odd)
{
    if (dtype == QLLM_BF16) {
        ilanes line = ilanes_load(at);
        *even = lanes_bf16_low(line);
        *odd = lanes_bf16_high(line);
    } else {
        int64_t half = dtype == QLLM_F16 ? 32 : 64;
        lanes_deinterleave(load_16(at, dtype), load_16(at + half, dtype), even, odd);
    }
}

QLLM_INLINE int64_t size_of(qllm_dtype dtype)
{
    return dtype == QLLM_F32 ? 4 : 2;
}

/* The largest magnitude of n values, a multiple of 32, as bits of a float32: NaN counts as larger
 * than infinity.  Bits of 16-bit floats are in the order of their magnitudes too. */
QLLM_INLINE uint32_t largest_bits(const uint8_t *at, qllm_dtype dtype, int64_t n)
{
    ilanes largest = ilanes_set1(0), halves = ilanes_set1(0x7fff7fff);
    if (dtype == QLLM_F32) {
        for (int64_t i = 0; i < n; i += 16)
            largest = ilanes_max(largest, ilanes_and(ilanes_load(at + 4 * i),
                                                     ilanes_set1(0x7fffffff)));
        return (uint32_t)ilanes_max_all(largest);
    }
    for (int64_t i = 0; i < n; i += ENCODE_PAIRS)
        largest = ilanes_max_halves(largest, ilanes_and(ilanes_load(at + 2 * i), halves));
    uint32_t bits = ilanes_max_all_halves(largest);
    return dtype == QLLM_BF16 ? bits << 16
                              : qllm_bits_from_float(qllm_f16_to_float((uint16_t)bits));
}

/* 4 bits --------------------------------------------------------------------------------------- */

QLLM_INLINE bool encode_blocks(const qllm_code_table *table, bool is_fp4, qllm_dtype dtype,
                               const uint8_t *at, int64_t blocks, int64_t blocksize,
                               uint8_t *bytes, float *absmax)
{
    const float smallest = 1e-38f; /* as quant_4bit.c */
    lanes_coder coder = lanes_coder_load(table);
    bool finite = true;
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t bits = largest_bits(at, dtype, blocksize);
        float largest = qllm_float_from_bits(bits);
        absmax[b] = largest;
        if (bits >= ENCODE_INFINITY) {
            absmax[b] = NAN;
            finite = false;
            memset(bytes, table->zero, (size_t)(blocksize / 2));
        } else {
            lanes reciprocal = lanes_set1(1.0f / (largest < smallest ? smallest : largest)), x, y;
            for (int64_t i = 0; i < blocksize; i += ENCODE_PAIRS) {
                load_pairs(at + i * size_of(dtype), dtype, &x, &y);
                x = lanes_mul(x, reciprocal);
                y = lanes_mul(y, reciprocal);
                ilanes_store_low_bytes(bytes + i / 2, lanes_code_pairs(coder, is_fp4, x, y));
            }
        }
        at += blocksize * size_of(dtype);
        bytes += blocksize / 2;
    }
    return finite;
}

#define ENCODE_INSTANCE(name, is_fp4, dtype)                                                      \
    static bool name(const qllm_code_table *table, const void *source, int64_t blocks,            \
                     int64_t blocksize, uint8_t *bytes, float *absmax)                            \
    {                                                                                             \
        if (blocksize == QLLM_BLOCKSIZE_DEFAULT)                                                  \
            return encode_blocks(table, is_fp4, dtype, source, blocks, QLLM_BLOCKSIZE_DEFAULT,    \
                                 bytes, absmax);                                                  \
        return encode_blocks(table, is_fp4, dtype, source, blocks, blocksize, bytes, absmax);     \
    }

ENCODE_INSTANCE(encode_nf4_f32, false, QLLM_F32)
ENCODE_INSTANCE(encode_nf4_f16, false, QLLM_F16)
ENCODE_INSTANCE(encode_nf4_bf16, false, QLLM_BF16)
ENCODE_INSTANCE(encode_fp4_f32, true, QLLM_F32)
ENCODE_INSTANCE(encode_fp4_f16, true, QLLM_F16)
ENCODE_INSTANCE(encode_fp4_bf16, true, QLLM_BF16)

static bool blocks(const qllm_code_table *table, const void *source, qllm_dtype dtype,
                   int64_t n, int64_t blocksize, uint8_t *bytes, float *absmax)
{
    static bool (*const instances[2][3])(const qllm_code_table *, const void *, int64_t, int64_t,
                                         uint8_t *, float *) = {
        {[QLLM_F32] = encode_nf4_f32, [QLLM_F16] = encode_nf4_f16, [QLLM_BF16] = encode_nf4_bf16},
        {[QLLM_F32] = encode_fp4_f32, [QLLM_F16] = encode_fp4_f16, [QLLM_BF16] = encode_fp4_bf16},
    };
    return instances[table->is_fp4][dtype](table, source, n, blocksize, bytes, absmax);
}

static void decode_blocks(const float code[16], const uint8_t *bytes, const float *absmax,
                          int64_t blocks, int64_t blocksize, float *out)
{
    value_table table = value_table_load(code);
    for (int64_t b = 0; b < blocks; b++) {
        lanes scale = lanes_set1(absmax[b]);
        for (int64_t i = 0; i < blocksize; i += 16, bytes += 8, out += 16)
            lanes_store(out, lanes_mul(lanes_values(table, bytes), scale));
    }
}

/* n < 16 values, and `fill` behind. */
QLLM_INLINE lanes load_filled(const float *p, int64_t n, float fill)
{
    float values[16];
    lanes_store(values, lanes_set1(fill));
    memcpy(values, p, (size_t)n * sizeof *p);
    return lanes_load(values);
}

static void nested_codes(const qllm_nested_table *table, const float *absmax, int64_t n,
                         float offset, float largest, uint8_t *codes)
{
    const ilanes lowest = ilanes_set1(QLLM_NESTED_LOWEST), all = ilanes_set1(0x7fffffff);
    const ilanes bins = ilanes_set1(QLLM_NESTED_BINS);
    for (int64_t i = 0; i < n; i += 16) {
        int64_t width = n - i < 16 ? n - i : 16;
        /* what fills the last lanes must lie within the table too */
        lanes x = width == 16 ? lanes_load(absmax + i) : load_filled(absmax + i, width, offset);
        x = lanes_div(lanes_sub(x, lanes_set1(offset)), lanes_set1(largest));
        ilanes bits = lanes_bits(x), magnitude = ilanes_max(ilanes_and(bits, all), lowest);
        ilanes bin = ilanes_shift_right(ilanes_sub(magnitude, lowest), QLLM_NESTED_SHIFT);
        bin = ilanes_add(bin, ilanes_and(ilanes_negative(bits), bins));
        ilanes code = ilanes_add(ilanes_from_float(lanes_gather(table->base, bin)),
                                 lanes_exceeds(x, lanes_gather(table->threshold, bin)));
        uint8_t out[16];
        ilanes_store_low_bytes(width == 16 ? codes + i : out, code);
        if (width < 16)
            memcpy(codes + i, out, (size_t)width);
    }
}

/* int8 ----------------------------------------------------------------------------------------- */

/* The rest of a row as 32 values, zeros behind; `rest` has room for them. */
static const uint8_t *padded_rest(const uint8_t *at, qllm_dtype dtype, int64_t n, uint8_t *rest)
{
    memset(rest, 0, ENCODE_PAIRS * 4);
    memcpy(rest, at, (size_t)(n * size_of(dtype)));
    return rest;
}

static uint32_t largest_bits_of_row(const uint8_t *at, qllm_dtype dtype, int64_t n)
{
    uint8_t rest[ENCODE_PAIRS * 4];
    int64_t whole = n / ENCODE_PAIRS * ENCODE_PAIRS;
    uint32_t bits = dtype == QLLM_BF16  ? largest_bits(at, QLLM_BF16, whole)
                    : dtype == QLLM_F16 ? largest_bits(at, QLLM_F16, whole)
                                        : largest_bits(at, QLLM_F32, whole);
    if (whole == n)
        return bits;
    padded_rest(at + whole * size_of(dtype), dtype, n - whole, rest);
    uint32_t more = largest_bits(rest, dtype, ENCODE_PAIRS);
    return more > bits ? more : bits;
}

/* As quant_int8.c: rounded to float16, then to a whole number in units of scale. */
QLLM_INLINE void encode_as_half(const uint8_t *at, qllm_dtype dtype, int64_t n, float scale,
                                int8_t *codes)
{
    lanes unit = lanes_set1(scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        lanes x = load_16(at + i * size_of(dtype), dtype);
        lanes_store_int8(codes + i, lanes_mul(dtype == QLLM_F16 ? x : lanes_round_f16(x), unit));
    }
    if (i < n) {
        uint8_t rest[ENCODE_PAIRS * 4];
        int8_t last[16];
        padded_rest(at + i * size_of(dtype), dtype, n - i, rest);
        lanes_store_int8(last, lanes_mul(lanes_round_f16(load_16(rest, dtype)), unit));
        memcpy(codes + i, last, (size_t)(n - i));
    }
}

static bool int8_row(const void *source, qllm_dtype dtype, int64_t cols, int8_t *codes,
                     float *absmax)
{
    uint32_t bits = largest_bits_of_row(source, dtype, cols);
    float largest = qllm_float_from_bits(bits);
    float half = qllm_f16_to_float(qllm_float_to_f16(largest));
    if (bits >= ENCODE_INFINITY || !isfinite(half) || half == 0.0f) { /* seldom: the reference */
        qllm_tensor row = {source, cols * size_of(dtype), dtype, 1, cols};
        qllm_qweight out = {.format = QLLM_FORMAT_INT8, .rows = 1, .cols = cols,
                            .data = (uint8_t *)codes, .data_bytes = cols, .absmax = absmax};
        memset(codes, 0, (size_t)cols);
        qllm_quantize_int8(&row, &out);
        return bits < ENCODE_INFINITY;
    }
    *absmax = half;
    float scale = 1.0f / half * 127.0f;
    switch (dtype) {
    case QLLM_BF16: encode_as_half(source, QLLM_BF16, cols, scale, codes); break;
    case QLLM_F16: encode_as_half(source, QLLM_F16, cols, scale, codes); break;
    default: encode_as_half(source, QLLM_F32, cols, scale, codes); break;
    }
    return true;
}

/* float formats -------------------------------------------------------------------------------- */

static bool all_finite(const void *source, qllm_dtype dtype, int64_t n)
{
    return largest_bits_of_row(source, dtype, n) < ENCODE_INFINITY;
}

QLLM_INLINE int64_t convert(const uint8_t *at, qllm_dtype dtype, int64_t n, float *out)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        lanes_store(out + i, load_16(at + i * size_of(dtype), dtype));
    return i;
}

static void to_float(const void *source, qllm_dtype dtype, int64_t n, float *out)
{
    int64_t done = dtype == QLLM_BF16  ? convert(source, QLLM_BF16, n, out)
                   : dtype == QLLM_F16 ? convert(source, QLLM_F16, n, out)
                                       : 0;
    qllm_to_float((const uint8_t *)source + done * size_of(dtype), dtype, n - done, out + done);
}

/* Here so that the compiler makes vector code of the set's own of these loops. */
static void from_float(const float *source, qllm_dtype dtype, int64_t n, void *out)
{
    uint8_t *at = out;
    if (n > 0 && dtype == QLLM_F32)
        memcpy(out, source, (size_t)n * sizeof *source);
    for (int64_t i = 0; dtype == QLLM_BF16 && i < n; i++) {
        uint16_t h = qllm_float_to_bf16(source[i]);
        memcpy(at + 2 * i, &h, sizeof h);
    }
    for (int64_t i = 0; dtype == QLLM_F16 && i < n; i++) {
        uint16_t h = qllm_float_to_f16(source[i]);
        memcpy(at + 2 * i, &h, sizeof h);
    }
}

/* tiles ---------------------------------------------------------------------------------------- */

QLLM_INLINE int64_t bytes_left(int64_t row_bytes, int64_t at)
{
    int64_t left = row_bytes - at;
    return left >= 64 ? 64 : left > 0 ? left : 0;
}

/* 16 dwords of each row from byte `at` on, as 16 lines. */
QLLM_INLINE void load_square(const uint8_t *rows, int64_t stride, int64_t row_bytes, int n_rows,
                             int64_t at, ilanes square[16])
{
    int64_t left = bytes_left(row_bytes, at);
    if (n_rows == 16 && left == 64) {
        QLLM_UNROLL
        for (int r = 0; r < 16; r++)
            square[r] = ilanes_load(rows + r * stride + at);
    } else {
        for (int r = 0; r < 16; r++)
            square[r] = r < n_rows && left > 0
                            ? ilanes_load_bytes(rows + r * stride + at, left)
                            : ilanes_set1(0);
    }
    ilanes_transpose(square);
}

/* Where line `i` stands, line by line. */
typedef struct line_walk {
    int64_t in_run;
    uint8_t *at;
} line_walk;

QLLM_INLINE void next_line(line_walk *walk, const qllm_lines *lines)
{
    walk->at += 64;
    if (++walk->in_run == lines->run) {
        walk->in_run = 0;
        walk->at += lines->run_bytes - lines->run * 64;
    }
}

static void interleave(const uint8_t *rows, int64_t stride, int64_t row_bytes, int n_rows,
                       qllm_lines lines, uint8_t *tile)
{
    line_walk walk = {0, tile};
    for (int64_t first = 0; first < lines.count; first += 16) {
        ilanes square[16];
        load_square(rows, stride, row_bytes, n_rows, first * 4, square);
        int64_t n = lines.count - first < 16 ? lines.count - first : 16;
        for (int64_t i = 0; i < n; i++) {
            ilanes_store(walk.at, square[i]);
            next_line(&walk, &lines);
        }
    }
}

QLLM_INLINE void store_square(ilanes square[16], uint8_t *rows, int64_t stride, int64_t row_bytes,
                              int n_rows, int64_t at)
{
    int64_t left = bytes_left(row_bytes, at);
    ilanes_transpose(square);
    for (int r = 0; r < n_rows && left > 0; r++)
        ilanes_store_bytes(rows + r * stride + at, square[r], left);
}

static void deinterleave(const uint8_t *tile, qllm_lines lines, uint8_t *rows, int64_t stride,
                         int64_t row_bytes, int n_rows)
{
    line_walk walk = {0, (uint8_t *)tile};
    for (int64_t first = 0; first < lines.count; first += 16) {
        ilanes square[16];
        for (int64_t i = 0; i < 16; i++) {
            bool there = first + i < lines.count;
            square[i] = there ? ilanes_load(walk.at) : ilanes_set1(0);
            if (there)
                next_line(&walk, &lines);
        }
        store_square(square, rows, stride, row_bytes, n_rows, first * 4);
    }
}

static void interleave_halves(const uint8_t *rows, int64_t stride, int64_t row_bytes, int n_rows,
                              int64_t lines, uint8_t *tile)
{
    for (int64_t first = 0; first < lines; first += 16) {
        ilanes square[16];
        load_square(rows, stride, row_bytes, n_rows, first * 4, square);
        for (int64_t i = 0; i < 16 && first + i < lines; i++)
            ilanes_store(tile + (first + i) * 64, ilanes_split_halves(square[i]));
    }
}

static void deinterleave_halves(const uint8_t *tile, int64_t lines, uint8_t *rows, int64_t stride,
                                int64_t row_bytes, int n_rows)
{
    for (int64_t first = 0; first < lines; first += 16) {
        ilanes square[16];
        for (int64_t i = 0; i < 16; i++)
            square[i] = first + i < lines
                            ? ilanes_join_halves(ilanes_load(tile + (first + i) * 64))
                            : ilanes_set1(0);
        store_square(square, rows, stride, row_bytes, n_rows, first * 4);
    }
}

/* errors --------------------------------------------------------------------------------------- */

static double fold(double sums[16])
{
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++)
            sums[j] += sums[j + step];
    return sums[0];
}

static void row_error(const float *x, const float *y, int64_t n, qllm_error_sums *out)
{
    double absolute[16] = {0.0}, squared[16] = {0.0}, signal[16] = {0.0}, largest[16] = {0.0};
    for (int64_t first = 0; first < n; first += 16) {
        int64_t width = n - first < 16 ? n - first : 16;
        float from[16] = {0.0f}, to[16] = {0.0f};
        memcpy(from, x + first, (size_t)width * sizeof *x);
        memcpy(to, y + first, (size_t)width * sizeof *y);
        for (int j = 0; j < 16; j++) {
            double value = from[j], difference = fabs(value - (double)to[j]);
            absolute[j] += difference;
            squared[j] += difference * difference;
            signal[j] += value * value;
            largest[j] = difference > largest[j] ? difference : largest[j];
        }
    }
    out->largest = 0.0;
    for (int j = 0; j < 16; j++)
        out->largest = largest[j] > out->largest ? largest[j] : out->largest;
    out->absolute = fold(absolute);
    out->squared = fold(squared);
    out->signal = fold(signal);
}

#define ENCODE_OPS                                                                                \
    {                                                                                             \
        .blocks = blocks, .decode_blocks = decode_blocks, .int8_row = int8_row,                   \
        .nested_codes = nested_codes,                                                             \
        .all_finite = all_finite, .to_float = to_float, .from_float = from_float,                 \
        .interleave = interleave, .deinterleave = deinterleave,                                   \
        .interleave_halves = interleave_halves, .deinterleave_halves = deinterleave_halves,       \
        .row_error = row_error,                                                                   \
    }

#endif
