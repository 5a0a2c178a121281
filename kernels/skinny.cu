/* Linear layers of few rows on the tensor cores: skinny.h has the sums.
 *
 * Weights are the A operand and the rows x are the 8 columns of B, so that up to 8 rows cost what
 * one costs.  A block owns a range of units (rows of tiles, or pairs of them) and its eight warps
 * the eight slices of the columns.  A warp asks for the tiles of the next turn before it multiplies
 * those of this one, for the first ones before it waits for the kernel whose output it reads, and
 * for those of the next units before it gives away the outputs of these.  The sums of the warps
 * meet in shared memory: for 4-bit codes in the gaps of the table (linear_tiles.h). */
#include "linear_launch.h"
#include "linear_tiles.h"

namespace {

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

/* Where the sums of all slices meet. */
template <int FORM>
GPU_DEVICE inline sums_view sums_of(const linear_args &a, char *shared)
{
    typedef shared_layout<FORM> at;
    sums_view sums = {shared + at::sums_at(), at::sums_step(), a.first, a.rows};
    return sums;
}

/* Adds the slices and gives away the outputs of a group.  By the whole block. */
template <int FORM, int RT, int NT>
GPU_DEVICE inline void finish(const linear_args &a, char *shared, char *panel, int unit, int end)
{
    gpu_sync_block();
    finish_outputs<FORM, RT, NT, GPU_SLICES>(a, sums_of<FORM>(a, shared), panel, unit, end,
                                             threadIdx.x, LINEAR_THREADS);
    gpu_sync_block();
}

/* What comes before the first group, while its tiles are on their way. */
template <int FORM, int RT, int NT, bool RESIDENT>
GPU_DEVICE inline void prepare(const linear_args &a, char *shared, char *panel)
{
    typedef shared_layout<FORM> at;
    if (is_4bit(FORM))
        fill_tables<FORM>(a, shared, shared + at::nested_at(RT, NT));
    gpu_wait_for_previous();
    if (RESIDENT)
        linear_prepare<FORM == LINEAR_INT8>(
            a, panel, (float *)(void *)(shared + at::work_at(RT, NT)), 0, a.rows);
    gpu_sync_block();
}

/* RESIDENT: the block prepares its own panel of at most 8 rows in shared memory; otherwise the
 * panel lies in input.scratch. */
template <int FORM, int RT, int NT, bool RESIDENT>
GPU_KERNEL void GPU_KERNEL_BOUNDS(LINEAR_THREADS, blocks_in_registers(FORM, NT))
skinny(const linear_args a)
{
    typedef shared_layout<FORM> at;
    typedef typename sum_type<FORM>::type sum;
    enum { UK = tiles_in_turn(FORM, RT), WIDTH = columns_bytes(FORM) };
    GPU_SHARED(char, shared);
    gpu_let_next_start();
    int lane = threadIdx.x % LANES;
    int warp = gpu_shfl(GPU_FULL_WARP, (int)threadIdx.x / LANES, 0); /* the same for all lanes */
    int block = (int)blockIdx.x, more = block < a.units_more ? block : a.units_more;
    int unit = block * a.units_each + more;
    int last = unit + a.units_each + (block < a.units_more);
    int begin = a.across * warp / GPU_SLICES, end = a.across * (warp + 1) / GPU_SLICES;
    char *nested = shared + at::nested_at(RT, NT);
    char *panel = RESIDENT ? shared + at::panel_at(RT, NT) : (char *)a.input.scratch;
    int row = a.first + (RESIDENT && lane / 4 >= a.rows ? a.rows - 1 : lane / 4);
    const char *x = panel + a.panel.values + row * a.panel.stride +
                    lane % 4 * (FORM == LINEAR_INT8 ? 16 : 32);
    int x_step = 8 * a.panel.stride;
    bool has_sums = false; /* of the units before `unit` */
    group<FORM, RT> here;
    turn<FORM, RT, UK> even = {}, odd = {};
    for (;;) {
        if (unit < last) {
            here = find_group<FORM, RT, UK>(a, unit, last);
            ask<FORM, RT, UK>(a, here, begin, end, &even);
        }
        if (has_sums)
            finish<FORM, RT, NT>(a, shared, panel, unit - (RT >> a.paired), last);
        else
            prepare<FORM, RT, NT, RESIDENT>(a, shared, panel);
        if (unit >= last)
            break;
        sum acc[RT][NT][4] = {};
        for (int k = begin; k < end; k += 2 * UK) { /* two turns, so that none is copied */
            ask<FORM, RT, UK>(a, here, k + UK, end, &odd);
            multiply<FORM, RT, UK, NT>(even, here, shared, nested, x + k * WIDTH, x_step, k, end,
                                       acc);
            ask<FORM, RT, UK>(a, here, k + 2 * UK, end, &even);
            multiply<FORM, RT, UK, NT>(odd, here, shared, nested, x + (k + UK) * WIDTH, x_step,
                                       k + UK, end, acc);
        }
        store_sums<FORM, RT, NT>(sums_of<FORM>(a, shared), threadIdx.x / LANES, acc);
        has_sums = true;
        unit += RT >> a.paired;
    }
}

template <int FORM, int RT, int NT, bool RESIDENT>
qllm_gpu_error launch(const linear_args &a, const linear_shape &shape, gpu_stream stream)
{
    int shared = shared_layout<FORM>::panel_at(RT, NT) + (RESIDENT ? a.panel.bytes : 0);
    int step = a.paired ? RT / 2 : RT, steps = (a.units + step - 1) / step;
    int most = linear_blocks(shape, shared), blocks = most < steps ? most : steps;
    linear_args args = a;
    args.units_each = a.units / blocks;
    args.units_more = a.units % blocks;
    return GPU_LAUNCH_DEPENDENT((skinny<FORM, RT, NT, RESIDENT>), blocks, LINEAR_THREADS, shared,
                                stream, args);
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
qllm_gpu_error launch_form(const linear_args &a, const linear_shape &shape, bool resident,
                           gpu_stream stream)
{
    if (resident)
        return launch_resident<FORM>(a, shape, stream);
    return a.rows <= 8    ? launch<FORM, 2, 1, false>(a, shape, stream)
           : a.rows <= 16 ? launch<FORM, 2, 2, false>(a, shape, stream)
                          : launch<FORM, 2, 4, false>(a, shape, stream);
}

} // namespace

bool linear_skinny_prepares(int form, const linear_args &args, const linear_shape &shape)
{
    int before = form == LINEAR_4BIT     ? shared_layout<LINEAR_4BIT>::panel_at(4, 1)
                 : form == LINEAR_NESTED ? shared_layout<LINEAR_NESTED>::panel_at(4, 1)
                                         : shared_layout<LINEAR_BF16>::panel_at(4, 1);
    return linear_is_resident(shape, args.rows, before + args.panel.bytes);
}

qllm_gpu_error linear_launch_skinny(int form, const linear_args &args, const linear_shape &shape,
                                    bool resident, gpu_stream stream)
{
    switch (form) {
    case LINEAR_4BIT: return launch_form<LINEAR_4BIT>(args, shape, resident, stream);
    case LINEAR_NESTED: return launch_form<LINEAR_NESTED>(args, shape, resident, stream);
    case LINEAR_INT8: return launch_form<LINEAR_INT8>(args, shape, resident, stream);
    default: return launch_form<LINEAR_BF16>(args, shape, resident, stream);
    }
}
