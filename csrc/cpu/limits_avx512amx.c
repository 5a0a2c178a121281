#include <stddef.h>

#include "cpu/limits_tables.h"
#include "cpu/squares.h"

/* Sums of products of ones, in four squares; four products of bytes are one of int16. */
static int64_t multiply_squares(qllm_unit unit, int64_t turns)
{
    _Alignas(64) uint8_t ones[SQUARE];
    _Alignas(64) int32_t sums[SQUARE_LINES][16];
    int64_t all = 0;
    for (int i = 0; i < SQUARE; i++)
        ones[i] = 1;
    squares_open(SQUARE_LINES, 64);
    SQUARE_LOAD(4, ones, 64);
    SQUARE_LOAD(6, ones, 64);
    SQUARE_ZERO(0);
    SQUARE_ZERO(1);
    SQUARE_ZERO(2);
    SQUARE_ZERO(3);
    for (int64_t turn = 0; turn < turns; turn++) {
        SQUARE_DOT(ss, 0, 6, 4);
        SQUARE_DOT(ss, 1, 6, 4);
        SQUARE_DOT(ss, 2, 6, 4);
        SQUARE_DOT(ss, 3, 6, 4);
    }
    for (int square = 0; square < 4; square++) {
        switch (square) {
        case 0: SQUARE_STORE(0, sums); break;
        case 1: SQUARE_STORE(1, sums); break;
        case 2: SQUARE_STORE(2, sums); break;
        default: SQUARE_STORE(3, sums); break;
        }
        for (int i = 0; i < SQUARE_LINES * 16; i++)
            all += sums[i / 16][i % 16];
    }
    squares_close();
    return unit == QLLM_UNIT_INT16 ? all / 4 : all;
}

static int64_t multiply(qllm_unit unit, int64_t turns)
{
    if (unit == QLLM_UNIT_INT16 || unit == QLLM_UNIT_INT8)
        return multiply_squares(unit, turns);
    return qllm_multiply_avx512(unit, turns);
}

const qllm_limits qllm_limits_avx512amx = {
    .name = "avx512amx",
    .read = qllm_read_avx512,
    .multiply = multiply,
    .instruction = {[QLLM_UNIT_F32] = "vfmadd231ps zmm", [QLLM_UNIT_INT16] = "4 tdpbssd",
                    [QLLM_UNIT_INT8] = "tdpbssd", [QLLM_UNIT_BF16] = "vdpbf16ps zmm"},
};
