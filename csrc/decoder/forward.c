/* The layers, over the rows of one chunk.  All memory is there; nothing here can fail. */
#include <stddef.h>
#include <string.h>

#include "decoder/step.h"

typedef void (*activation)(const float *gate, const float *up, int64_t n, float *y);

/* What the phases of one layer need. */
typedef struct pass {
    qllm_decoder *decoder;
    int64_t n, layer;
    const qllm_weight *part[QLLM_PART_COUNT]; /* of the layer; NULL where the config has none */
    const qllm_weight *final_norm, *final_norm_bias;
    int64_t first_wanted; /* the chunk's first row of logits */
    int64_t positions;    /* that all rows of the chunk see together */
    activation act;
} pass;

/* Values that one thread works through in about the time that it takes to wake another. */
enum { SMALL_WORK = 1 << 14 };

/* Runs `work` on [0, n), which touches about `values` values; on this thread alone when small. */
static void run(pass *p, int64_t n, int64_t values, void (*work)(void *, int64_t, int64_t, int))
{
    if (values < SMALL_WORK)
        work(p, 0, n, 0);
    else
        qllm_threads_run(p->decoder->threads, n, work, p);
}

static void run_rows(pass *p, int64_t row_values, void (*work)(void *, int64_t, int64_t, int))
{
    run(p, p->n, p->n * row_values, work);
}

static qllm_linear_part part(const qllm_weight *weight, float *y, int64_t y_stride)
{
    return (qllm_linear_part){weight->packed, weight->values, y, y_stride};
}

/* Linear layers that take the same rows of x, as one job. */
static void linears(const pass *p, const qllm_linear_part *parts, int n, const float *x, int64_t m,
                    int64_t x_stride)
{
    qllm_decoder *d = p->decoder;
    qllm_cpu_linear(d->threads, d->ops, parts, n, x, m, x_stride, &d->linear_options,
                    d->scratch.linear);
}

static void linear(const pass *p, const qllm_weight *weight, const float *x, int64_t m,
                   int64_t x_stride, float *y, int64_t y_stride)
{
    qllm_linear_part one = part(weight, y, y_stride);
    linears(p, &one, 1, x, m, x_stride);
}

static void norm(const qllm_decoder *decoder, const float *x, const qllm_weight *weight,
                 const qllm_weight *bias, float *y)
{
    const qllm_decoder_config *c = &decoder->config;
    if (c->norm == QLLM_NORM_RMS)
        decoder->ops->rms_norm(x, weight->values, c->hidden, c->norm_eps, y);
    else
        decoder->ops->layer_norm(x, weight->values, bias->values, c->hidden, c->norm_eps, y);
}

static void embed_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        qllm_weights_embed(&p->decoder->weights, s->row[r].token, s->x + r * s->hidden_stride);
}

/* The norm before attention, and for two parallel norms the one before the mlp. */
static void norm_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const float *x = s->x + r * s->hidden_stride;
        norm(p->decoder, x, p->part[QLLM_PART_ATTENTION_NORM],
             p->part[QLLM_PART_ATTENTION_NORM_BIAS], s->normed + r * s->hidden_stride);
        if (p->decoder->config.block == QLLM_BLOCK_PARALLEL2)
            norm(p->decoder, x, p->part[QLLM_PART_MLP_NORM], p->part[QLLM_PART_MLP_NORM_BIAS],
                 s->normed2 + r * s->hidden_stride);
    }
}

/* Where the heads lie in a row of scratch.qkv: key-value head g has its query heads, one behind the
 * other, at g * q_group, its key at k + g * kv_group and its value at v + g * kv_group. */
typedef struct head_layout {
    int64_t group, q_group, k, v, kv_group;
} head_layout;

static head_layout layout_of(const qllm_decoder_config *c)
{
    int64_t group = c->heads / c->kv_heads;
    if (c->fused_qkv) {
        int64_t width = (group + 2) * c->head_dim;
        return (head_layout){group, width, group * c->head_dim, (group + 1) * c->head_dim, width};
    }
    int64_t q = c->heads * c->head_dim;
    return (head_layout){group, group * c->head_dim, q, q + c->kv_heads * c->head_dim, c->head_dim};
}

/* Norm and rotation of n consecutive heads. */
static void prepare_heads(const qllm_decoder *decoder, float *heads, int64_t n, int64_t position,
                          const qllm_weight *head_norm)
{
    const qllm_decoder_config *c = &decoder->config;
    int64_t half = c->rotary_dim / 2;
    for (int64_t h = 0; h < n; h++) {
        float *x = heads + h * c->head_dim;
        if (head_norm != NULL)
            decoder->ops->rms_norm(x, head_norm->values, c->head_dim, c->norm_eps, x);
        if (c->position == QLLM_POSITION_ROPE)
            decoder->ops->rope(x, decoder->rope.cos + position * half,
                               decoder->rope.sin + position * half, half);
    }
}

/* Queries and keys get their norm and position; keys and values are stored. */
static void place_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_decoder *d = p->decoder;
    head_layout at = layout_of(&d->config);
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        const qllm_step_row *row = &d->scratch.row[r];
        float *qkv = d->scratch.qkv + r * d->scratch.qkv_stride;
        for (int64_t g = 0; g < d->config.kv_heads; g++) {
            float *key = qkv + at.k + g * at.kv_group;
            prepare_heads(d, qkv + g * at.q_group, at.group, row->position,
                          p->part[QLLM_PART_Q_NORM]);
            prepare_heads(d, key, 1, row->position, p->part[QLLM_PART_K_NORM]);
            qllm_kv_store(&d->cache, row->block, p->layer, g, row->position, key,
                          qkv + at.v + g * at.kv_group);
        }
    }
}

/* The spans of positions [0, position] for one key-value head. */
static int64_t make_spans(const pass *p, const qllm_step_row *row, int64_t kv_head,
                          qllm_kv_span *spans)
{
    const qllm_kv_cache *cache = &p->decoder->cache;
    const qllm_kv_block **blocks = p->decoder->scratch.paths + row->path;
    int64_t count = 0;
    for (; count < row->path_length && blocks[count]->start <= row->position; count++) {
        const qllm_kv_block *block = blocks[count];
        bool last = count + 1 == row->path_length || blocks[count + 1]->start > row->position;
        int64_t end = last ? row->position + 1 : blocks[count + 1]->start;
        spans[count] = (qllm_kv_span){qllm_kv_keys(cache, block, p->layer, kv_head),
                                      qllm_kv_values(cache, block, p->layer, kv_head),
                                      end - block->start};
    }
    return count;
}

/* Query heads of one task of attention: some, so that many heads over one key-value head keep more
 * than one thread busy, and several times as many as share one reading of keys and values. */
enum { TASK_HEADS = 2 * QLLM_ATTENTION_HEADS };

static int64_t tasks_per_group(const head_layout *at, int64_t heads)
{
    return (at->group + heads - 1) / heads;
}

/* Row r, key-value head g, up to `most` of its query heads from `first` on; in buffer `place`. */
static qllm_attention task_of(const pass *p, const head_layout *at, int64_t r, int64_t g,
                              int64_t first, int64_t most, int64_t place)
{
    qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    qllm_scratch *s = &d->scratch;
    const qllm_step_row *row = &s->row[r];
    qllm_kv_span *spans = s->spans + place * s->spans_capacity;
    int64_t window = c->sliding_window != NULL ? c->sliding_window[p->layer] : 0;
    int64_t end = row->position + 1, head = g * at->group + first;
    bool alibi = c->position == QLLM_POSITION_ALIBI;
    return (qllm_attention){
        .q = s->qkv + r * s->qkv_stride + g * at->q_group + first * c->head_dim,
        .heads = at->group - first < most ? at->group - first : most,
        .head_dim = c->head_dim,
        .spans = spans,
        .n_spans = make_spans(p, row, g, spans),
        .begin = window > 0 && end > window ? end - window : 0,
        .end = end,
        .scale = c->attention_scale,
        .bias = alibi ? d->alibi.bias + head * d->alibi.capacity : NULL,
        .bias_stride = d->alibi.capacity,
        .scores = s->scores + place * s->scores_capacity,
        .out = s->attended + r * s->heads_stride + head * c->head_dim,
    };
}

/* Tasks are (row, key-value head, some of its query heads), taken from both ends in turn: later
 * rows of a prompt see more positions, and so every contiguous part of the tasks has about the same
 * work. */
static void attend_tasks(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    head_layout at = layout_of(&p->decoder->config);
    int64_t each = tasks_per_group(&at, TASK_HEADS), row = p->decoder->config.kv_heads * each;
    int64_t tasks = p->n * row;
    for (int64_t i = begin; i < end; i++) {
        int64_t task = i % 2 == 0 ? i / 2 : tasks - 1 - i / 2;
        qllm_attention args = task_of(p, &at, task / row, task % row / each,
                                      task % each * TASK_HEADS, TASK_HEADS, thread);
        p->decoder->ops->attention(&args);
    }
}

/* Fewer tasks of attention than threads, over many positions: each task is shared by all threads,
 * in parts that change nothing in its sums.  There is a buffer for every thread, so for every
 * task. */
typedef struct shared_tasks {
    const qllm_cpu_ops *ops;
    const qllm_attention *tasks;
    int64_t parts; /* of each task */
} shared_tasks;

static void share_scores(void *context, int64_t begin, int64_t end, int thread)
{
    const shared_tasks *shared = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const qllm_attention *task = &shared->tasks[i / shared->parts];
        int64_t part = i % shared->parts, spans = task->n_spans;
        shared->ops->attention_scores(task, spans * part / shared->parts,
                                      spans * (part + 1) / shared->parts);
    }
}

static void share_weights(void *context, int64_t begin, int64_t end, int thread)
{
    const shared_tasks *shared = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const qllm_attention *task = &shared->tasks[i / QLLM_ATTENTION_HEADS];
        if (i % QLLM_ATTENTION_HEADS < task->heads)
            shared->ops->attention_weights(task, i % QLLM_ATTENTION_HEADS);
    }
}

static void share_values(void *context, int64_t begin, int64_t end, int thread)
{
    const shared_tasks *shared = context;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const qllm_attention *task = &shared->tasks[i / shared->parts];
        int64_t part = i % shared->parts, vectors = (task->head_dim + 15) / 16;
        shared->ops->attention_values(task, vectors * part / shared->parts,
                                      vectors * (part + 1) / shared->parts);
    }
}

static void attend_shared(pass *p, const head_layout *at)
{
    qllm_decoder *d = p->decoder;
    int64_t each = tasks_per_group(at, QLLM_ATTENTION_HEADS), row = d->config.kv_heads * each;
    int64_t n = p->n * row;
    shared_tasks shared = {d->ops, d->scratch.tasks, qllm_threads_count(d->threads)};
    for (int64_t i = 0; i < n; i++)
        d->scratch.tasks[i] = task_of(p, at, i / row, i % row / each,
                                      i % each * QLLM_ATTENTION_HEADS, QLLM_ATTENTION_HEADS, i);
    qllm_threads_run(d->threads, n * shared.parts, share_scores, &shared);
    qllm_threads_run(d->threads, n * QLLM_ATTENTION_HEADS, share_weights, &shared);
    qllm_threads_run(d->threads, n * shared.parts, share_values, &shared);
}

/* Positions above which three jobs cost less than idle threads. */
enum { SHARED_POSITIONS = 1024 };

static void attend_rows(pass *p)
{
    const qllm_decoder_config *c = &p->decoder->config;
    const head_layout at = layout_of(c);
    int64_t tasks = p->n * c->kv_heads * tasks_per_group(&at, QLLM_ATTENTION_HEADS);
    if (tasks < qllm_threads_count(p->decoder->threads) && p->positions > p->n * SHARED_POSITIONS)
        attend_shared(p, &at);
    else
        run(p, p->n * c->kv_heads * tasks_per_group(&at, TASK_HEADS),
            p->positions * p->decoder->scratch.heads_stride, attend_tasks);
}

static void attention(pass *p)
{
    qllm_decoder *d = p->decoder;
    qllm_scratch *s = &d->scratch;
    const head_layout at = layout_of(&d->config);
    const float *x = s->normed;
    if (d->config.fused_qkv) {
        linear(p, p->part[QLLM_PART_QKV], x, p->n, s->hidden_stride, s->qkv, s->qkv_stride);
    } else {
        const qllm_linear_part parts[] = {
            part(p->part[QLLM_PART_Q], s->qkv, s->qkv_stride),
            part(p->part[QLLM_PART_K], s->qkv + at.k, s->qkv_stride),
            part(p->part[QLLM_PART_V], s->qkv + at.v, s->qkv_stride),
        };
        linears(p, parts, 3, x, p->n, s->hidden_stride);
    }
    run_rows(p, s->qkv_stride, place_rows);
    attend_rows(p);
    linear(p, p->part[QLLM_PART_O], s->attended, p->n, s->heads_stride, s->branch,
           s->hidden_stride);
}

static void activate_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    int64_t n = p->decoder->config.intermediate;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        float *up = s->up + r * s->mlp_stride;
        if (p->decoder->config.gated)
            p->act(s->gate + r * s->mlp_stride, up, n, s->gate + r * s->mlp_stride);
        else
            p->act(up, NULL, n, up);
    }
}

/* branch2 = mlp(x) */
static void mlp(pass *p, const float *x)
{
    qllm_scratch *s = &p->decoder->scratch;
    bool gated = p->decoder->config.gated;
    const qllm_linear_part up = part(p->part[QLLM_PART_UP], s->up, s->mlp_stride);
    if (gated) {
        const qllm_linear_part both[] = {part(p->part[QLLM_PART_GATE], s->gate, s->mlp_stride), up};
        linears(p, both, 2, x, p->n, s->hidden_stride);
    } else
        linears(p, &up, 1, x, p->n, s->hidden_stride);
    run_rows(p, s->mlp_stride, activate_rows);
    linear(p, p->part[QLLM_PART_DOWN], gated ? s->gate : s->up, p->n, s->mlp_stride, s->branch2,
           s->hidden_stride);
}

/* Serial: x += attention, then the norm before the mlp. */
static void add_attention_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * s->hidden_stride;
        p->decoder->ops->add(s->branch + at, p->decoder->config.hidden, s->x + at);
        norm(p->decoder, s->x + at, p->part[QLLM_PART_MLP_NORM], p->part[QLLM_PART_MLP_NORM_BIAS],
             s->normed + at);
    }
}

/* Serial: x += mlp.  Parallel: x += attention + mlp. */
static void add_mlp_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    const qllm_decoder_config *c = &p->decoder->config;
    (void)thread;
    for (int64_t r = begin; r < end; r++) {
        int64_t at = r * s->hidden_stride;
        if (c->block != QLLM_BLOCK_SERIAL)
            p->decoder->ops->add(s->branch + at, c->hidden, s->branch2 + at);
        p->decoder->ops->add(s->branch2 + at, c->hidden, s->x + at);
    }
}

static void layer(pass *p, int64_t index)
{
    const qllm_decoder *d = p->decoder;
    p->layer = index;
    for (int part = 0; part < QLLM_PART_COUNT; part++) {
        int64_t slot = qllm_slot_of_part(&d->config, index, (qllm_part)part);
        p->part[part] = slot < 0 ? NULL : &d->weights.slots[slot];
    }
    run_rows(p, d->config.hidden, norm_rows);
    attention(p);
    if (d->config.block == QLLM_BLOCK_SERIAL)
        run_rows(p, d->config.hidden, add_attention_rows);
    mlp(p, d->config.block == QLLM_BLOCK_PARALLEL2 ? d->scratch.normed2 : d->scratch.normed);
    run_rows(p, d->config.hidden, add_mlp_rows);
}

/* The final norm of wanted rows, moved together. */
static void final_norm_rows(void *context, int64_t begin, int64_t end, int thread)
{
    const pass *p = context;
    qllm_scratch *s = &p->decoder->scratch;
    (void)thread;
    for (int64_t r = begin; r < end; r++)
        if (s->row[r].wanted >= 0)
            norm(p->decoder, s->x + r * s->hidden_stride, p->final_norm, p->final_norm_bias,
                 s->normed + (s->row[r].wanted - p->first_wanted) * s->hidden_stride);
}

static void head(pass *p, float *logits)
{
    const qllm_decoder *d = p->decoder;
    const qllm_decoder_config *c = &d->config;
    const qllm_scratch *s = &d->scratch;
    int64_t wanted = 0, bias = qllm_slot_of_final_norm_bias(c);
    for (int64_t r = p->n; r-- > 0;)
        if (s->row[r].wanted >= 0) {
            p->first_wanted = s->row[r].wanted;
            wanted++;
        }
    if (wanted == 0)
        return;
    p->final_norm = &d->weights.slots[qllm_slot_of_final_norm(c)];
    p->final_norm_bias = bias < 0 ? NULL : &d->weights.slots[bias];
    run_rows(p, c->hidden, final_norm_rows);
    linear(p, &d->weights.slots[qllm_slot_of_head(c)], s->normed, wanted, s->hidden_stride,
           logits + p->first_wanted * c->vocab, c->vocab);
}

static pass begin(qllm_decoder *decoder, int64_t n)
{
    const activation acts[] = {decoder->ops->silu, decoder->ops->gelu, decoder->ops->gelu_tanh};
    return (pass){.decoder = decoder, .n = n, .act = acts[decoder->config.activation]};
}

static void layers(pass *p)
{
    const qllm_decoder *d = p->decoder;
    for (int64_t r = 0; r < p->n; r++)
        p->positions += d->scratch.row[r].position + 1;
    for (int64_t i = 0; i < d->config.layers; i++)
        layer(p, i);
}

void qllm_forward(qllm_decoder *decoder, int64_t n, float *logits)
{
    pass p = begin(decoder, n);
    run_rows(&p, decoder->config.hidden, embed_rows);
    layers(&p);
    head(&p, logits);
}

/* The residual stream from rows without gaps between them. */
static void take_hidden(qllm_scratch *s, const float *hidden, int64_t width, int64_t n)
{
    for (int64_t r = 0; r < n; r++)
        memcpy(s->x + r * s->hidden_stride, hidden + r * width, (size_t)width * sizeof(float));
}

void qllm_forward_blocks(qllm_decoder *decoder, int64_t n, float *hidden)
{
    const qllm_scratch *s = &decoder->scratch;
    int64_t width = decoder->config.hidden;
    pass p = begin(decoder, n);
    take_hidden(&decoder->scratch, hidden, width, n);
    layers(&p);
    for (int64_t r = 0; r < n; r++)
        memcpy(hidden + r * width, s->x + r * s->hidden_stride, (size_t)width * sizeof(float));
}

void qllm_forward_head(qllm_decoder *decoder, const float *hidden, int64_t n, float *logits)
{
    pass p = begin(decoder, n);
    take_hidden(&decoder->scratch, hidden, decoder->config.hidden, n);
    for (int64_t r = 0; r < n; r++)
        decoder->scratch.row[r].wanted = r;
    head(&p, logits);
}
