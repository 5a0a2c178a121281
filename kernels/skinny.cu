/* Linear layers of few rows on the tensor cores: skinny.h has the sums.
 *
 * Weights are the A operand and the rows x are the 8 columns of B, so that up to 8 rows cost what
 * one costs.  A block owns a range of units (rows of tiles, or pairs of them) and its eight warps
 * the eight slices of the columns.  A warp asks for the tiles of the next turn before it multiplies
 * those of this one, and for the first ones before it waits for the kernel whose output it reads.
 *
 * 4-bit codes become operands through a table in shared memory: byte -> the two bf16 values of its
 * codes, once for each lane, so that no two lanes ever meet in a bank.  An entry starts at
 * byte * 256, which makes its address one byte permutation of the codes and the lane; the half of
 * the 64 KB that this leaves free holds the sums of the slices. */
#include "linear_after.h"
#include "linear_launch.h"

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

/* Tiles of a row of tiles that a warp takes in one turn: a lane asks for at least 4 x 16 bytes. */
GPU_BOTH inline constexpr int tiles_in_turn(int form, int rt)
{
    return rt * linear_loads(form) >= 4 ? 1 : 4 / (rt * linear_loads(form));
}

/* Blocks whose registers a processor can hold. */
GPU_BOTH inline constexpr int blocks_in_registers(int form, int nt)
{
    return nt == 1 || (nt == 2 && form != LINEAR_NESTED) ? 2 : 1;
}

/* Shared memory: the table or nothing, the sums (in the table's gaps, or by themselves), the table
 * of the nested scales, scratch of the preparation, the panel. */
template <int FORM>
struct shared_layout {
    GPU_BOTH static constexpr int sums_step() { return is_4bit(FORM) ? TABLE_ROW : LANE_ROW; }
    GPU_BOTH static constexpr int sums_at() { return is_4bit(FORM) ? LANE_ROW : 0; }
    GPU_BOTH static constexpr int nested_at(int rt, int nt)
    {
        return is_4bit(FORM) ? TABLE_BYTES : GPU_SLICES * rt * nt * 4 * LANE_ROW;
    }
    GPU_BOTH static constexpr int work_at(int rt, int nt)
    {
        return nested_at(rt, nt) + (FORM == LINEAR_NESTED ? 1024 : 0);
    }
    GPU_BOTH static constexpr int panel_at(int rt, int nt)
    {
        return work_at(rt, nt) + LINEAR_WORK * 4;
    }
};

/* The tiles of one turn, as they come from memory. */
template <int FORM, int RT>
struct turn {
    enum { UK = tiles_in_turn(FORM, RT), TILES = RT * UK };
    uint4 data[TILES][linear_loads(FORM)];
    float2 scale[FORM == LINEAR_4BIT ? TILES : 1];
    uint32_t code[2];  /* LINEAR_NESTED: of scale lane % 16 of tiles lane / 16 and lane / 16 + 2 */
    float nested[2];
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

template <int FORM, int RT>
GPU_DEVICE inline group<FORM, RT> find_group(const linear_args &a, int unit, int end)
{
    enum { LOADS = linear_loads(FORM), UK = turn<FORM, RT>::UK };
    group<FORM, RT> g;
    int lane = threadIdx.x % LANES, first_weight, first_tile;
    find_tile(a, unit, end, 0, &first_weight, &first_tile);
GPU_UNROLL
    for (int r = 0; r < RT; r++) {
        int weight, tile;
        find_tile(a, unit, end, r, &weight, &tile);
        if (tile < 0)
            weight = first_weight, tile = first_tile;
        const linear_matrix &w = a.weight[weight];
        g.data[r] = w.data + (int64_t)tile * a.across * LOADS * LANES + lane;
        if (FORM == LINEAR_4BIT)
            g.scale[r] = (const float2 *)(const void *)w.absmax + (int64_t)tile * a.blocks * 8 +
                         lane / 4;
GPU_UNROLL
        for (int i = 0; FORM == LINEAR_NESTED && i < 2; i++)
            if ((lane / 16 + 2 * i) / UK == r) {
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
template <int FORM, int RT>
GPU_DEVICE inline void ask(const linear_args &a, const group<FORM, RT> &g, int k, int end,
                           turn<FORM, RT> *next)
{
    enum { LOADS = linear_loads(FORM), UK = turn<FORM, RT>::UK };
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
        for (int i = 0; i < 2; i++) {
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

/* acc += scale * (A B) for a tile of 4-bit codes and NT times 8 rows. */
template <int NT>
GPU_DEVICE inline void multiply_codes(const char *table, const uint4 &data, float2 scale,
                                      const uint32_t (*b)[8], float (*acc)[4])
{
    uint32_t a[16];
    look_up(table, data, a);
GPU_UNROLL
    for (int n = 0; n < NT; n++) {
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
GPU_UNROLL
        for (int j = 0; j < 4; j++) {
            uint32_t part[4] = {a[2 * j], a[2 * j + 8], a[2 * j + 1], a[2 * j + 9]};
            gpu_mma_bf16(d, part, b[n] + 2 * j);
        }
        acc[n][0] = gpu_fma(scale.x, d[0], acc[n][0]);
        acc[n][1] = gpu_fma(scale.x, d[1], acc[n][1]);
        acc[n][2] = gpu_fma(scale.y, d[2], acc[n][2]);
        acc[n][3] = gpu_fma(scale.y, d[3], acc[n][3]);
    }
}

/* LINEAR_NESTED: the two scales of this lane of the turn (core/qweight.h: two roundings). */
template <int FORM, int RT>
GPU_DEVICE inline void read_scales(const turn<FORM, RT> &now, const group<FORM, RT> &g,
                                   const char *nested_table, float scales[2])
{
GPU_UNROLL
    for (int i = 0; i < 2; i++) {
        float code = *(const float *)(const void *)(nested_table + now.code[i] * 4);
        scales[i] = code * now.nested[i] + g.offset[i];
    }
}

/* The pair of scales of tile j of the turn for this lane. */
GPU_DEVICE inline float2 share_scales(const float scales[2], int j)
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

/* One turn: the tiles [k, k + UK) of RT rows of tiles times NT times 8 rows; x: this lane's values
 * at column 0 of its row of the first eight, x_step bytes before those of the next eight. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline void multiply(const turn<FORM, RT> &now, const group<FORM, RT> &g,
                                const char *shared, const char *x, int x_step, int k,
                                int end,
                                typename sum_type<FORM>::type (*acc)[NT][4])
{
    enum { UK = turn<FORM, RT>::UK, COLUMNS = FORM == LINEAR_INT8 ? 64 : 128 };
    typedef shared_layout<FORM> at;
    float scales[2];
    if (FORM == LINEAR_NESTED)
        read_scales<FORM, RT>(now, g, shared + at::nested_at(RT, NT), scales);
GPU_UNROLL
    for (int u = 0; u < UK; u++)
        if (k + u < end) {
            uint32_t b[NT][8];
GPU_UNROLL
            for (int n = 0; n < NT; n++)
                read_rows<FORM>(x + n * x_step + (k + u) * COLUMNS, b[n]);
GPU_UNROLL
            for (int r = 0; r < RT; r++) {
                const int j = r * UK + u;
                if constexpr (is_4bit(FORM)) {
                    float2 scale = FORM == LINEAR_NESTED ? share_scales(scales, j) : now.scale[j];
                    multiply_codes<NT>(shared, now.data[j][0], scale, b, acc[r]);
                } else {
GPU_UNROLL
                    for (int n = 0; n < NT; n++)
                        multiply_plain<FORM>(now.data[j], b[n], acc[r][n]);
                }
            }
        }
}

/* The sums of all slices: fragment c of lane `lane` for tile r and rows 8 n .. 8 n + 7. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline float add_slices(const linear_args &a, char *shared, char *panel, int weight,
                                   int tile, int r, int n, int c, int lane)
{
    typedef typename sum_type<FORM>::type sum;
    typedef shared_layout<FORM> at;
    sum total = 0;
GPU_UNROLL
    for (int s = 0; s < GPU_SLICES; s++) {
        int place = ((s * RT + r) * NT + n) * 4 + c;
        total += *(const sum *)(const void *)(shared + at::sums_at() + place * at::sums_step() +
                                              lane * 4);
    }
    linear_place p = linear_place_of(c, lane);
    return linear_output<FORM>(a, panel, a.weight[weight], tile * GPU_TILE_ROWS + p.row,
                               a.first + n * 8 + p.token, (float)total, (int32_t)total);
}

template <int FORM, int RT, int NT>
GPU_DEVICE inline void finish_tile(const linear_args &a, char *shared, char *panel, int unit,
                                   int end, int r, int n, int c, int lane)
{
    int weight, tile;
    linear_place p = linear_place_of(c, lane);
    find_tile(a, unit, end, r, &weight, &tile);
    if (tile < 0 || tile * GPU_TILE_ROWS + p.row >= a.weight[weight].rows)
        return;
    float v = add_slices<FORM, RT, NT>(a, shared, panel, weight, tile, r, n, c, lane);
    linear_store(a, weight, tile * GPU_TILE_ROWS + p.row, a.first + n * 8 + p.token, v);
}

template <int FORM, int RT, int NT>
GPU_DEVICE inline void finish_pair(const linear_args &a, char *shared, char *panel, int unit,
                                   int end, int r, int n, int c, int lane)
{
    if (unit + r / 2 >= end)
        return;
    linear_unit u = linear_unit_at(a, unit + r / 2);
    linear_place p = linear_place_of(c, lane);
    if (u.tile[0] * GPU_TILE_ROWS + p.row >= a.weight[u.weight[0]].rows)
        return;
    float first = add_slices<FORM, RT, NT>(a, shared, panel, u.weight[0], u.tile[0], r, n, c, lane);
    float second = 0.0f;
    if (u.tile[1] >= 0)
        second = add_slices<FORM, RT, NT>(a, shared, panel, u.weight[1], u.tile[1], r + 1, n, c,
                                          lane);
    linear_store_pair(a, u, p.row, a.first + n * 8 + p.token, first, second);
}

/* Adds the slices and gives away the outputs of a group.  By the whole block. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline void finish(const linear_args &a, char *shared, char *panel, int unit, int end,
                              typename sum_type<FORM>::type (*acc)[NT][4])
{
    typedef shared_layout<FORM> at;
    int slice = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    char *sums = shared + at::sums_at();
GPU_UNROLL
    for (int i = 0; i < RT * NT * 4; i++)
        *(typename sum_type<FORM>::type *)(void *)(sums + (slice * RT * NT * 4 + i) *
                                                              at::sums_step() + lane * 4) =
            acc[i / (NT * 4)][i / 4 % NT][i % 4];
    gpu_sync_block();
    for (int i = threadIdx.x; i < RT * NT * 4 * LANES; i += LINEAR_THREADS) {
        int r = i / (NT * 4 * LANES), n = i / (4 * LANES) % NT, c = i / LANES % 4;
        if (n * 8 + linear_place_of(c, i % LANES).token >= a.rows)
            continue;
        if (!a.paired)
            finish_tile<FORM, RT, NT>(a, shared, panel, unit, end, r, n, c, i % LANES);
        else if (RT > 1 && r % 2 == 0)
            finish_pair<FORM, RT, NT>(a, shared, panel, unit, end, r, n, c, i % LANES);
    }
    gpu_sync_block();
}

/* The tables of the first weight, which those of the others equal. */
template <int FORM>
GPU_DEVICE inline void fill_tables(const linear_args &a, char *shared, char *nested)
{
    const float *tables = a.weight[0].tables;
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

/* RESIDENT: the block prepares its own panel of at most 8 rows in shared memory; otherwise the
 * panel lies in input.scratch. */
template <int FORM, int RT, int NT, bool RESIDENT>
GPU_KERNEL void GPU_KERNEL_BOUNDS(LINEAR_THREADS, blocks_in_registers(FORM, NT))
skinny(const linear_args a)
{
    typedef shared_layout<FORM> at;
    typedef typename sum_type<FORM>::type sum;
    enum { UK = turn<FORM, RT>::UK };
    GPU_SHARED(char, shared);
    gpu_let_next_start();
    int lane = threadIdx.x % LANES;
    int warp = gpu_shfl(GPU_FULL_WARP, (int)threadIdx.x / LANES, 0); /* the same for all lanes */
    int unit = (int)((int64_t)a.units * blockIdx.x / gridDim.x);
    int last = (int)((int64_t)a.units * (blockIdx.x + 1) / gridDim.x);
    int begin = a.across * warp / GPU_SLICES, end = a.across * (warp + 1) / GPU_SLICES;
    int step = a.paired ? RT / 2 : RT;
    group<FORM, RT> here = find_group<FORM, RT>(a, unit, last);
    turn<FORM, RT> even = {}, odd = {};
    ask<FORM, RT>(a, here, begin, end, &even);
    if (is_4bit(FORM))
        fill_tables<FORM>(a, shared, shared + at::nested_at(RT, NT));
    gpu_wait_for_previous();
    char *panel = RESIDENT ? shared + at::panel_at(RT, NT) : (char *)a.input.scratch;
    if (RESIDENT)
        linear_prepare<FORM == LINEAR_INT8>(
            a, panel, (float *)(void *)(shared + at::work_at(RT, NT)), 0, a.rows);
    gpu_sync_block();
    int row = a.first + (RESIDENT && lane / 4 >= a.rows ? a.rows - 1 : lane / 4);
    const char *x = panel + a.panel.values + row * a.panel.stride +
                    lane % 4 * (FORM == LINEAR_INT8 ? 16 : 32);
    int x_step = 8 * a.panel.stride;
    while (unit < last) {
        sum acc[RT][NT][4] = {};
        for (int k = begin; k < end; k += 2 * UK) { /* two turns, so that none is copied */
            ask<FORM, RT>(a, here, k + UK, end, &odd);
            multiply<FORM, RT, NT>(even, here, shared, x, x_step, k, end, acc);
            ask<FORM, RT>(a, here, k + 2 * UK, end, &even);
            multiply<FORM, RT, NT>(odd, here, shared, x, x_step, k + UK, end, acc);
        }
        int done = unit;
        unit += step;
        if (unit < last) {
            here = find_group<FORM, RT>(a, unit, last);
            ask<FORM, RT>(a, here, begin, end, &even);
        }
        finish<FORM, RT, NT>(a, shared, panel, done, last, acc);
    }
}

/* A block for each row of x. */
template <bool INT8>
GPU_KERNEL void GPU_KERNEL_BOUNDS(LINEAR_THREADS, 2) prepare_rows(const linear_args a)
{
    GPU_SHARED(float, work);
    gpu_let_next_start();
    gpu_wait_for_previous();
    linear_prepare<INT8>(a, (char *)a.input.scratch, work, (int)blockIdx.x, 1);
}

template <int FORM, int RT, int NT, bool RESIDENT>
qllm_gpu_error launch(const linear_args &a, const linear_shape &shape, gpu_stream stream)
{
    int shared = shared_layout<FORM>::panel_at(RT, NT) + (RESIDENT ? a.panel.bytes : 0);
    int step = a.paired ? RT / 2 : RT, steps = (a.units + step - 1) / step;
    int blocks = linear_blocks(shape, shared);
    return GPU_LAUNCH_DEPENDENT((skinny<FORM, RT, NT, RESIDENT>), blocks < steps ? blocks : steps,
                                LINEAR_THREADS, shared, stream, a);
}

/* Rows of tiles that a warp takes at once: as many as a block has, up to what fits the registers;
 * the codes of 4 bits gain most, since rows of tiles share the operands of x. */
template <int FORM>
qllm_gpu_error launch_resident(const linear_args &a, const linear_shape &shape, gpu_stream stream)
{
    int tiles = (a.units + 2 * shape.processors - 1) / (2 * shape.processors) * (a.paired ? 2 : 1);
    if constexpr (is_4bit(FORM))
        if (tiles > 2)
            return launch<FORM, 4, 1, true>(a, shape, stream);
    if (tiles > 1)
        return launch<FORM, 2, 1, true>(a, shape, stream);
    return launch<FORM, 1, 1, true>(a, shape, stream);
}

template <int FORM>
qllm_gpu_error launch_rows(linear_args a, const linear_shape &shape, gpu_stream stream)
{
    if (linear_is_resident(shape, a.rows, shared_layout<FORM>::panel_at(4, 1) + a.panel.bytes))
        return launch_resident<FORM>(a, shape, stream);
    a.panel = linear_panel_of(FORM == LINEAR_INT8, linear_padded_rows(a.rows), a.cols);
    qllm_gpu_error code =
        GPU_LAUNCH_DEPENDENT((prepare_rows<FORM == LINEAR_INT8>), a.panel.rows, LINEAR_THREADS,
                             LINEAR_WORK * 4, stream, a);
    int rows = a.rows;
    for (a.first = 0; code == 0 && a.first < rows; a.first += LINEAR_ROWS) {
        a.rows = rows - a.first < LINEAR_ROWS ? rows - a.first : LINEAR_ROWS;
        code = a.rows <= 8    ? launch<FORM, 2, 1, false>(a, shape, stream)
               : a.rows <= 16 ? launch<FORM, 2, 2, false>(a, shape, stream)
                              : launch<FORM, 2, 4, false>(a, shape, stream);
    }
    return code;
}

} // namespace

qllm_gpu_error linear_launch_skinny(int form, const linear_args &args, const linear_shape &shape,
                                    gpu_stream stream)
{
    switch (form) {
    case LINEAR_4BIT: return launch_rows<LINEAR_4BIT>(args, shape, stream);
    case LINEAR_NESTED: return launch_rows<LINEAR_NESTED>(args, shape, stream);
    case LINEAR_INT8: return launch_rows<LINEAR_INT8>(args, shape, stream);
    default: return launch_rows<LINEAR_BF16>(args, shape, stream);
    }
}
