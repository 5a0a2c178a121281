/* What the lanes of a warp do together, once all have come. */
#include "fibers.h"

/* Calls f(lane number) for each lane of a mask. */
template <class F>
static void for_lanes(unsigned mask, F f)
{
    for (; mask != 0; mask &= mask - 1)
        f(__builtin_ctz(mask));
}

/* A lane outside the mask has nothing to give: all ones, which is NaN as a float. */
static void shuffle(const warp *p, unsigned mask)
{
    for_lanes(mask, [&](int i) {
        int source = p->lanes[i].arrival->source & (GPU_WARP - 1);
        bool there = mask >> source & 1;
        p->lanes[i].result = there ? p->lanes[source].arrival->value : ~UINT64_C(0);
    });
}

static void ballot(const warp *p, unsigned mask)
{
    uint64_t votes = 0;
    for_lanes(mask, [&](int i) { votes |= p->lanes[i].arrival->value << i; });
    for_lanes(mask, [&](int i) { p->lanes[i].result = votes; });
}

/* The fragments of m16n8k16 and m16n8k32 (PTX ISA, "Matrix fragments for mma"): lane 4 g + t holds,
 * with n = 2 or 4 values in a register,
 *   a[0], a[2]  row g, columns n t and K / 2 + n t;     a[1], a[3]  the same of row g + 8
 *   b[0], b[1]  column g, rows n t and K / 2 + n t
 *   d[0], d[1]  row g, columns 2 t and 2 t + 1;         d[2], d[3]  the same of row g + 8 */
template <class T, class Word, int K, class Add>
static void multiply(const warp *p, Add value_of)
{
    constexpr int IN_WORD = 4 / sizeof(Word);
    T a[16][K], b[K][8], d[16][8];
    for (int i = 0; i < GPU_WARP; i++) {
        const gpu_arrival &lane = *p->lanes[i].arrival;
        int g = i / 4, t = i % 4;
        Word words[4 * IN_WORD];
        memcpy(words, lane.a, 16);
        for (int r = 0; r < 4; r++)
            for (int j = 0; j < IN_WORD; j++)
                a[g + r % 2 * 8][r / 2 * (K / 2) + t * IN_WORD + j] =
                    value_of(words[r * IN_WORD + j]);
        memcpy(words, lane.b, 8);
        for (int r = 0; r < 2; r++)
            for (int j = 0; j < IN_WORD; j++)
                b[r * (K / 2) + t * IN_WORD + j][g] = value_of(words[r * IN_WORD + j]);
        T sums[4];
        memcpy(sums, lane.d, 16);
        for (int r = 0; r < 4; r++)
            d[g + r / 2 * 8][t * 2 + r % 2] = sums[r];
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < K; k++)
            for (int column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (int i = 0; i < GPU_WARP; i++) {
        T sums[4];
        for (int r = 0; r < 4; r++)
            sums[r] = d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
        memcpy(p->lanes[i].arrival->d, sums, 16);
    }
}

/* Register m of lane 4 g + t: values 2 t and 2 t + 1 of row g of matrix m, or of its transpose. */
static void load_matrices(const warp *p, bool transposed)
{
    for (int i = 0; i < GPU_WARP; i++)
        for (int m = 0; m < 4; m++) {
            uint16_t pair[2];
            for (int j = 0; j < 2; j++) {
                int row = i / 4, column = i % 4 * 2 + j;
                const lane &source = p->lanes[m * 8 + (transposed ? column : row)];
                memcpy(&pair[j], static_cast<const char *>(source.arrival->a) +
                                     (transposed ? row : column) * 2, 2);
            }
            memcpy(static_cast<char *>(p->lanes[i].arrival->d) + m * 4, pair, 4);
        }
}

void warp_perform(const warp *p, const gpu_arrival &arrival)
{
    switch (arrival.kind) {
    case GPU_SHUFFLE: shuffle(p, arrival.mask); break;
    case GPU_BALLOT: ballot(p, arrival.mask); break;
    case GPU_MMA_BF16:
        multiply<float, uint16_t, 16>(p, [](uint16_t word) { return qllm_bf16_to_float(word); });
        break;
    case GPU_MMA_S8: /* unsigned, so that sums wrap */
        multiply<uint32_t, int8_t, 32>(
            p, [](int8_t word) { return static_cast<uint32_t>(static_cast<int32_t>(word)); });
        break;
    case GPU_LOAD_MATRICES: load_matrices(p, false); break;
    case GPU_LOAD_MATRICES_TRANSPOSED: load_matrices(p, true); break;
    default: break; /* barriers hand nothing over */
    }
}
