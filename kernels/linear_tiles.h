/* Tiles as operands: what the kernels of few rows (skinny.cu) and of many (prefill.cu) share, so
 * that both add the same numbers in the same order.
 *
 * 4-bit codes become operands through a table in shared memory: byte -> the two bf16 values of its
 * codes, once for each lane, so that no two lanes ever meet in a bank.  An entry starts at
 * byte * 256, which makes its address one byte permutation of the codes and the lane; the other
 * half of the 64 KB is free for other things. */
#ifndef QLLM_KERNELS_LINEAR_TILES_H
#define QLLM_KERNELS_LINEAR_TILES_H

#include "linear_after.h"

namespace {

enum {
    TABLE_ROW = 256, /* bytes from an entry to the next: 128 used, 128 free */
    TABLE_BYTES = 256 * TABLE_ROW,
    LANES = 32,
    LANE_ROW = LANES * 4 /* bytes of one register of all lanes */
};

GPU_BOTH inline constexpr bool is_4bit(int form)
{
    return form == LINEAR_4BIT || form == LINEAR_NESTED;
}

/* Bytes of the values of a row of x in 64 columns. */
GPU_BOTH inline constexpr int columns_bytes(int form)
{
    return form == LINEAR_INT8 ? 64 : 128;
}

/* The tiles of one turn, as they come from memory: UK of each of RT rows of tiles, at most 4. */
template <int FORM, int RT, int UK>
struct turn {
    enum { TILES = RT * UK, SCALES = (TILES + 1) / 2 };
    uint4 data[TILES][linear_loads(FORM)];
    float2 scale[FORM == LINEAR_4BIT ? TILES : 1];
    uint32_t code[SCALES]; /* LINEAR_NESTED: of scale lane % 16 of tiles lane / 16, + 2, ... */
    float nested[SCALES];
};

/* Where the tiles of a group of RT rows of tiles are; those that are absent alias the first. */
template <int FORM, int RT>
struct group {
    const uint4 *data[RT];
    const float2 *scale[FORM == LINEAR_4BIT ? RT : 1];
    const uint8_t *code[2]; /* LINEAR_NESTED: of the two scales of this lane */
    const float *nested[2];
    int first_block[2];
    float offset[2];
};

/* Row r of tiles of the group at `unit`: which weight and tile, -1 when there is none. */
GPU_DEVICE inline void find_tile(const linear_args &a, int unit, int end, int r, int *weight,
                                 int *tile)
{
    int index = a.paired ? unit + r / 2 : unit + r, second = a.paired ? r % 2 : 0;
    *weight = 0, *tile = -1;
    if (index >= end)
        return;
    linear_unit u = linear_unit_at(a, index);
    *weight = second == 0 ? u.weight[0] : u.weight[1];
    *tile = second == 0 ? u.tile[0] : u.tile[1];
}

/* By a whole warp, of which lane r finds row r of tiles for all. */
template <int FORM, int RT, int UK>
GPU_DEVICE inline group<FORM, RT> find_group(const linear_args &a, int unit, int end)
{
    enum { LOADS = linear_loads(FORM) };
    group<FORM, RT> g;
    int lane = threadIdx.x % LANES, my_weight, my_tile;
    find_tile(a, unit, end, lane % RT, &my_weight, &my_tile);
    int place = my_tile * GPU_LINEAR_WEIGHTS + my_weight;
    int first = gpu_shfl(GPU_FULL_WARP, place, 0);
GPU_UNROLL
    for (int r = RT - 1; r >= 0; r--) { /* a lane without a scale of its own takes of the last */
        int found = r == 0 ? first : gpu_shfl(GPU_FULL_WARP, place, r);
        found = found < 0 ? first : found;
        int tile = found / GPU_LINEAR_WEIGHTS;
        const linear_matrix &w = a.weight[found % GPU_LINEAR_WEIGHTS];
        g.data[r] = w.data + (int64_t)tile * a.across * LOADS * LANES + lane;
        if (FORM == LINEAR_4BIT)
            g.scale[r] = (const float2 *)(const void *)w.absmax + (int64_t)tile * a.blocks * 8 +
                         lane / 4;
GPU_UNROLL
        for (int i = 0; FORM == LINEAR_NESTED && i < 2; i++)
            if ((lane / 16 + 2 * i) / UK == r || r == RT - 1) {
                int row = lane % 16 / 2 + lane % 2 * 8;
                g.code[i] = w.codes + (int64_t)tile * a.blocks * GPU_TILE_ROWS + lane % 16;
                g.nested[i] = w.nested;
                g.first_block[i] = (tile * GPU_TILE_ROWS + row) * a.blocks;
                g.offset[i] = w.offset;
            }
    }
    return g;
}

/* Asks for the tiles [k, k + UK) of a group, of which only those below `end` are there. */
template <int FORM, int RT, int UK>
GPU_DEVICE inline void ask(const linear_args &a, const group<FORM, RT> &g, int k, int end,
                           turn<FORM, RT, UK> *next)
{
    enum { LOADS = linear_loads(FORM) };
GPU_UNROLL
    for (int u = 0; u < UK; u++)
        if (k + u < end)
GPU_UNROLL
            for (int r = 0; r < RT; r++) {
GPU_UNROLL
                for (int l = 0; l < LOADS; l++)
                    next->data[r * UK + u][l] =
                        gpu_load_stream(g.data[r] + ((k + u) * LOADS + l) * LANES);
                if (FORM == LINEAR_4BIT)
                    next->scale[r * UK + u] = gpu_load(g.scale[r] + ((k + u) >> a.shift) * 8);
            }
    if (FORM == LINEAR_NESTED && k < end)
GPU_UNROLL
        for (int i = 0; i < turn<FORM, RT, UK>::SCALES; i++) {
            int tile = k + ((int)(threadIdx.x % LANES) / 16 + 2 * i) % UK;
            int block = (tile < end ? tile : k) >> a.shift;
            next->code[i] = gpu_load(g.code[i] + block * GPU_TILE_ROWS);
            next->nested[i] = gpu_load(g.nested[i] + ((g.first_block[i] + block) >> 8));
        }
}

/* B operands of the 64 columns at `x` (of this lane) and 8 rows: 16 bf16 or 16 int8 of one row. */
template <int FORM>
GPU_DEVICE inline void read_rows(const char *x, uint32_t *b)
{
GPU_UNROLL
    for (int i = 0; i < (FORM == LINEAR_INT8 ? 1 : 2); i++) {
        uint4 v = *(const uint4 *)(const void *)(x + 16 * i);
        b[4 * i] = v.x, b[4 * i + 1] = v.y, b[4 * i + 2] = v.z, b[4 * i + 3] = v.w;
    }
}

/* d += A B for a tile of int8 or bf16 and 8 rows. */
template <int FORM, typename SUM>
GPU_DEVICE inline void multiply_plain(const uint4 *data, const uint32_t *b, SUM *d);

template <>
GPU_DEVICE inline void multiply_plain<LINEAR_INT8, int32_t>(const uint4 *data, const uint32_t *b,
                                                            int32_t *d)
{
GPU_UNROLL
    for (int i = 0; i < 2; i++) {
        uint32_t part[4] = {data[i].x, data[i].y, data[i].z, data[i].w};
        gpu_mma_s8(d, part, b + 2 * i);
    }
}

template <>
GPU_DEVICE inline void multiply_plain<LINEAR_BF16, float>(const uint4 *data, const uint32_t *b,
                                                          float *d)
{
GPU_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t part[4] = {data[i].x, data[i].y, data[i].z, data[i].w};
        gpu_mma_bf16(d, part, b + 2 * i);
    }
}

/* The 32 codes of this lane in a tile as pairs of bf16: a[0 .. 7] of row g, a[8 .. 15] of row
 * g + 8, ascending columns. */
GPU_DEVICE inline void look_up(const char *table, const uint4 &data, uint32_t *a)
{
    const uint32_t words[4] = {data.x, data.y, data.z, data.w};
    uint32_t lane = threadIdx.x % LANES * 4;
GPU_UNROLL
    for (int j = 0; j < 16; j++) {
        uint32_t at = gpu_byte_perm(words[j / 4], lane, 0x7704u | (uint32_t)(j % 4) << 4);
        a[j] = *(const uint32_t *)(const void *)(table + at);
    }
}

/* acc += scale * (A B) for a tile of 4-bit codes, looked up, and 8 rows. */
GPU_DEVICE inline void multiply_codes(const uint32_t *a, float2 scale, const uint32_t *b,
                                      float *acc)
{
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
GPU_UNROLL
    for (int j = 0; j < 4; j++) {
        uint32_t part[4] = {a[2 * j], a[2 * j + 8], a[2 * j + 1], a[2 * j + 9]};
        gpu_mma_bf16(d, part, b + 2 * j);
    }
    acc[0] = gpu_fma(scale.x, d[0], acc[0]);
    acc[1] = gpu_fma(scale.x, d[1], acc[1]);
    acc[2] = gpu_fma(scale.y, d[2], acc[2]);
    acc[3] = gpu_fma(scale.y, d[3], acc[3]);
}

/* LINEAR_NESTED: the two scales of this lane of the turn (core/qweight.h: two roundings). */
template <int FORM, int RT, int UK>
GPU_DEVICE inline void read_scales(const turn<FORM, RT, UK> &now, const group<FORM, RT> &g,
                                   const char *nested_table, float *scales)
{
GPU_UNROLL
    for (int i = 0; i < turn<FORM, RT, UK>::SCALES; i++) {
        float code = *(const float *)(const void *)(nested_table + now.code[i] * 4);
        scales[i] = code * now.nested[i] + g.offset[i];
    }
}

/* The pair of scales of tile j of the turn for this lane. */
GPU_DEVICE inline float2 share_scales(const float *scales, int j)
{
    int from = j % 2 * 16 + (int)(threadIdx.x % LANES) / 4 * 2;
    float2 pair = {gpu_shfl(GPU_FULL_WARP, scales[j / 2], from),
                   gpu_shfl(GPU_FULL_WARP, scales[j / 2], from + 1)};
    return pair;
}

template <int FORM>
struct sum_type {
    typedef float type;
};
template <>
struct sum_type<LINEAR_INT8> {
    typedef int32_t type;
};

/* RT tiles, one below the other, as operands. */
template <int FORM, int RT>
struct operands {
    uint32_t codes[is_4bit(FORM) ? RT : 1][16];
    float2 scale[is_4bit(FORM) ? RT : 1];
    uint4 data[is_4bit(FORM) ? 1 : RT][linear_loads(FORM)];
};

/* Those of column-tile `u` of a turn. */
template <int FORM, int RT, int UK>
GPU_DEVICE inline operands<FORM, RT> open_tiles(const turn<FORM, RT, UK> &now, int u,
                                                const char *table, const float *scales)
{
    operands<FORM, RT> o;
GPU_UNROLL
    for (int r = 0; r < RT; r++)
        if constexpr (is_4bit(FORM)) {
            if constexpr (FORM == LINEAR_NESTED)
                o.scale[r] = share_scales(scales, r * UK + u);
            else
                o.scale[r] = now.scale[r * UK + u];
            look_up(table, now.data[r * UK + u][0], o.codes[r]);
        } else {
GPU_UNROLL
            for (int l = 0; l < linear_loads(FORM); l++)
                o.data[r][l] = now.data[r * UK + u][l];
        }
    return o;
}

/* Tiles times NT times 8 rows; x: this lane's values of its row of the first eight, x_step bytes
 * before those of the next eight. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline void multiply_tiles(const operands<FORM, RT> &o, const char *x, int x_step,
                                      typename sum_type<FORM>::type (*acc)[NT][4])
{
GPU_UNROLL
    for (int n = 0; n < NT; n++) {
        uint32_t b[8];
        read_rows<FORM>(x + n * x_step, b);
GPU_UNROLL
        for (int r = 0; r < RT; r++)
            if constexpr (is_4bit(FORM))
                multiply_codes(o.codes[r], o.scale[r], b, acc[r][n]);
            else
                multiply_plain<FORM>(o.data[r], b, acc[r][n]);
    }
}

/* One turn: those of the tiles [k, k + UK) of RT rows of tiles that are below `end`; x as above, at
 * column-tile k. */
template <int FORM, int RT, int UK, int NT>
GPU_DEVICE inline void multiply(const turn<FORM, RT, UK> &now, const group<FORM, RT> &g,
                                const char *table, const char *nested_table, const char *x,
                                int x_step, int k, int end,
                                typename sum_type<FORM>::type (*acc)[NT][4])
{
    float scales[2] = {0.0f, 0.0f};
    if (FORM == LINEAR_NESTED)
        read_scales<FORM, RT, UK>(now, g, nested_table, scales);
GPU_UNROLL
    for (int u = 0; u < UK; u++)
        if (k + u < end) {
            operands<FORM, RT> o = open_tiles<FORM, RT, UK>(now, u, table, scales);
            multiply_tiles<FORM, RT, NT>(o, x + u * columns_bytes(FORM), x_step, acc);
        }
}

/* The tables of the first weight, which those of the others equal. */
template <int FORM>
GPU_DEVICE inline void fill_tables(const linear_args &a, char *shared, char *nested)
{
    const float *tables = a.weight[0].tables;
GPU_NO_UNROLL /* `tables` is two lines of the cache, and other registers wait for tiles */
    for (int i = threadIdx.x; i < 256 * (LANE_ROW / 16); i += LINEAR_THREADS) {
        int byte = i / (LANE_ROW / 16);
        uint32_t pair = gpu_pack_bf16(gpu_load(tables + byte / 16), gpu_load(tables + byte % 16));
        uint4 four = {pair, pair, pair, pair};
        *(uint4 *)(void *)(shared + byte * TABLE_ROW + i % (LANE_ROW / 16) * 16) = four;
    }
    if (FORM == LINEAR_NESTED)
        for (int i = threadIdx.x; i < 256; i += LINEAR_THREADS)
            *(float *)(void *)(nested + i * 4) = gpu_load(tables + 16 + i);
}

/* Sums of SLICES slices in shared memory: register i of a warp's sums is a row of 32 lanes, `step`
 * bytes before the next; those of a slice follow those of the one before.  They are of `rows` rows
 * of x from row `first_row` on. */
typedef struct sums_view {
    char *first;
    int step;
    int first_row, rows;
} sums_view;

/* Writes the sums of this warp as those of slice `slice`. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline void store_sums(const sums_view &sums, int slice,
                                  typename sum_type<FORM>::type (*acc)[NT][4])
{
GPU_UNROLL
    for (int i = 0; i < RT * NT * 4; i++) {
        char *row = sums.first + (slice * RT * NT * 4 + i) * sums.step;
        *(typename sum_type<FORM>::type *)(void *)(row + threadIdx.x % LANES * 4) =
            acc[i / (NT * 4)][i / 4 % NT][i % 4];
    }
}

/* The output of fragment c of lane `lane` for tile r and rows 8 n .. 8 n + 7. */
template <int FORM, int RT, int NT, int SLICES>
GPU_DEVICE inline float add_slices(const linear_args &a, const sums_view &sums, char *panel,
                                   int weight, int tile, int r, int n, int c, int lane)
{
    typedef typename sum_type<FORM>::type sum;
    sum total = 0;
GPU_UNROLL
    for (int s = 0; s < SLICES; s++) {
        int place = ((s * RT + r) * NT + n) * 4 + c;
        total += *(const sum *)(const void *)(sums.first + place * sums.step + lane * 4);
    }
    linear_place p = linear_place_of(c, lane);
    return linear_output<FORM>(a, panel, a.weight[weight], tile * GPU_TILE_ROWS + p.row,
                               sums.first_row + n * 8 + p.token, (float)total, (int32_t)total);
}

/* The same for the unit that holds row r of tiles: of one tile, or of the two of a pair. */
template <int FORM, int RT, int NT, int SLICES>
GPU_DEVICE inline void finish_output(const linear_args &a, const sums_view &sums, char *panel,
                                     int unit, int end, int r, int n, int c, int lane)
{
    int index = unit + (a.paired ? r / 2 : r);
    if (index >= end)
        return;
    linear_unit u = linear_unit_at(a, index);
    linear_place p = linear_place_of(c, lane);
    int token = sums.first_row + n * 8 + p.token;
    float first = 0.0f, second = 0.0f;
GPU_NO_UNROLL
    for (int h = 0; h < (RT > 1 && a.paired ? 2 : 1); h++) { /* not unrolled: it is large */
        int weight = h == 0 ? u.weight[0] : u.weight[1], tile = h == 0 ? u.tile[0] : u.tile[1];
        bool there = tile >= 0 && tile * GPU_TILE_ROWS + p.row < a.weight[weight].rows;
        if (!there && h == 0)
            return;
        if (!there)
            break;
        float v = add_slices<FORM, RT, NT, SLICES>(a, sums, panel, weight, tile, r + h, n, c, lane);
        if (linear_is_activated(a, u, h))
            v = linear_act(a.output.activation, v);
        if (linear_is_apart(a, u))
            linear_store(a, weight, tile * GPU_TILE_ROWS + p.row, token, v);
        second = v;
        first = h == 0 ? v : first;
    }
    if (!linear_is_apart(a, u))
        linear_store_pair(a, u, p.row, token, first, second);
}

/* Gives away outputs first, first + step, ... of a group: those of rows of x that are there. */
template <int FORM, int RT, int NT, int SLICES>
GPU_DEVICE inline void finish_outputs(const linear_args &a, const sums_view &sums, char *panel,
                                      int unit, int end, int first, int step)
{
    for (int i = first; i < RT * NT * 4 * LANES; i += step) {
        int r = i / (NT * 4 * LANES), n = i / (4 * LANES) % NT, c = i / LANES % 4;
        if (n * 8 + linear_place_of(c, i % LANES).token >= sums.rows)
            continue;
        if (!a.paired || (RT > 1 && r % 2 == 0))
            finish_output<FORM, RT, NT, SLICES>(a, sums, panel, unit, end, r, n, c, i % LANES);
    }
}

} // namespace

#endif
