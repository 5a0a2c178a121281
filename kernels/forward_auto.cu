/* The layers of compute="auto".
 *
 * A Llama layer whose weights are tiled is five launches: [norm, q k v, rotation, keys and values
 * into their pages], [attention], [o, added to x], [norm, gate and up, their product], [down, added
 * to x].  A parallel block with one norm is four, since q k v and up read the same rows: [norm, q k v
 * and up], [attention], [o, added], [down, added]; with two norms five, those of the mlp between the
 * first and attention.  What the linear kernels cannot take together (formats that
 * differ, heads with a norm of their own or halves that are no multiple of 16) is stored first and
 * goes through a kernel of small.h; what is not tiled at all goes through those of exact.h. */

#include "attention.h"
#include "decoder.h"
#include "exact.h"
#include "small.h"

extern "C" {
#include "core/alloc.h"
}

namespace {

enum {
    GRAPH_ROWS = 64, /* steps of more rows take longer than their launches */
    MOST_GRAPHS = 32
};

/* What the phases share.  Once `status` is not QLLM_OK, nothing more is launched. */
struct pass {
    const qllm_decoder *decoder;
    const gpu_rows *rows;
    int n; /* rows that are worked on */
    int64_t layer;
    gpu_attention attention;
    gpu_attention_form form;
    qllm_status status;
    qllm_error *error;
};

void check(pass *p, qllm_gpu_error code)
{
    if (p->status == QLLM_OK)
        p->status = gpu_check(code, "the layers of a step", p->error);
}

const gpu_weight *weight_of(const pass *p, qllm_part part)
{
    return &p->decoder->linears[qllm_slot_of_part(&p->decoder->config, p->layer, part)];
}

const float *vector_of(const pass *p, qllm_part part)
{
    return gpu_vector(p->decoder, qllm_slot_of_part(&p->decoder->config, p->layer, part));
}

/* ---------------------------------------------------------------------------- linear layers */

/* Rows of x as they are. */
gpu_linear_input rows_of(const pass *p, const float *x, int64_t stride)
{
    gpu_linear_input in = {};
    in.x = x;
    in.stride = stride;
    in.rows = p->n;
    in.threshold = p->decoder->int8_threshold;
    in.scratch = p->decoder->scratch.extra;
    return in;
}

/* Rows of the residual stream through a norm. */
gpu_linear_input normed_rows(const pass *p, const float *scale, const float *bias)
{
    const qllm_decoder_config *c = &p->decoder->config;
    gpu_linear_input in = rows_of(p, p->decoder->scratch.x, c->hidden);
    in.norm = c->norm == QLLM_NORM_RMS ? GPU_NORM_RMS : GPU_NORM_LAYER;
    in.scale = scale;
    in.bias = bias;
    in.eps = c->norm_eps;
    return in;
}

gpu_linear_input layer_rows(const pass *p, qllm_part norm, qllm_part bias)
{
    return normed_rows(p, vector_of(p, norm), vector_of(p, bias));
}

/* In one launch; false: the weights do not fit that. */
bool together(pass *p, const gpu_weight *const *weights, int n, const gpu_linear_input *in,
              const gpu_linear_output *out)
{
    if (!gpu_linear_fits(weights, n, out))
        return false;
    if (p->status == QLLM_OK)
        p->status = gpu_linear(&p->decoder->device, weights, n, in, out, p->decoder->stream,
                               p->error);
    return true;
}

void exact(pass *p, const gpu_weight *weight, const gpu_linear_input *in, float *y, int64_t stride)
{
    if (p->status == QLLM_OK)
        p->status = gpu_exact_linear(p->decoder, weight, in->x, in->stride, in->rows, y, stride,
                                     p->error);
}

/* The rows after the norm of `in`, in scratch.normed. */
gpu_linear_input apply_norm(pass *p, const gpu_linear_input *in)
{
    const qllm_decoder_config *c = &p->decoder->config;
    const gpu_exact_norm norm = {c->norm, in->scale, in->bias, c->hidden, c->norm_eps};
    float *normed = p->decoder->scratch.normed;
    if (p->status == QLLM_OK)
        check(p, gpu_exact_norm_rows(&norm, in->x, in->row_of, in->rows, normed,
                                     p->decoder->stream));
    gpu_linear_input out = rows_of(p, normed, c->hidden);
    out.rows = in->rows;
    return out;
}

/* y[i] = weights[i] x */
void store(pass *p, const gpu_weight *const *weights, int n, const gpu_linear_input *in,
           float *const *y, const int64_t *stride)
{
    gpu_linear_output all = {};
    bool tiled = true;
    for (int i = 0; i < n; i++) {
        all.y[i] = y[i];
        all.stride[i] = stride[i];
        tiled = tiled && weights[i]->tiled;
    }
    if (together(p, weights, n, in, &all))
        return;
    gpu_linear_input rows = tiled || in->norm == GPU_NORM_NONE ? *in : apply_norm(p, in);
    for (int i = 0; i < n; i++) {
        gpu_linear_output one = {};
        one.y[0] = y[i];
        one.stride[0] = stride[i];
        if (!together(p, &weights[i], 1, &rows, &one))
            exact(p, weights[i], &rows, y[i], stride[i]);
    }
}

/* x += weight y, rows of y without gaps */
void add(pass *p, const gpu_weight *weight, const float *y)
{
    const gpu_scratch *s = &p->decoder->scratch;
    int64_t hidden = p->decoder->config.hidden;
    gpu_linear_input in = rows_of(p, y, weight->cols);
    gpu_linear_output out = {};
    out.after = GPU_AFTER_ADD;
    out.y[0] = s->x;
    out.stride[0] = hidden;
    if (together(p, &weight, 1, &in, &out))
        return;
    exact(p, weight, &in, s->branch, hidden);
    if (p->status == QLLM_OK)
        check(p, gpu_exact_add(s->branch, p->n * hidden, s->x, p->decoder->stream));
}

/* -------------------------------------------------------------------------------- attention */

int64_t layer_offset(const pass *p)
{
    const qllm_decoder_config *c = &p->decoder->config;
    return p->layer * c->kv_heads * 2 * GPU_PAGE * c->head_dim;
}

gpu_heads heads_of(const pass *p)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    bool rope = c->position == QLLM_POSITION_ROPE;
    gpu_heads h = {};
    h.heads = (int)c->heads;
    h.kv_heads = (int)c->kv_heads;
    h.head_dim = (int)c->head_dim;
    h.half = rope ? (int)(c->rotary_dim / 2) : 0;
    h.positions = p->rows->positions;
    h.cos = d->positions.cos;
    h.sin = d->positions.sin;
    h.q = d->scratch.qkv;
    h.q_stride = c->heads * c->head_dim;
    h.page_index = p->rows->page_index;
    h.page_base = p->rows->page_base;
    h.max_pages = p->rows->max_pages;
    h.page_offset = layer_offset(p);
    return h;
}

/* Heads that are stored first: in scratch.qkv as in decoder/forward.c. */
void store_heads(pass *p, const gpu_weight *const *weights, int n, const gpu_linear_input *in,
                 const gpu_heads *heads)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, width = q + 2 * kv;
    float *qkv = d->scratch.qkv, *const y[] = {qkv, qkv + q, qkv + q + kv};
    const int64_t stride[] = {width, width, width};
    store(p, weights, n, in, y, stride);
    gpu_place place = {};
    place.qkv = qkv;
    place.stride = width;
    place.fused = c->fused_qkv;
    place.q_norm = vector_of(p, QLLM_PART_Q_NORM);
    place.k_norm = vector_of(p, QLLM_PART_K_NORM);
    place.eps = c->norm_eps;
    place.heads = *heads;
    if (p->status == QLLM_OK)
        p->status = gpu_place_heads(&place, p->n, d->stream, p->error);
    p->attention.q_stride = width;
    p->attention.q_group = c->fused_qkv ? width / c->kv_heads : q / c->kv_heads;
}

/* Queries in rows without gaps, each head in its place. */
gpu_linear_output heads_output(pass *p)
{
    const qllm_decoder_config *c = &p->decoder->config;
    gpu_linear_output out = {};
    out.after = GPU_AFTER_HEADS;
    out.heads = heads_of(p);
    p->attention.q_stride = c->heads * c->head_dim;
    p->attention.q_group = p->attention.q_stride / c->kv_heads;
    return out;
}

/* Queries into scratch.qkv, keys and values into their pages. */
void heads(pass *p)
{
    const qllm_decoder_config *c = &p->decoder->config;
    const gpu_weight *weights[GPU_LINEAR_WEIGHTS];
    int n = c->fused_qkv ? 1 : 3;
    for (int i = 0; i < n; i++)
        weights[i] = weight_of(p, c->fused_qkv ? QLLM_PART_QKV : (qllm_part)(QLLM_PART_Q + i));
    gpu_linear_input in = layer_rows(p, QLLM_PART_ATTENTION_NORM, QLLM_PART_ATTENTION_NORM_BIAS);
    gpu_linear_output out = heads_output(p);
    if (c->qk_norm || !together(p, weights, n, &in, &out))
        store_heads(p, weights, n, &in, &out.heads);
}

/* A window or a position as an int; none reaches further than positions do. */
int narrow(int64_t n)
{
    return n < INT32_MAX ? (int)n : INT32_MAX;
}

void attend(pass *p)
{
    const qllm_decoder *d = p->decoder;
    const int64_t *window = d->config.sliding_window;
    p->attention.window = window != NULL ? narrow(window[p->layer]) : 0;
    p->attention.page_offset = layer_offset(p);
    if (p->status == QLLM_OK)
        p->status = gpu_attend(&d->device, &p->attention, p->form, d->stream, p->error);
}

/* What all layers of a step have in common. */
gpu_attention attention_of(const qllm_decoder *d, int rows, int max_pages)
{
    const qllm_decoder_config *c = &d->config;
    gpu_attention a = {};
    a.rows = rows;
    a.heads = (int)c->heads;
    a.kv_heads = (int)c->kv_heads;
    a.head_dim = (int)c->head_dim;
    a.scale = c->attention_scale;
    a.q = d->scratch.qkv;
    a.out = d->scratch.attended;
    a.out_stride = c->heads * c->head_dim;
    a.max_pages = max_pages;
    a.bias = c->position == QLLM_POSITION_ALIBI ? d->positions.bias : NULL;
    a.bias_stride = d->positions.capacity;
    return a;
}

/* -------------------------------------------------------------------------------- the layers */

/* The inner activations of the mlp, in scratch.gate, or in scratch.up without a gate. */
void activations(pass *p, qllm_part norm, qllm_part bias)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    const gpu_scratch *s = &d->scratch;
    int n = c->gated ? 2 : 1;
    const gpu_weight *weights[2] = {weight_of(p, c->gated ? QLLM_PART_GATE : QLLM_PART_UP),
                                    weight_of(p, QLLM_PART_UP)};
    float *const y[2] = {c->gated ? s->gate : s->up, s->up};
    const int64_t stride[2] = {c->intermediate, c->intermediate};
    gpu_linear_input in = layer_rows(p, norm, bias);
    gpu_linear_output out = {};
    out.after = c->gated ? GPU_AFTER_GATE : GPU_AFTER_ACT;
    out.y[0] = y[0];
    out.stride[0] = c->intermediate;
    out.activation = c->activation;
    if (together(p, weights, n, &in, &out))
        return;
    store(p, weights, n, &in, y, stride);
    if (p->status == QLLM_OK)
        check(p, gpu_exact_activate(c->activation, y[0], c->gated ? s->up : NULL,
                                    p->n * c->intermediate, y[0], d->stream));
}

/* Heads and inner activations of a parallel block, which read the same rows, in one launch; false:
 * they do not fit that. */
bool heads_and_activations(pass *p)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    if (c->block != QLLM_BLOCK_PARALLEL || !c->fused_qkv || c->gated || c->qk_norm)
        return false;
    const gpu_weight *weights[2] = {weight_of(p, QLLM_PART_QKV), weight_of(p, QLLM_PART_UP)};
    gpu_linear_input in = layer_rows(p, QLLM_PART_ATTENTION_NORM, QLLM_PART_ATTENTION_NORM_BIAS);
    gpu_linear_output out = heads_output(p);
    out.after = GPU_AFTER_HEADS_ACT;
    out.y[1] = d->scratch.up;
    out.stride[1] = c->intermediate;
    out.activation = c->activation;
    return together(p, weights, 2, &in, &out);
}

void layer(pass *p)
{
    const qllm_decoder_config *c = &p->decoder->config;
    const gpu_scratch *s = &p->decoder->scratch;
    bool one_norm = c->block == QLLM_BLOCK_PARALLEL, serial = c->block == QLLM_BLOCK_SERIAL;
    qllm_part norm = one_norm ? QLLM_PART_ATTENTION_NORM : QLLM_PART_MLP_NORM;
    qllm_part bias = one_norm ? QLLM_PART_ATTENTION_NORM_BIAS : QLLM_PART_MLP_NORM_BIAS;
    if (!heads_and_activations(p)) {
        heads(p);
        if (!serial)
            activations(p, norm, bias);
    }
    attend(p);
    add(p, weight_of(p, QLLM_PART_O), s->attended);
    if (serial)
        activations(p, norm, bias);
    add(p, weight_of(p, QLLM_PART_DOWN), c->gated ? s->gate : s->up);
}

/* Bytes of scratch.extra for the linear layers, before those for attention; -1: too many. */
int64_t linear_bytes(const qllm_decoder *d, int64_t rows)
{
    const qllm_decoder_config *c = &d->config;
    const int64_t cols[] = {c->hidden, c->heads * c->head_dim, c->intermediate};
    int64_t most = gpu_exact_linear_scratch(d, rows);
    for (int i = 0; most >= 0 && i < 3; i++) {
        int64_t bytes = gpu_linear_scratch(rows, cols[i]);
        most = bytes > most ? bytes : most;
    }
    return most < 0 ? -1 : (most + 255) / 256 * 256;
}

/* Steps that can be recorded work on the rows that fill a chunk up, too: their number is then one of
 * few.  The per-batch form of LLM.int8() must not see those. */
bool is_recordable(const qllm_decoder *d, const gpu_rows *rows)
{
    return gpu_graphs_available() && rows->padded <= GRAPH_ROWS && !d->int8_batch;
}

pass pass_of(const qllm_decoder *d, const gpu_rows *rows, qllm_error *error)
{
    pass p = {};
    p.decoder = d;
    p.rows = rows;
    p.n = is_recordable(d, rows) ? rows->padded : rows->n;
    p.error = error;
    return p;
}

pass layers_of(const qllm_decoder *d, const gpu_rows *rows, qllm_error *error)
{
    pass p = pass_of(d, rows, error);
    p.attention = attention_of(d, p.n, rows->max_pages);
    p.attention.positions = rows->positions;
    p.attention.page_index = rows->page_index;
    p.attention.page_base = rows->page_base;
    p.attention.scratch = (char *)d->scratch.extra + linear_bytes(d, rows->padded);
    p.form = gpu_attention_choose(&p.attention, rows->sequences);
    return p;
}

qllm_status run_layers(pass *p)
{
    const qllm_decoder *d = p->decoder;
    p->status = gpu_attention_begin(&p->attention, d->scratch.x, d->config.hidden, d->stream,
                                    p->error);
    for (p->layer = 0; p->layer < d->config.layers; p->layer++)
        layer(p);
    return p->status;
}

/* ---------------------------------------------------------------------------- recorded steps */

/* All that the launches of a step depend on, beside memory that they read. */
struct step_shape {
    int64_t generation;
    int rows, max_pages;
    gpu_attention_form form;
};

struct known_shape {
    step_shape shape;
    gpu_graph graph; /* NULL: seen once, not recorded yet */
    uint64_t used;   /* when, by gpu_graphs.clock; 0: this entry is empty */
};

} // namespace

struct gpu_graphs {
    known_shape known[MOST_GRAPHS];
    uint64_t clock;
};

namespace {

bool same_shape(const step_shape *a, const step_shape *b)
{
    return a->generation == b->generation && a->rows == b->rows &&
           a->max_pages == b->max_pages && a->form == b->form;
}

void forget(known_shape *known)
{
    gpu_graph_destroy(known->graph);
    known->graph = NULL;
    known->used = 0;
}

/* The entry of a shape, in place of the one that was used longest ago where it is new. */
known_shape *find_shape(gpu_graphs *graphs, const step_shape *shape)
{
    known_shape *oldest = &graphs->known[0];
    for (int i = 0; i < MOST_GRAPHS; i++) {
        known_shape *k = &graphs->known[i];
        if (k->used > 0 && k->shape.generation != shape->generation)
            forget(k); /* records addresses of the past */
        if (k->used > 0 && same_shape(&k->shape, shape))
            return k;
        oldest = k->used < oldest->used ? k : oldest;
    }
    forget(oldest);
    oldest->shape = *shape;
    return oldest;
}

qllm_status record(pass *p, gpu_graph *out)
{
    gpu_stream stream = p->decoder->stream;
    qllm_status status = gpu_check(gpu_graph_begin(stream), "recording a step", p->error);
    if (status != QLLM_OK)
        return status;
    status = run_layers(p);
    qllm_gpu_error code = gpu_graph_end(stream, out);
    return status != QLLM_OK ? status : gpu_check(code, "recording a step", p->error);
}

/* A shape that comes a second time is recorded, and from then on run as one piece. */
qllm_status run_recorded(qllm_decoder *d, pass *p)
{
    const step_shape shape = {d->generation, p->n, p->rows->max_pages, p->form};
    if (d->graphs == NULL) {
        void *memory;
        qllm_status status = qllm_alloc(&memory, 1, sizeof(gpu_graphs), "recorded steps", p->error);
        if (status != QLLM_OK)
            return status;
        d->graphs = (gpu_graphs *)memory;
    }
    known_shape *known = find_shape(d->graphs, &shape);
    bool is_new = known->used == 0;
    known->used = ++d->graphs->clock;
    if (is_new)
        return run_layers(p);
    if (known->graph == NULL) {
        qllm_status status = record(p, &known->graph);
        if (status != QLLM_OK) {
            forget(known);
            return status;
        }
    }
    return gpu_check(gpu_graph_run(known->graph, d->stream), "the layers of a step", p->error);
}

} // namespace

void gpu_auto_graphs_destroy(gpu_graphs *graphs)
{
    for (int i = 0; graphs != NULL && i < MOST_GRAPHS; i++)
        forget(&graphs->known[i]);
    qllm_free(graphs);
}

/* ---------------------------------------------------------------------------- parts of a step */

qllm_status gpu_auto_embed(qllm_decoder *d, const gpu_rows *rows, qllm_error *error)
{
    pass p = pass_of(d, rows, error);
    if (d->embedding->tiled)
        return gpu_embed_tiled(d->embedding, rows->tokens, p.n, d->scratch.x, d->stream, error);
    return gpu_check(gpu_exact_rows_of(d->embedding, rows->tokens, p.n, d->scratch.x, d->stream),
                     "the embedding of a step", error);
}

qllm_status gpu_auto_layers(qllm_decoder *d, const gpu_rows *rows, qllm_error *error)
{
    pass p = layers_of(d, rows, error);
    return is_recordable(d, rows) ? run_recorded(d, &p) : run_layers(&p);
}

qllm_status gpu_auto_head(qllm_decoder *d, const gpu_rows *rows, int wanted, qllm_error *error)
{
    const qllm_decoder_config *c = &d->config;
    pass p = pass_of(d, rows, error);
    gpu_linear_input in = normed_rows(&p, gpu_vector(d, qllm_slot_of_final_norm(c)),
                                      gpu_vector(d, qllm_slot_of_final_norm_bias(c)));
    const gpu_weight *head = &d->linears[qllm_slot_of_head(c)];
    in.row_of = rows->row_of;
    in.rows = wanted;
    if (wanted > 0)
        store(&p, &head, 1, &in, &d->scratch.logits, &c->vocab);
    return p.status;
}

int64_t gpu_auto_scratch(const qllm_decoder *d, int64_t rows, int64_t positions)
{
    int64_t max_pages = 1, linear = linear_bytes(d, rows);
    while (max_pages * GPU_PAGE < positions)
        max_pages *= 2;
    gpu_attention a = attention_of(d, (int)rows, (int)max_pages);
    return linear < 0 ? -1 : linear + gpu_attention_scratch(&a);
}
