/* Attention on the tensor cores, in two forms, and the choice of the form: attention.h says what they
 * compute. */
#include "attention_strip.h"

namespace {

enum {
    SPLIT_THREADS = GPU_WARP * GPU_SPLIT_STRIPS,
    BEGIN_THREADS = 256,
    MOST_HEAD_DIM = 256 /* of the forms on the tensor cores; a multiple of 8 */
};

/* Partial sums that may be held at once; above, no split is given to a block of its own. */
constexpr int64_t MOST_PARTIAL_BYTES = (int64_t)1 << 28;

constexpr int64_t ALIGNMENT = 256;

/* How work is numbered: tiles of `rows` consecutive rows and `queries` queries. */
typedef struct work_shape {
    int rows, queries;
    gpu_divisor group; /* query heads of a key-value head */
    int groups;  /* of rows */
    int tiles;   /* of one group of rows and one key-value head */
    int splits;
    int blocks;  /* SPLITS: that run; each takes every blocks-th piece of work */
} work_shape;

/* Where things lie in scratch.  For each row, head and split: the sum, and o (head_dim). */
typedef struct partials {
    unsigned *arrived; /* (rows, kv_heads, tiles): splits that are done */
    attention_sum *sum;
    float *o;
} partials;

GPU_BOTH inline int64_t padded(int64_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

GPU_BOTH inline int splits_of(const gpu_attention &a)
{
    return (a.max_pages + GPU_SPLIT_PAGES - 1) / GPU_SPLIT_PAGES;
}

/* The counters of a row, whatever the number of queries in a tile: at most one for each head. */
GPU_BOTH inline int64_t arrived_bytes(const gpu_attention &a)
{
    return padded((int64_t)a.rows * a.heads * (int64_t)sizeof(unsigned));
}

GPU_BOTH inline int64_t sum_bytes(const gpu_attention &a)
{
    return padded((int64_t)a.rows * a.heads * splits_of(a) * (int64_t)sizeof(attention_sum));
}

GPU_DEVICE inline partials partials_of(const gpu_attention &a)
{
    char *scratch = (char *)a.scratch;
    partials p;
    p.arrived = (unsigned *)(void *)scratch;
    p.sum = (attention_sum *)(void *)(scratch + arrived_bytes(a));
    p.o = (float *)(void *)(scratch + arrived_bytes(a) + sum_bytes(a));
    return p;
}

GPU_DEVICE inline int64_t partial_index(const gpu_attention &a, const attention_query &q, int split)
{
    return ((int64_t)q.row * a.heads + q.head) * splits_of(a) + split;
}

GPU_DEVICE inline attention_tile tile_of(const gpu_attention &a, const work_shape &w, int group,
                                         int kv_head, int index)
{
    attention_tile t;
    t.row = group * w.rows;
    t.rows = a.rows - t.row < w.rows ? a.rows - t.row : w.rows;
    t.kv_head = kv_head;
    t.group = w.group;
    t.first = index * w.queries;
    int queries = t.rows * w.group.by - t.first;
    t.queries = queries < w.queries ? queries : w.queries;
    return t;
}

/* What a lane knows of a tile: the span of row `lane` of it, and its two queries. */
typedef struct lane_view {
    attention_span row;
    attention_span seen[2];
    int place[2]; /* of the query's row in the tile; 31, where no row is, without a query */
    const float *bias[2];
} lane_view;

GPU_DEVICE inline lane_view view_of(const gpu_attention &a, const attention_tile &tile)
{
    int lane = threadIdx.x % GPU_WARP;
    lane_view v = {};
    if (lane < tile.rows)
        v.row = attention_span_of(a, tile.row + lane);
GPU_UNROLL
    for (int h = 0; h < 2; h++) {
        attention_query q = attention_query_of(tile, lane / 4 + 8 * h);
        bool there = lane / 4 + 8 * h < tile.queries;
        v.place[h] = there ? q.place : 31;
        if (there)
            v.seen[h] = attention_span_of(a, q.row);
        v.bias[h] = there && a.bias != NULL ? a.bias + q.head * a.bias_stride : NULL;
    }
    return v;
}

/* Strip `first` of a page for the rows `same` of a tile that hold it; false: they see none of
 * it. */
GPU_DEVICE inline bool find_strip(const gpu_attention &a, const attention_tile &tile,
                                  const lane_view &view, unsigned same, int page, int first,
                                  attention_strip *s)
{
    bool mine = same >> (threadIdx.x % GPU_WARP) & 1;
    int end = mine && view.row.begin < first + GPU_STRIP ? view.row.end : 0;
    for (int m = 1; m < ATTENTION_QUERIES; m *= 2) {
        int other = gpu_shfl_xor(GPU_FULL_WARP, end, m);
        end = other > end ? other : end;
    }
    end = gpu_shfl(GPU_FULL_WARP, end, 0);
    if (end <= first)
        return false;
    int64_t d = a.head_dim;
    s->keys = (const uint16_t *)a.page_base[page] + a.page_offset +
              tile.kv_head * 2 * GPU_PAGE * d + first % GPU_PAGE * d;
    s->values = s->keys + GPU_PAGE * d;
    s->first = first;
    s->limit = end - first < GPU_STRIP ? end - first : GPU_STRIP;
GPU_UNROLL
    for (int h = 0; h < 2; h++) {
        attention_span none = {0, 0};
        s->seen[h] = same >> view.place[h] & 1 ? view.seen[h] : none;
        s->bias[h] = view.bias[h];
    }
    return true;
}

GPU_DEVICE inline int lowest_bit(unsigned bits)
{
    return gpu_popcount(~bits & (bits - 1));
}

/* For the strips of a split, ascending, and the rows of a tile that hold the same page of it:
 * use(strip, rows as bits, part), of `turns` such pieces the one that is this warp's turn. */
template <int HD, class Use>
GPU_DEVICE inline void walk_split(const gpu_attention &a, const attention_tile &tile,
                                  const lane_view &view, int split, const uint4 *queries, int turn,
                                  int turns, const Use &use)
{
    int row = tile.row + (int)(threadIdx.x % GPU_WARP), piece = 0;
GPU_NO_UNROLL
    for (int p = 0; p < GPU_SPLIT_PAGES; p++) {
        int start = split * GPU_SPLIT + p * GPU_PAGE, page = -1;
        if (view.row.begin < start + GPU_PAGE && view.row.end > start)
            page = a.page_index[(int64_t)row * a.max_pages + split * GPU_SPLIT_PAGES + p];
        for (unsigned left = gpu_ballot(GPU_FULL_WARP, page >= 0); left != 0;) {
            int shared_page = gpu_shfl(GPU_FULL_WARP, page, lowest_bit(left));
            unsigned same = gpu_ballot(GPU_FULL_WARP, page == shared_page);
            left &= ~same;
GPU_NO_UNROLL
            for (int i = 0; i < GPU_PAGE / GPU_STRIP; i++) {
                attention_strip s;
                if (piece++ % turns != turn)
                    continue;
                if (!find_strip(a, tile, view, same, shared_page, start + i * GPU_STRIP, &s))
                    continue;
                attention_strip_sums<HD>(
                    a.head_dim, s, queries, [&](const attention_part<attention_width(HD)> &part) {
                        use(p * (GPU_PAGE / GPU_STRIP) + i, same, part);
                    });
            }
        }
    }
}

/* ------------------------------------------------------------------------------ form SPLITS */

template <int HD>
struct split_memory {
    enum { QUERIES = HD > 128 ? 8 : ATTENTION_QUERIES };
    uint4 queries[HD / 8 * GPU_WARP];
    float o[GPU_SPLIT_STRIPS][QUERIES][HD + 4]; /* see element_of */
    attention_sum part[GPU_SPLIT_STRIPS][QUERIES];
    attention_factors merge[GPU_SPLIT_STRIPS][QUERIES];
    attention_sum sum[QUERIES];
    int complete[ATTENTION_QUERIES]; /* by place of a row: this was its last split */
};

/* The element of a head at place p of a row of split_memory.o: lanes that differ by one store side
 * by side. */
GPU_DEVICE inline int element_of(int p)
{
    return p / 64 * 64 + p % 4 * 16 + p / 4 % 16;
}

/* Whether a row of the tile sees anything of the split; the same for all threads. */
GPU_DEVICE inline bool is_seen(const gpu_attention &a, const attention_tile &tile, int split)
{
    for (int r = 0; r < tile.rows; r++) {
        attention_span s = attention_span_of(a, tile.row + r);
        if (s.begin < (split + 1) * GPU_SPLIT && s.end > split * GPU_SPLIT)
            return true;
    }
    return false;
}

template <int HD, int WIDTH>
GPU_DEVICE inline void keep_part(const lane_view &view, int strip, unsigned same,
                                 const attention_part<WIDTH> &part, split_memory<HD> *s)
{
    int lane = threadIdx.x % GPU_WARP, g = lane / 4, t = lane % 4;
GPU_UNROLL
    for (int h = 0; h < split_memory<HD>::QUERIES / 8; h++) {
        if (!(same >> view.place[h] & 1))
            continue;
        float *o = s->o[strip][g + 8 * h] + part.first + t;
GPU_UNROLL
        for (int i = 0; i < WIDTH / 8; i++)
GPU_UNROLL
            for (int e = 0; e < 2; e++)
                o[(i / 8 * 16 + e * 8 + i % 8) * 4] = part.o[i][2 * h + e];
        if (t == 0)
            s->part[strip][g + 8 * h] = part.sum[h];
    }
}

/* The factors of the strips and the sum of a split, for each query. */
template <int HD>
GPU_DEVICE inline void merge_strips(const attention_tile &tile, split_memory<HD> *s)
{
    int query = threadIdx.x;
    if (query >= tile.queries)
        return;
    attention_sum sum = {0.0f, 0.0f};
    for (int strip = 0; strip < GPU_SPLIT_STRIPS; strip++)
        s->merge[strip][query] = attention_merge(&sum, s->part[strip][query]);
    s->sum[query] = sum;
}

/* The outputs of rows that see this split alone; for the others the split's part of them. */
template <int HD>
GPU_DEVICE inline void store_split(const gpu_attention &a, const attention_tile &tile, int split,
                                   const split_memory<HD> &s)
{
    partials parts = partials_of(a);
    for (int i = threadIdx.x; i < tile.queries * HD; i += SPLIT_THREADS) {
        int query = i / HD, p = i % HD, d = element_of(p);
        if (d >= a.head_dim || s.sum[query].l == 0.0f)
            continue;
        float sum = 0.0f;
        for (int strip = 0; strip < GPU_SPLIT_STRIPS; strip++)
            sum = attention_apply(s.merge[strip][query], sum, s.o[strip][query][p]);
        attention_query q = attention_query_of(tile, query);
        attention_span seen = attention_span_of(a, q.row);
        if (seen.begin / GPU_SPLIT == (seen.end - 1) / GPU_SPLIT) {
            attention_out(a, q)[d] = sum / s.sum[query].l;
            continue;
        }
        int64_t at = partial_index(a, q, split);
        parts.o[at * a.head_dim + d] = sum;
        if (d == 0)
            parts.sum[at] = s.sum[query];
    }
}

/* Counts the split for each row that sees it and others too; the last one of a row completes it. */
template <int HD>
GPU_DEVICE inline void count_split(const gpu_attention &a, const attention_tile &tile, int tiles,
                                   int split, split_memory<HD> *s)
{
    int place = threadIdx.x;
    if (place >= tile.rows)
        return;
    s->complete[place] = 0;
    attention_span seen = attention_span_of(a, tile.row + place);
    int first = seen.begin / GPU_SPLIT, last = (seen.end - 1) / GPU_SPLIT;
    if (seen.end == 0 || first == last || split < first || split > last)
        return;
    unsigned *arrived = partials_of(a).arrived +
                        ((int64_t)(tile.row + place) * a.kv_heads + tile.kv_head) * tiles +
                        tile.first / split_memory<HD>::QUERIES;
    if (gpu_atomic_add(arrived, 1u) == (unsigned)(last - first)) {
        *arrived = 0; /* for the next layer */
        s->complete[place] = 1;
    }
}

template <int HD>
GPU_DEVICE inline void merge_splits(const gpu_attention &a, const attention_tile &tile,
                                    const split_memory<HD> &s)
{
    partials parts = partials_of(a);
    for (int i = threadIdx.x; i < tile.queries * HD; i += SPLIT_THREADS) {
        attention_query q = attention_query_of(tile, i / HD);
        int d = i % HD;
        if (d >= a.head_dim || !s.complete[q.place])
            continue;
        attention_span seen = attention_span_of(a, q.row);
        attention_sum sum = {0.0f, 0.0f};
        float o = 0.0f;
        for (int k = seen.begin / GPU_SPLIT; k <= (seen.end - 1) / GPU_SPLIT; k++) {
            int64_t at = partial_index(a, q, k);
            attention_factors f = attention_merge(&sum, parts.sum[at]);
            o = attention_apply(f, o, parts.o[at * a.head_dim + d]);
        }
        attention_out(a, q)[d] = o / sum.l;
    }
}

/* A block for each tile and split, a warp for each strip of each page. */
template <int HD>
GPU_KERNEL void GPU_KERNEL_BOUNDS(SPLIT_THREADS, 1)
attend_splits(const gpu_attention a, const work_shape w)
{
    GPU_SHARED(split_memory<HD>, s);
    gpu_let_next_start();
    gpu_wait_for_previous();
    int warp = threadIdx.x / GPU_WARP, pieces = w.groups * w.splits * a.kv_heads * w.tiles;
    for (int i = blockIdx.x; i < pieces; i += w.blocks) {
        unsigned head = (unsigned)i / (unsigned)w.tiles, piece = head / (unsigned)a.kv_heads;
        int group = (int)(piece / (unsigned)w.splits), split = (int)piece - group * w.splits;
        attention_tile tile = tile_of(a, w, group, (int)(head - piece * (unsigned)a.kv_heads),
                                      i - (int)head * w.tiles);
        if (!is_seen(a, tile, split))
            continue;
        attention_sum nothing = {0.0f, 0.0f};
        for (int k = threadIdx.x; k < GPU_SPLIT_STRIPS * tile.queries; k += SPLIT_THREADS)
            s->part[k % GPU_SPLIT_STRIPS][k / GPU_SPLIT_STRIPS] = nothing;
        attention_fill_queries<HD>(a, tile, s->queries, threadIdx.x, SPLIT_THREADS);
        gpu_sync_block();
        lane_view view = view_of(a, tile);
        walk_split<HD>(a, tile, view, split, s->queries, warp, GPU_SPLIT_STRIPS,
                       [&](int strip, unsigned same, const auto &part) {
                           keep_part(view, strip, same, part, s);
                       });
        gpu_sync_block();
        merge_strips<HD>(tile, s);
        gpu_sync_block();
        store_split<HD>(a, tile, split, *s);
        gpu_fence();
        gpu_sync_block();
        count_split<HD>(a, tile, w.tiles, split, s);
        gpu_sync_block();
        gpu_fence();
        merge_splits<HD>(a, tile, *s);
        gpu_sync_block();
    }
}

/* -------------------------------------------------------------------------------- form ROWS */

GPU_BOTH inline constexpr int row_warps(int head_dim)
{
    return head_dim > 128 ? 2 : 4;
}

/* Of a warp. */
template <int HD>
struct row_memory {
    uint4 queries[HD / 8 * GPU_WARP];
    float4 o[HD / 8][GPU_WARP]; /* of the split, as in attention_part */
};

/* What a lane has of a split: the sums of its two queries, and how the strip in work goes in. */
typedef struct row_sums {
    attention_sum sum[2];
    attention_factors merge[2];
} row_sums;

template <int HD, int WIDTH>
GPU_DEVICE inline void merge_part(const lane_view &view, unsigned same,
                                  const attention_part<WIDTH> &part, row_sums *split,
                                  row_memory<HD> *s)
{
    const attention_factors none = {1.0f, 0.0f};
GPU_UNROLL
    for (int h = 0; h < 2; h++)
        if (part.first == 0)
            split->merge[h] = same >> view.place[h] & 1
                                  ? attention_merge(&split->sum[h], part.sum[h]) : none;
GPU_UNROLL
    for (int i = 0; i < WIDTH / 8; i++) {
        float4 *o = &s->o[part.first / 8 + i][threadIdx.x % GPU_WARP], v = *o;
        v.x = attention_apply(split->merge[0], v.x, part.o[i][0]);
        v.y = attention_apply(split->merge[0], v.y, part.o[i][1]);
        v.z = attention_apply(split->merge[1], v.z, part.o[i][2]);
        v.w = attention_apply(split->merge[1], v.w, part.o[i][3]);
        *o = v;
    }
}

/* Merges a split into the outputs, where the sums gather, and completes the rows that end here. */
template <int HD>
GPU_DEVICE inline void merge_split(const gpu_attention &a, const attention_tile &tile,
                                   const lane_view &view, int split, const attention_sum part[2],
                                   attention_sum sum[2], const row_memory<HD> &s)
{
    int lane = threadIdx.x % GPU_WARP;
GPU_UNROLL
    for (int h = 0; h < 2; h++) {
        if (view.place[h] == 31 || part[h].l == 0.0f)
            continue;
        attention_factors f = attention_merge(&sum[h], part[h]);
        bool is_last = split == (view.seen[h].end - 1) / GPU_SPLIT;
        float *out = attention_out(a, attention_query_of(tile, lane / 4 + 8 * h));
        for (int i = 0; i < HD / 8 * 2; i++) {
            int d = i / 16 * 64 + lane % 4 * 16 + i % 16;
            if (d >= a.head_dim)
                continue;
            float4 v = s.o[i / 16 * 8 + i % 8][lane];
            float taken = i / 8 % 2 == 0 ? (h == 0 ? v.x : v.z) : (h == 0 ? v.y : v.w);
            float o = attention_apply(f, f.keep == 0.0f ? 0.0f : out[d], taken);
            out[d] = is_last ? o / sum[h].l : o;
        }
    }
}

/* A warp for each tile; the warps of a block take neighbours, which read the same pages. */
template <int HD>
GPU_KERNEL void GPU_KERNEL_BOUNDS(row_warps(HD) * GPU_WARP, 1)
attend_rows(const gpu_attention a, const work_shape w)
{
    GPU_SHARED(row_memory<HD>, memory);
    gpu_let_next_start();
    gpu_wait_for_previous();
    int warp = threadIdx.x / GPU_WARP, across = (w.groups + row_warps(HD) - 1) / row_warps(HD);
    int group = w.groups - 1 - ((int)blockIdx.x % across * row_warps(HD) + warp);
    if (group < 0)
        return; /* long rows first */
    int index = blockIdx.x / across;
    row_memory<HD> *s = memory + warp;
    attention_tile tile = tile_of(a, w, group, index / w.tiles, index % w.tiles);
    lane_view view = view_of(a, tile);
    attention_fill_queries<HD>(a, tile, s->queries, threadIdx.x % GPU_WARP, GPU_WARP);
    gpu_sync_warp();
    attention_sum sum[2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    for (int split = 0; split < w.splits; split++) {
        bool seen = view.row.begin < (split + 1) * GPU_SPLIT && view.row.end > split * GPU_SPLIT;
        if (!gpu_any(GPU_FULL_WARP, seen))
            continue;
        row_sums part = {};
        walk_split<HD>(a, tile, view, split, s->queries, 0, 1,
                       [&](int, unsigned same, const auto &strip) {
                           merge_part(view, same, strip, &part, s);
                       });
        merge_split<HD>(a, tile, view, split, part.sum, sum, *s);
    }
}

/* ------------------------------------------------------------------------------- on the host */

GPU_KERNEL void GPU_KERNEL_BOUNDS(BEGIN_THREADS, 1)
begin_attention(const gpu_attention a, float *x, int64_t hidden)
{
    gpu_let_next_start();
    gpu_wait_for_previous();
    int row = blockIdx.x;
    for (int i = threadIdx.x; i < a.heads; i += BEGIN_THREADS)
        partials_of(a).arrived[(int64_t)row * a.heads + i] = 0;
    if (a.page_index[(int64_t)row * a.max_pages] >= 0)
        return;
    for (int i = threadIdx.x; i < a.heads * a.head_dim; i += BEGIN_THREADS)
        a.out[row * a.out_stride + i] = 0.0f;
    for (int64_t i = threadIdx.x; i < hidden; i += BEGIN_THREADS)
        x[row * hidden + i] = 0.0f;
}

int64_t partial_bytes(const gpu_attention *a)
{
    return sum_bytes(*a) + padded((int64_t)a->rows * a->heads * splits_of(*a) * a->head_dim *
                                  (int64_t)sizeof(float));
}

bool partials_fit(const gpu_attention *a)
{
    return partial_bytes(a) <= MOST_PARTIAL_BYTES;
}

/* Tiles of at most `queries` queries and `rows` rows; all heads of a row where a tile can hold
 * them. */
work_shape shape_of(const gpu_attention *a, int queries, int rows)
{
    work_shape w;
    int group = a->heads / a->kv_heads, most = queries / group;
    w.group = gpu_divisor_of(group);
    w.rows = rows < most ? rows : most;
    w.rows = w.rows < 1 ? 1 : w.rows;
    w.queries = queries;
    w.groups = (a->rows + w.rows - 1) / w.rows;
    w.tiles = group <= queries ? 1 : (group + queries - 1) / queries;
    w.splits = splits_of(*a);
    w.blocks = 0;
    return w;
}

/* As many rows to a tile as leaves every multiprocessor two blocks. */
template <int HD>
qllm_gpu_error launch_splits(const gpu_device *device, const gpu_attention *a, gpu_stream stream)
{
    enum { QUERIES = split_memory<HD>::QUERIES, BLOCKS = 2, TURNS = 4 };
    work_shape w = shape_of(a, QUERIES, 1);
    int64_t each = (int64_t)w.tiles * a->kv_heads * w.splits;
    int64_t wanted = BLOCKS * device->multiprocessors;
    int64_t rows = a->rows * each / wanted;
    w = shape_of(a, QUERIES, rows < QUERIES ? (int)rows : QUERIES);
    int64_t pieces = w.groups * each, most = (int64_t)TURNS * wanted;
    w.blocks = (int)(pieces < most ? pieces : most);
    return GPU_LAUNCH_DEPENDENT((attend_splits<HD>), w.blocks, SPLIT_THREADS,
                                sizeof(split_memory<HD>), stream, *a, w);
}

template <int HD>
qllm_gpu_error launch_rows(const gpu_attention *a, gpu_stream stream)
{
    work_shape w = shape_of(a, ATTENTION_QUERIES, ATTENTION_QUERIES);
    int warps = row_warps(HD), across = (w.groups + warps - 1) / warps;
    return GPU_LAUNCH_DEPENDENT((attend_rows<HD>), across * a->kv_heads * w.tiles, warps * GPU_WARP,
                                warps * sizeof(row_memory<HD>), stream, *a, w);
}

template <int HD>
qllm_gpu_error launch_form(const gpu_device *device, const gpu_attention *a,
                           gpu_attention_form form, gpu_stream stream)
{
    return form == GPU_ATTENTION_SPLITS ? launch_splits<HD>(device, a, stream)
                                        : launch_rows<HD>(a, stream);
}

} // namespace

/* Whether the forms on the tensor cores take heads of that width. */
static bool fits_tensor_cores(int64_t head_dim)
{
    return head_dim <= MOST_HEAD_DIM && head_dim % 8 == 0;
}

const char *gpu_attention_name(int64_t head_dim)
{
    return fits_tensor_cores(head_dim)
               ? "bf16 keys and values; tensor cores, in splits of 256 positions side by side for "
                 "few rows of a sequence, one after the other for many"
               : "bf16 keys and values; without tensor cores, which take heads of 8, 16, ... 256 "
                 "elements";
}

gpu_attention_form gpu_attention_choose(const gpu_attention *a, int sequences)
{
    enum { MANY_ROWS = 8 }; /* of a sequence */
    if (!fits_tensor_cores(a->head_dim))
        return GPU_ATTENTION_PLAIN;
    bool many = (int64_t)sequences * MANY_ROWS <= a->rows;
    return many || !partials_fit(a) ? GPU_ATTENTION_ROWS : GPU_ATTENTION_SPLITS;
}

int64_t gpu_attention_scratch(const gpu_attention *a)
{
    return arrived_bytes(*a) + (partials_fit(a) ? partial_bytes(a) : 0);
}

qllm_status gpu_attention_begin(const gpu_attention *a, float *x, int64_t hidden, gpu_stream stream,
                                qllm_error *error)
{
    return gpu_check(GPU_LAUNCH_DEPENDENT(begin_attention, a->rows, BEGIN_THREADS, 0, stream, *a, x,
                                          hidden),
                     "attention", error);
}

qllm_status gpu_attend(const gpu_device *device, const gpu_attention *a, gpu_attention_form form,
                       gpu_stream stream, qllm_error *error)
{
    qllm_gpu_error code;
    if (form == GPU_ATTENTION_PLAIN)
        code = attention_launch_plain(a, stream);
    else if (a->head_dim <= 64)
        code = launch_form<64>(device, a, form, stream);
    else if (a->head_dim <= 128)
        code = launch_form<128>(device, a, form, stream);
    else
        code = launch_form<256>(device, a, form, stream);
    return gpu_check(code, "attention", error);
}
