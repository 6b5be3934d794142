/* decoder.c - what is kept: a layer that backward enters keeps its input and, unless it is recomputed, every product of its own. Layers below
 * the lowest one that trains (all of them when nothing does) share two buffers. What costs a pass over memory to have again (normed rows, the
 * activation) is not kept: a quarter of the activations of a layer. Rows that nobody asks for are left after the last layer's attention: with 64 labels
 * behind 576 image tokens that is nine tenths of its MLP. */
#include "model/decoder.h"

#include "ops/activation.h"
#include "ops/rmsnorm.h"
#include "ops/rope.h"
#include "ops/rows.h"

#include <string.h>

typedef struct layer {
    stv_stored input_norm, post_norm;
    real *dinput_norm, *dpost_norm;
    stv_linear q, k, v, o, gate, up, down;
} layer;

static layer resolve(const stv_weights *w, int64_t i_layer)
{
    const stv_decoder_layer *l = &w->model->decoder.layers[i_layer];
    return (layer){
        .input_norm = stv_weight(w, l->input_norm),
        .dinput_norm = stv_weight_grad(w, l->input_norm),
        .post_norm = stv_weight(w, l->post_norm),
        .dpost_norm = stv_weight_grad(w, l->post_norm),
        .q = stv_weights_linear(w, l->q),
        .k = stv_weights_linear(w, l->k),
        .v = stv_weights_linear(w, l->v),
        .o = stv_weights_linear(w, l->o),
        .gate = stv_weights_linear(w, l->gate),
        .up = stv_weights_linear(w, l->up),
        .down = stv_weights_linear(w, l->down),
    };
}

static bool trains(const layer *l)
{
    return l->dinput_norm || l->dpost_norm || stv_linear_trains(&l->q) || stv_linear_trains(&l->k) || stv_linear_trains(&l->v) ||
           stv_linear_trains(&l->o) || stv_linear_trains(&l->gate) || stv_linear_trains(&l->up) || stv_linear_trains(&l->down);
}

static const stv_decoder_config *config_of(const stv_decoder_pass *pass) { return &pass->weights->model->config.decoder; }

static stv_attn_shape shape_of(const stv_decoder_config *c) { return (stv_attn_shape){c->n_heads, c->n_kv_heads, c->head_dim}; }

static void put_rows(stv_exec *x, real *to, const real *from, const int64_t *row, int64_t n, int64_t width)
{
    if (stv_measuring(x)) return;
    for (int64_t i = 0; i < n; i++) memcpy(to + (row ? row[i] : i) * width, from + i * width, (size_t)width * sizeof(real));
}

/* Where attention finds keys and values: with the layer, or in its part of the cache. */
static void keep_keys(stv_exec *x, const stv_decoder_pass *pass, int64_t i_layer, stv_decoder_saved *s)
{
    const stv_decoder_cache *cache = pass->cache;
    if (!cache) return;
    int64_t width = config_of(pass)->n_kv_heads * config_of(pass)->head_dim, first = i_layer * cache->n_rows * width;
    put_rows(x, cache->k + first, s->k, cache->row, pass->n_rows, width);
    put_rows(x, cache->v + first, s->v, cache->row, pass->n_rows, width);
    s->k = cache->k + first;
    s->v = cache->v + first;
}

/* ---- one layer, until its attention -------------------------------------------------------------------------------------- */

static void attend(stv_exec *x, const stv_decoder_pass *pass, int64_t i_layer, const layer *l, stv_decoder_saved *s)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t R = pass->n_rows, D = c->hidden_size;
    s->rstd1 = stv_reals(x, R, 1);
    s->q = stv_reals(x, R, l->q.n_out);
    s->k = stv_reals(x, R, l->k.n_out);
    s->v = stv_reals(x, R, l->v.n_out);
    s->attn = i_layer == c->n_layers - 1 ? pass->last_attn : stv_reals(x, R, l->q.n_out);
    s->lse = stv_reals(x, R, c->n_heads);
    s->u_q = stv_lora_reals(x, R, &l->q);
    s->u_k = stv_lora_reals(x, R, &l->k);
    s->u_v = stv_lora_reals(x, R, &l->v);
    size_t mark = stv_arena_mark(x->arena);
    real *normed = stv_reals(x, R, D);
    stv_rmsnorm_forward(x, normed, s->rstd1, s->in, l->input_norm, R, D, c->rms_norm_eps);
    stv_linear_forward(x, s->q, s->u_q, normed, &l->q, R, pass->dropout);
    stv_linear_forward(x, s->k, s->u_k, normed, &l->k, R, pass->dropout);
    stv_linear_forward(x, s->v, s->u_v, normed, &l->v, R, pass->dropout);
    stv_rope_forward(x, s->q, pass->angles, R, c->n_heads, c->head_dim);
    stv_rope_forward(x, s->k, pass->angles, R, c->n_kv_heads, c->head_dim);
    keep_keys(x, pass, i_layer, s);
    stv_attention_forward(x, s->attn, s->lse, s->q, s->k, s->v, pass->plan, shape_of(c));
    stv_arena_release(x->arena, mark);
}

/* d (R,D): gradient of the residual stream, dattn (R,heads,head_dim) of what attention returned; d becomes the gradient of the layer's input, if
 * input_grad. */
static void attend_backward(stv_exec *x, real *d, const real *dattn, const stv_decoder_pass *pass, const layer *l, const stv_decoder_saved *s,
                            bool input_grad)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t R = pass->n_rows, D = c->hidden_size;
    size_t mark = stv_arena_mark(x->arena);
    real *dq = stv_reals(x, R, l->q.n_out), *dk = stv_reals(x, R, l->k.n_out), *dv = stv_reals(x, R, l->v.n_out);
    real *dnormed = stv_reals(x, R, D), *normed = stv_reals(x, R, D);
    stv_attn_saved saved = {s->q, s->k, s->v, s->attn, s->lse};
    stv_attention_backward(x, dq, dk, dv, dattn, &saved, pass->plan, shape_of(c), R);
    stv_rope_backward(x, dk, pass->angles, R, c->n_kv_heads, c->head_dim);
    stv_rope_backward(x, dq, pass->angles, R, c->n_heads, c->head_dim);
    real *din = input_grad || l->dinput_norm ? dnormed : NULL;
    if (stv_linear_trains(&l->q) || stv_linear_trains(&l->k) || stv_linear_trains(&l->v))
        stv_rmsnorm_forward(x, normed, s->rstd1, s->in, l->input_norm, R, D, c->rms_norm_eps);
    stv_linear_backward(x, din, dv, normed, s->u_v, &l->v, R, pass->dropout);
    stv_linear_backward_add(x, din, dk, normed, s->u_k, &l->k, R, pass->dropout);
    stv_linear_backward_add(x, din, dq, normed, s->u_q, &l->q, R, pass->dropout);
    if (din) stv_rmsnorm_backward_add(x, d, l->dinput_norm, dnormed, s->in, l->input_norm, s->rstd1, R, D);
    stv_arena_release(x->arena, mark);
}

/* ---- one layer, after its attention -------------------------------------------------------------------------------------- */

/* The rows that go on: all of a layer's, or those that somebody wants of the last. */
typedef struct onward {
    int64_t n;
    const real *in, *attn; /* (n,D), (n, heads, head_dim) */
    const stv_dropout *dropout;
    stv_dropout of_rows; /* that of picked rows; `dropout` may point here, so an onward does not move */
} onward;

static void all_rows(onward *rows, const stv_decoder_pass *pass, const stv_decoder_saved *s)
{
    *rows = (onward){.n = pass->n_rows, .in = s->in, .attn = s->attn, .dropout = pass->dropout};
}

/* Of the last layer. */
static void pick_rows(stv_exec *x, onward *rows, const stv_decoder_pass *pass, const int64_t *row, int64_t n)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t D = c->hidden_size, q_size = c->n_heads * c->head_dim;
    real *in = stv_reals(x, n, D), *attn = stv_reals(x, n, q_size);
    stv_gather_rows(x, in, pass->layers[c->n_layers - 1].in, row, n, D);
    stv_gather_rows(x, attn, pass->last_attn, row, n, q_size);
    *rows = (onward){.n = n, .in = in, .attn = attn};
    if (!pass->dropout) return;
    uint64_t *sample = stv_arena_alloc(x->arena, (size_t)n * sizeof *sample);
    int32_t *position = stv_arena_alloc(x->arena, (size_t)n * sizeof *position);
    for (int64_t i = 0; i < n && !stv_measuring(x); i++) {
        sample[i] = pass->dropout->row_sample[row[i]];
        position[i] = pass->dropout->row_position[row[i]];
    }
    rows->of_rows = (stv_dropout){pass->dropout->seed, pass->dropout->step, sample, position};
    rows->dropout = &rows->of_rows;
}

static void go_on_reserve(stv_exec *x, const stv_decoder_pass *pass, const layer *l, stv_decoder_saved *s, int64_t n)
{
    const stv_decoder_config *c = config_of(pass);
    s->mid = stv_reals(x, n, c->hidden_size);
    s->rstd2 = stv_reals(x, n, 1);
    s->gate = stv_reals(x, n, c->intermediate_size);
    s->up = stv_reals(x, n, c->intermediate_size);
    s->u_o = stv_lora_reals(x, n, &l->o);
    s->u_gate = stv_lora_reals(x, n, &l->gate);
    s->u_up = stv_lora_reals(x, n, &l->up);
    s->u_down = stv_lora_reals(x, n, &l->down);
}

/* out (n,D); NULL: only what backward needs (a layer computed again). */
static void go_on(stv_exec *x, real *out, const stv_decoder_pass *pass, const layer *l, stv_decoder_saved *s, const onward *rows)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t n = rows->n, D = c->hidden_size, F = c->intermediate_size;
    size_t mark = stv_arena_mark(x->arena);
    real *normed = stv_reals(x, n, D), *act = stv_reals(x, n, F);
    stv_linear_forward(x, s->mid, s->u_o, rows->attn, &l->o, n, rows->dropout);
    stv_add(x, s->mid, s->mid, rows->in, n * D);
    stv_rmsnorm_forward(x, normed, s->rstd2, s->mid, l->post_norm, n, D, c->rms_norm_eps);
    stv_linear_forward(x, s->gate, s->u_gate, normed, &l->gate, n, rows->dropout);
    stv_linear_forward(x, s->up, s->u_up, normed, &l->up, n, rows->dropout);
    stv_swiglu_forward(x, act, s->gate, s->up, n * F);
    if (out) {
        stv_linear_forward(x, out, s->u_down, act, &l->down, n, rows->dropout);
        stv_add(x, out, out, s->mid, n * D);
    } else {
        stv_linear_forward_u(x, s->u_down, act, &l->down, n, rows->dropout);
    }
    stv_arena_release(x->arena, mark);
}

/* d (n,D): gradient of the layer's output, becomes that of the residual stream. dattn (n,heads,head_dim). */
static void go_on_backward(stv_exec *x, real *dattn, real *d, const stv_decoder_pass *pass, const layer *l, const stv_decoder_saved *s,
                           const onward *rows)
{
    int64_t n = rows->n, D = config_of(pass)->hidden_size, F = config_of(pass)->intermediate_size;
    size_t mark = stv_arena_mark(x->arena);
    real *dnormed = stv_reals(x, n, D), *normed = stv_reals(x, n, D);
    real *dact = stv_reals(x, n, F), *dgate = stv_reals(x, n, F), *dup = stv_reals(x, n, F);
    real *act = dgate; /* until swiglu_backward */
    if (stv_linear_trains(&l->down)) stv_swiglu_forward(x, act, s->gate, s->up, n * F);
    stv_linear_backward(x, dact, d, act, s->u_down, &l->down, n, rows->dropout);
    stv_swiglu_backward(x, dgate, dup, dact, s->gate, s->up, n * F);
    if (stv_linear_trains(&l->up) || stv_linear_trains(&l->gate))
        stv_rmsnorm_forward(x, normed, s->rstd2, s->mid, l->post_norm, n, D, config_of(pass)->rms_norm_eps);
    stv_linear_backward(x, dnormed, dup, normed, s->u_up, &l->up, n, rows->dropout);
    stv_linear_backward_add(x, dnormed, dgate, normed, s->u_gate, &l->gate, n, rows->dropout);
    stv_rmsnorm_backward_add(x, d, l->dpost_norm, dnormed, s->mid, l->post_norm, s->rstd2, n, D);
    stv_linear_backward(x, dattn, d, rows->attn, s->u_o, &l->o, n, rows->dropout);
    stv_arena_release(x->arena, mark);
}

/* ---- the stack ----------------------------------------------------------------------------------------------------------- */

static int64_t find_lowest(const stv_decoder_pass *pass)
{
    int64_t n_layers = config_of(pass)->n_layers, i = 0;
    if (pass->input_grad) return 0;
    while (i < n_layers) {
        const layer l = resolve(pass->weights, i);
        if (trains(&l)) break;
        i++;
    }
    return i;
}

/* Whether the layer's rows are not all wanted. */
static bool picks(const stv_decoder_pass *pass, int64_t i_layer) { return pass->out_row && i_layer == config_of(pass)->n_layers - 1; }

/* out: (R,D), or (n_out,D) where the pass picks rows; NULL: only what backward needs. */
static void layer_forward(stv_exec *x, real *out, const stv_decoder_pass *pass, int64_t i_layer)
{
    const layer l = resolve(pass->weights, i_layer);
    stv_decoder_saved *s = &pass->layers[i_layer];
    onward rows;
    attend(x, pass, i_layer, &l, s);
    go_on_reserve(x, pass, &l, s, picks(pass, i_layer) ? pass->n_out : pass->n_rows);
    size_t mark = stv_arena_mark(x->arena);
    if (picks(pass, i_layer)) pick_rows(x, &rows, pass, pass->out_row, pass->n_out);
    else all_rows(&rows, pass, s);
    go_on(x, out, pass, &l, s, &rows);
    stv_arena_release(x->arena, mark);
}

/* d (R,D): gradient of the layer's output, becomes that of its input. Where the pass picks rows, the former is dout (n_out,D), overwritten. */
static void layer_backward(stv_exec *x, real *d, real *dout, const stv_decoder_pass *pass, int64_t i_layer)
{
    const layer l = resolve(pass->weights, i_layer);
    const stv_decoder_saved *s = &pass->layers[i_layer];
    int64_t R = pass->n_rows, D = config_of(pass)->hidden_size, q_size = l.q.n_out;
    size_t mark = stv_arena_mark(x->arena);
    onward rows;
    real *dattn = stv_reals(x, R, q_size);
    if (picks(pass, i_layer)) {
        size_t picked_mark = stv_arena_mark(x->arena);
        real *dpicked = stv_reals(x, pass->n_out, q_size);
        pick_rows(x, &rows, pass, pass->out_row, pass->n_out);
        go_on_backward(x, dpicked, dout, pass, &l, s, &rows);
        stv_zero(x, dattn, R * q_size);
        stv_zero(x, d, R * D);
        stv_scatter_add_rows(x, dattn, dpicked, pass->out_row, pass->n_out, q_size);
        stv_scatter_add_rows(x, d, dout, pass->out_row, pass->n_out, D);
        stv_arena_release(x->arena, picked_mark);
    } else {
        all_rows(&rows, pass, s);
        go_on_backward(x, dattn, d, pass, &l, s, &rows);
    }
    attend_backward(x, d, dattn, pass, &l, s, i_layer > pass->lowest || pass->input_grad);
    stv_arena_release(x->arena, mark);
}

const real *stv_decoder_forward(stv_exec *x, stv_decoder_pass *pass, const real *in)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t R = pass->n_rows, D = c->hidden_size, last = c->n_layers - 1;
    pass->lowest = find_lowest(pass);
    pass->angles = stv_reals(x, R, c->head_dim);
    pass->last_attn = stv_reals(x, R, c->n_heads * c->head_dim);
    stv_rope_angles(x, pass->angles, pass->position, R, c->head_dim, c->rope_theta);
    real *shared[2] = {NULL, NULL};
    for (int i = 0; i < 2 && i + 1 < pass->lowest; i++) shared[i] = stv_reals(x, R, D);
    for (int64_t i = 0; i <= last; i++) {
        real *out = i + 1 < pass->lowest ? shared[i % 2] : stv_reals(x, picks(pass, i) ? pass->n_out : R, D);
        size_t mark = stv_arena_mark(x->arena);
        pass->layers[i].in = in;
        layer_forward(x, out, pass, i);
        if (i < pass->lowest || i < pass->n_recompute) stv_arena_release(x->arena, mark);
        in = out;
    }
    return in;
}

const real *stv_decoder_more_rows(stv_exec *x, const stv_decoder_pass *pass, const int64_t *row, int64_t n)
{
    const layer l = resolve(pass->weights, config_of(pass)->n_layers - 1);
    real *out = stv_reals(x, n, config_of(pass)->hidden_size);
    size_t mark = stv_arena_mark(x->arena);
    stv_decoder_saved unused;
    onward rows;
    pick_rows(x, &rows, pass, row, n);
    go_on_reserve(x, pass, &l, &unused, n);
    go_on(x, out, pass, &l, &unused, &rows);
    stv_arena_release(x->arena, mark);
    return out;
}

void stv_decoder_backward(stv_exec *x, const stv_decoder_pass *pass, real *d, real *dout)
{
    for (int64_t i = config_of(pass)->n_layers - 1; i >= pass->lowest; i--) {
        size_t mark = stv_arena_mark(x->arena);
        if (i < pass->n_recompute) layer_forward(x, NULL, pass, i);
        layer_backward(x, d, dout, pass, i);
        stv_arena_release(x->arena, mark);
    }
}

/* ---- the head ------------------------------------------------------------------------------------------------------------ */

void stv_decoder_head_forward(stv_exec *x, stv_decoder_head *head, const stv_weights *weights, const real *stream)
{
    const stv_decoder_config *c = &weights->model->config.decoder;
    real *in = head->row ? stv_reals(x, head->n, c->hidden_size) : NULL;
    if (in) stv_gather_rows(x, in, stream, head->row, head->n, c->hidden_size);
    head->in = in ? in : stream;
    head->rstd = stv_reals(x, head->n, 1);
    head->h = stv_reals(x, head->n, c->hidden_size);
    stv_rmsnorm_forward(x, head->h, head->rstd, head->in, stv_weight(weights, weights->model->decoder.norm), head->n, c->hidden_size,
                        c->rms_norm_eps);
}

void stv_decoder_head_backward(stv_exec *x, real *dstream, const real *dh, const stv_decoder_head *head, const stv_weights *weights)
{
    int64_t D = weights->model->config.decoder.hidden_size;
    int norm = weights->model->decoder.norm;
    size_t mark = stv_arena_mark(x->arena);
    real *din = stv_reals(x, head->n, D);
    stv_zero(x, din, head->n * D);
    stv_rmsnorm_backward_add(x, din, stv_weight_grad(weights, norm), dh, head->in, stv_weight(weights, norm), head->rstd, head->n, D);
    stv_scatter_add_rows(x, dstream, din, head->row, head->n, D);
    stv_arena_release(x->arena, mark);
}
