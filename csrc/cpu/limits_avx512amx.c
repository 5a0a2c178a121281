#include <stddef.h>

#include "cpu/limits_tables.h"
#include "cpu/squares.h"

/* The sum of 16 x 16 sums. */
static int64_t sum_of_square(qllm_unit unit, const int32_t *whole, const float *real)
{
    int64_t all = 0;
    for (int i = 0; i < SQUARE_LINES * 16; i++)
        all += unit == QLLM_UNIT_BF16 ? (int64_t)real[i] : whole[i];
    return all;
}

/* Sums of products of ones, in four squares. */
QLLM_INLINE int64_t multiply_squares(const qllm_unit unit, int64_t turns)
{
    _Alignas(64) uint16_t ones[SQUARE / 2];
    union { int32_t whole[SQUARE_LINES * 16]; float real[SQUARE_LINES * 16]; } sums;
    int64_t all = 0;
    for (int i = 0; i < SQUARE / 2; i++)
        ones[i] = unit == QLLM_UNIT_BF16 ? 0x3f80 : 0x0101;
    squares_open(SQUARE_LINES, 64);
    SQUARE_LOAD(4, ones, 64);
    SQUARE_LOAD(6, ones, 64);
    SQUARE_ZERO(0);
    SQUARE_ZERO(1);
    SQUARE_ZERO(2);
    SQUARE_ZERO(3);
    for (int64_t turn = 0; turn < turns; turn++)
        if (unit == QLLM_UNIT_BF16) {
            SQUARE_DOT_BF16(0, 6, 4);
            SQUARE_DOT_BF16(1, 6, 4);
            SQUARE_DOT_BF16(2, 6, 4);
            SQUARE_DOT_BF16(3, 6, 4);
        } else {
            SQUARE_DOT(ss, 0, 6, 4);
            SQUARE_DOT(ss, 1, 6, 4);
            SQUARE_DOT(ss, 2, 6, 4);
            SQUARE_DOT(ss, 3, 6, 4);
        }
    for (int square = 0; square < 4; square++) {
        switch (square) {
        case 0: SQUARE_STORE(0, &sums); break;
        case 1: SQUARE_STORE(1, &sums); break;
        case 2: SQUARE_STORE(2, &sums); break;
        default: SQUARE_STORE(3, &sums); break;
        }
        all += sum_of_square(unit, sums.whole, sums.real);
    }
    squares_close();
    return all;
}

static int64_t multiply(qllm_unit unit, int64_t turns)
{
    if (unit == QLLM_UNIT_INT8)
        return multiply_squares(QLLM_UNIT_INT8, turns);
    if (unit == QLLM_UNIT_BF16)
        return multiply_squares(QLLM_UNIT_BF16, turns);
    return qllm_multiply_avx512(unit, turns);
}

const qllm_limits qllm_limits_avx512amx = {
    .name = "avx512amx",
    .read = qllm_read_avx512,
    .multiply = multiply,
    .instruction = {[QLLM_UNIT_F32] = "vfmadd231ps zmm", [QLLM_UNIT_INT16] = "vpdpwssd zmm",
                    [QLLM_UNIT_INT8] = "tdpbssd", [QLLM_UNIT_BF16] = "tdpbf16ps"},
};
