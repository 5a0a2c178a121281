/* Linear layers of many rows on the tensor cores, with the sums of skinny.h, so that a row gets the
 * same bits as among few.
 *
 * A block takes 48 or 64 rows of x and, for each of its eight warps, one or two rows of tiles: all
 * warps walk along the columns together, while the rows of x come into shared memory some tiles
 * ahead.  A warp keeps the sums of the slice it is in, and those of the slices before. */
#include "linear_launch.h"
#include "linear_tiles.h"

namespace {

enum {
    WARPS = LINEAR_THREADS / LANES,
    STAGES = 3 /* column-tiles of x that are there or on their way */
};

/* Times 8 rows of x for a block: what the registers hold sums of. */
GPU_BOTH inline constexpr int eights(int form)
{
    return is_4bit(form) ? 6 : 8;
}

GPU_BOTH inline constexpr int rows_of_block(int form)
{
    return eights(form) * 8;
}

/* Bytes from one row of x in shared memory to the next: the eight rows that a warp reads at once
 * lie in different banks. */
GPU_BOTH inline constexpr int row_bytes(int form)
{
    return columns_bytes(form) + (form == LINEAR_INT8 ? 0 : 16);
}

/* Shared memory: the table, or from the end of the columns on the outputs; the nested scales; x. */
template <int FORM, int RT>
struct prefill_layout {
    GPU_BOTH static constexpr int outputs() { return WARPS * RT * eights(FORM) * 4 * LANE_ROW; }
    GPU_BOTH static constexpr int nested_at()
    {
        return is_4bit(FORM) && TABLE_BYTES > outputs() ? (int)TABLE_BYTES : outputs();
    }
    GPU_BOTH static constexpr int rows_at()
    {
        return is_4bit(FORM) ? nested_at() + (FORM == LINEAR_NESTED ? 1024 : 0) : 0;
    }
    GPU_BOTH static constexpr int bytes()
    {
        int rows = rows_at() + STAGES * rows_of_block(FORM) * row_bytes(FORM);
        return rows > outputs() ? rows : outputs();
    }
};

/* Starts the copy of column-tile k of the block's rows of x to its stage. */
template <int FORM>
GPU_DEVICE inline void fetch_rows(const linear_args &a, char *stages, const char *panel, int k)
{
    enum { PIECES = columns_bytes(FORM) / 16, ALL = rows_of_block(FORM) * PIECES };
    char *stage = stages + k % STAGES * rows_of_block(FORM) * row_bytes(FORM);
    for (int i = threadIdx.x; k < a.across && i < ALL; i += LINEAR_THREADS) {
        int row = a.first + (int)blockIdx.y * rows_of_block(FORM) + i / PIECES;
        row = row < a.panel.rows ? row : a.panel.rows - 1;
        gpu_copy_async16(stage + i / PIECES * row_bytes(FORM) + i % PIECES * 16,
                         panel + a.panel.values + row * a.panel.stride +
                             k * columns_bytes(FORM) + i % PIECES * 16);
    }
    gpu_copy_async_commit();
}

/* The sums of a warp: of the slice that it is in, and of those before it. */
template <int FORM, int RT>
struct warp_sums {
    typename sum_type<FORM>::type slice[RT][eights(FORM)][4], total[RT][eights(FORM)][4];
};

template <int FORM, int RT>
GPU_DEVICE inline void end_slice(warp_sums<FORM, RT> *sums)
{
GPU_UNROLL
    for (int i = 0; i < RT * eights(FORM) * 4; i++) {
        int r = i / (eights(FORM) * 4), n = i / 4 % eights(FORM), c = i % 4;
        sums->total[r][n][c] += sums->slice[r][n][c];
        sums->slice[r][n][c] = 0;
    }
}

/* All columns. */
template <int FORM, int RT>
GPU_DEVICE inline void add_columns(const linear_args &a, const group<FORM, RT> &here, bool is_there,
                                   char *shared, const char *panel, warp_sums<FORM, RT> *sums)
{
    typedef prefill_layout<FORM, RT> at;
    char *stages = shared + at::rows_at();
    int lane = threadIdx.x % LANES, slice = 0, end = a.across / GPU_SLICES;
    turn<FORM, RT, 1> next = {};
    if (is_there)
        ask<FORM, RT, 1>(a, here, 0, a.across, &next);
    for (int k = 0; k < STAGES - 1; k++)
        fetch_rows<FORM>(a, stages, panel, k);
    for (int k = 0; k < a.across; k++) {
        gpu_copy_async_wait<STAGES - 2>();
        gpu_sync_block(); /* the rows of this turn are there, and nobody reads those of the last */
        fetch_rows<FORM>(a, stages, panel, k + STAGES - 1);
        for (; k == end; end = a.across * (++slice + 1) / GPU_SLICES)
            end_slice<FORM, RT>(sums);
        if (!is_there)
            continue;
        float scales[2] = {0.0f, 0.0f};
        if (FORM == LINEAR_NESTED)
            read_scales<FORM, RT, 1>(next, here, shared + at::nested_at(), scales);
        operands<FORM, RT> now = open_tiles<FORM, RT, 1>(next, 0, shared, scales);
        ask<FORM, RT, 1>(a, here, k + 1, a.across, &next);
        const char *x = stages + k % STAGES * rows_of_block(FORM) * row_bytes(FORM) +
                        lane / 4 * row_bytes(FORM) + lane % 4 * (FORM == LINEAR_INT8 ? 16 : 32);
        multiply_tiles<FORM, RT, eights(FORM)>(now, x, 8 * row_bytes(FORM), sums->slice);
    }
    end_slice<FORM, RT>(sums);
}

template <int FORM, int RT>
GPU_KERNEL void GPU_KERNEL_BOUNDS(LINEAR_THREADS, 1) prefill(const linear_args a)
{
    typedef prefill_layout<FORM, RT> at;
    GPU_SHARED(char, shared);
    gpu_let_next_start();
    int warp = gpu_shfl(GPU_FULL_WARP, (int)threadIdx.x / LANES, 0); /* the same for all lanes */
    int unit = ((int)blockIdx.x * WARPS + warp) * (a.paired ? RT / 2 : RT);
    bool is_there = unit < a.units;
    group<FORM, RT> here = find_group<FORM, RT, 1>(a, is_there ? unit : 0, a.units);
    if (is_4bit(FORM))
        fill_tables<FORM>(a, shared, shared + at::nested_at());
    gpu_wait_for_previous();
    char *panel = (char *)a.input.scratch;
    warp_sums<FORM, RT> sums = {};
    add_columns<FORM, RT>(a, here, is_there, shared, panel, &sums);
    gpu_sync_block(); /* the table and the rows are done with */
    int before = (int)blockIdx.y * rows_of_block(FORM);
    sums_view own = {shared + warp * RT * eights(FORM) * 4 * LANE_ROW, LANE_ROW, a.first + before,
                     a.rows - before};
    store_sums<FORM, RT, eights(FORM)>(own, 0, sums.total);
    gpu_sync_warp(GPU_FULL_WARP);
    if (is_there)
        finish_outputs<FORM, RT, eights(FORM), 1>(a, own, panel, unit, a.units,
                                                  threadIdx.x % LANES, LANES);
}

template <int FORM, int RT>
qllm_gpu_error launch_tiles(const linear_args &a, gpu_stream stream)
{
    int rows = rows_of_block(FORM), each = WARPS * (a.paired ? RT / 2 : RT);
    dim3 grid((unsigned)((a.units + each - 1) / each), (unsigned)((a.rows + rows - 1) / rows));
    return GPU_LAUNCH_DEPENDENT((prefill<FORM, RT>), grid, LINEAR_THREADS,
                                (prefill_layout<FORM, RT>::bytes()), stream, a);
}

/* Two rows of tiles for a warp, unless that leaves processors without a block. */
template <int FORM>
qllm_gpu_error launch_rows(const linear_args &a, const linear_shape &shape, gpu_stream stream)
{
    int rows = rows_of_block(FORM);
    int blocks = (a.units + 2 * WARPS - 1) / (2 * WARPS) * ((a.rows + rows - 1) / rows);
    return a.paired || blocks >= shape.processors ? launch_tiles<FORM, 2>(a, stream)
                                                  : launch_tiles<FORM, 1>(a, stream);
}

} // namespace

qllm_gpu_error linear_launch_prefill(int form, const linear_args &args, const linear_shape &shape,
                                     gpu_stream stream)
{
    switch (form) {
    case LINEAR_4BIT: return launch_rows<LINEAR_4BIT>(args, shape, stream);
    case LINEAR_NESTED: return launch_rows<LINEAR_NESTED>(args, shape, stream);
    case LINEAR_INT8: return launch_rows<LINEAR_INT8>(args, shape, stream);
    default: return launch_rows<LINEAR_BF16>(args, shape, stream);
    }
}
