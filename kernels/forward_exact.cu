/* The layers of compute="exact": decoder/forward.c phase by phase, over the rows of a chunk. */
#include "exact.h"

namespace {

/* What the phases share.  Once `code` is not 0, nothing more is launched. */
struct pass {
    qllm_decoder *decoder;
    const gpu_rows *rows;
    int64_t layer;
    qllm_gpu_error code;
};

int64_t slot_of(const pass *p, qllm_part part)
{
    return qllm_slot_of_part(&p->decoder->config, p->layer, part);
}

void multiply(pass *p, const gpu_weight *weight, const float *x, int rows, float *y,
              int64_t y_stride)
{
    const qllm_decoder *d = p->decoder;
    const gpu_exact_rows in = {x, weight->cols, rows, d->int8_threshold, d->int8_batch,
                               d->scratch.extra};
    if (p->code == 0)
        p->code = gpu_exact_multiply(weight, &in, y, y_stride, d->stream);
}

/* A part of the layer over all rows, y without gaps unless a stride is given. */
void linear(pass *p, qllm_part part, const float *x, float *y, int64_t y_stride = 0)
{
    const gpu_weight *weight = &p->decoder->linears[slot_of(p, part)];
    multiply(p, weight, x, p->rows->n, y, y_stride > 0 ? y_stride : weight->rows);
}

/* y = norm(x) by rows; row i from row row_of[i] where that is given. */
void norm(pass *p, int64_t weight, int64_t bias, const float *x, const int32_t *row_of, int rows,
          float *y)
{
    const qllm_decoder *d = p->decoder;
    const gpu_exact_norm how = {d->config.norm, gpu_vector(d, weight), gpu_vector(d, bias),
                                d->config.hidden, d->config.norm_eps};
    if (p->code == 0)
        p->code = gpu_exact_norm_rows(&how, x, row_of, rows, y, d->stream);
}

void attention_norm(pass *p)
{
    const gpu_scratch *s = &p->decoder->scratch;
    norm(p, slot_of(p, QLLM_PART_ATTENTION_NORM), slot_of(p, QLLM_PART_ATTENTION_NORM_BIAS), s->x,
         NULL, p->rows->n, s->normed);
}

void mlp_norm(pass *p, float *y)
{
    norm(p, slot_of(p, QLLM_PART_MLP_NORM), slot_of(p, QLLM_PART_MLP_NORM_BIAS),
         p->decoder->scratch.x, NULL, p->rows->n, y);
}

/* x += a, rows of the hidden size */
void add(pass *p, const float *a, float *x)
{
    const qllm_decoder *d = p->decoder;
    if (p->code == 0)
        p->code = gpu_exact_add(a, p->rows->n * d->config.hidden, x, d->stream);
}

/* Where the heads lie in a row of scratch.qkv, as in decoder/forward.c. */
void lay_out(const qllm_decoder_config *c, gpu_exact_heads *heads)
{
    int64_t group = c->heads / c->kv_heads, q = c->heads * c->head_dim;
    heads->heads = static_cast<int>(c->heads);
    heads->kv_heads = static_cast<int>(c->kv_heads);
    heads->head_dim = static_cast<int>(c->head_dim);
    heads->stride = q + 2 * c->kv_heads * c->head_dim;
    heads->q_group = (c->fused_qkv ? group + 2 : group) * c->head_dim;
    heads->k = c->fused_qkv ? group * c->head_dim : q;
    heads->v = heads->k + (c->fused_qkv ? 1 : c->kv_heads) * c->head_dim;
    heads->kv_group = c->fused_qkv ? heads->q_group : c->head_dim;
}

gpu_exact_heads heads_of(const pass *p)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    gpu_exact_heads heads = {};
    lay_out(c, &heads);
    heads.page_offset = p->layer * c->kv_heads * 2 * GPU_PAGE * c->head_dim;
    heads.positions = p->rows->positions;
    heads.page_index = p->rows->page_index;
    heads.page_base = p->rows->page_base;
    heads.max_pages = p->rows->max_pages;
    if (c->position == QLLM_POSITION_ROPE) {
        heads.half = static_cast<int>(c->rotary_dim / 2);
        heads.cos = d->positions.cos;
        heads.sin = d->positions.sin;
    } else {
        heads.bias = d->positions.bias;
        heads.bias_stride = d->positions.capacity;
    }
    heads.q_norm = gpu_vector(d, slot_of(p, QLLM_PART_Q_NORM));
    heads.k_norm = gpu_vector(d, slot_of(p, QLLM_PART_K_NORM));
    heads.eps = c->norm_eps;
    heads.scale = c->attention_scale;
    heads.window = c->sliding_window != NULL ? c->sliding_window[p->layer] : 0;
    return heads;
}

/* branch = attention(normed) */
void attention(pass *p)
{
    const qllm_decoder *d = p->decoder;
    const gpu_scratch *s = &d->scratch;
    const gpu_exact_heads heads = heads_of(p);
    if (d->config.fused_qkv) {
        linear(p, QLLM_PART_QKV, s->normed, s->qkv);
    } else {
        linear(p, QLLM_PART_Q, s->normed, s->qkv, heads.stride);
        linear(p, QLLM_PART_K, s->normed, s->qkv + heads.k, heads.stride);
        linear(p, QLLM_PART_V, s->normed, s->qkv + heads.v, heads.stride);
    }
    if (p->code == 0)
        p->code = gpu_exact_place(&heads, s->qkv, p->rows->n, d->stream);
    if (p->code == 0)
        p->code = gpu_exact_attend(&heads, s->qkv, p->rows->n, p->rows->positions_end, s->attended,
                                   d->stream);
    linear(p, QLLM_PART_O, s->attended, s->branch);
}

/* branch2 = mlp(x) */
void mlp(pass *p, const float *x)
{
    const qllm_decoder *d = p->decoder;
    const gpu_scratch *s = &d->scratch;
    bool gated = d->config.gated;
    float *inner = gated ? s->gate : s->up;
    if (gated)
        linear(p, QLLM_PART_GATE, x, s->gate);
    linear(p, QLLM_PART_UP, x, s->up);
    if (p->code == 0)
        p->code = gpu_exact_activate(d->config.activation, inner, gated ? s->up : NULL,
                                     p->rows->n * d->config.intermediate, inner, d->stream);
    linear(p, QLLM_PART_DOWN, inner, s->branch2);
}

void layer(pass *p)
{
    const gpu_scratch *s = &p->decoder->scratch;
    qllm_block_kind block = p->decoder->config.block;
    attention_norm(p);
    if (block == QLLM_BLOCK_PARALLEL2)
        mlp_norm(p, s->normed2);
    attention(p);
    if (block == QLLM_BLOCK_SERIAL) {
        add(p, s->branch, s->x);
        mlp_norm(p, s->normed);
    }
    mlp(p, block == QLLM_BLOCK_PARALLEL2 ? s->normed2 : s->normed);
    if (block != QLLM_BLOCK_SERIAL)
        add(p, s->branch, s->branch2);
    add(p, s->branch2, s->x);
}

} // namespace

qllm_status gpu_exact_embed(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error)
{
    return gpu_check(gpu_exact_rows_of(decoder->embedding, rows->tokens, rows->n,
                                       decoder->scratch.x, decoder->stream),
                     "the embedding of a step", error);
}

qllm_status gpu_exact_layers(qllm_decoder *decoder, const gpu_rows *rows, qllm_error *error)
{
    pass p = {decoder, rows, 0, 0};
    for (; p.layer < decoder->config.layers; p.layer++)
        layer(&p);
    return gpu_check(p.code, "the layers of a step", error);
}

qllm_status gpu_exact_head(qllm_decoder *decoder, const gpu_rows *rows, int wanted,
                           qllm_error *error)
{
    const qllm_decoder_config *c = &decoder->config;
    const gpu_scratch *s = &decoder->scratch;
    pass p = {decoder, rows, 0, 0};
    norm(&p, qllm_slot_of_final_norm(c), qllm_slot_of_final_norm_bias(c), s->x, rows->row_of,
         wanted, s->normed);
    multiply(&p, &decoder->linears[qllm_slot_of_head(c)], s->normed, wanted, s->logits, c->vocab);
    return gpu_check(p.code, "the head of a step", error);
}

int64_t gpu_exact_scratch(const qllm_decoder *decoder, int64_t rows, int64_t positions)
{
    (void)positions;
    return gpu_exact_linear_scratch(decoder, rows);
}
