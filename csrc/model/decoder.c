/* decoder.c - what is kept: a layer that backward enters keeps its input and, unless it is recomputed, every product of its own. Layers below
 * the lowest one that trains (all of them when nothing does) share two buffers. What costs a pass over memory to have again (normed rows, the
 * activation) is not kept: a quarter of the activations of a layer. */
#include "model/decoder.h"

#include "ops/activation.h"
#include "ops/rmsnorm.h"
#include "ops/rope.h"
#include "ops/rows.h"

#include <string.h>

typedef struct layer {
    const real *input_norm, *post_norm;
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

/* ---- one layer ----------------------------------------------------------------------------------------------------------- */

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

/* out (R,D); NULL: only what backward needs (a layer computed again). */
static void layer_forward(stv_exec *x, real *out, const stv_decoder_pass *pass, int64_t i_layer, stv_decoder_saved *s)
{
    const stv_decoder_config *c = config_of(pass);
    const layer l = resolve(pass->weights, i_layer);
    int64_t R = pass->n_rows, D = c->hidden_size, F = c->intermediate_size, q_size = l.q.n_out, kv_size = l.k.n_out;
    s->rstd1 = stv_reals(x, R, 1);
    s->q = stv_reals(x, R, q_size);
    s->k = stv_reals(x, R, kv_size);
    s->v = stv_reals(x, R, kv_size);
    s->attn = stv_reals(x, R, q_size);
    s->lse = stv_reals(x, R, c->n_heads);
    s->mid = stv_reals(x, R, D);
    s->rstd2 = stv_reals(x, R, 1);
    s->gate = stv_reals(x, R, F);
    s->up = stv_reals(x, R, F);
    s->u_q = stv_lora_reals(x, R, &l.q);
    s->u_k = stv_lora_reals(x, R, &l.k);
    s->u_v = stv_lora_reals(x, R, &l.v);
    s->u_o = stv_lora_reals(x, R, &l.o);
    s->u_gate = stv_lora_reals(x, R, &l.gate);
    s->u_up = stv_lora_reals(x, R, &l.up);
    s->u_down = stv_lora_reals(x, R, &l.down);
    size_t mark = stv_arena_mark(x->arena);
    real *normed = stv_reals(x, R, D), *act = stv_reals(x, R, F);

    stv_rmsnorm_forward(x, normed, s->rstd1, s->in, l.input_norm, R, D, c->rms_norm_eps);
    stv_linear_forward(x, s->q, s->u_q, normed, &l.q, R, pass->dropout);
    stv_linear_forward(x, s->k, s->u_k, normed, &l.k, R, pass->dropout);
    stv_linear_forward(x, s->v, s->u_v, normed, &l.v, R, pass->dropout);
    stv_rope_forward(x, s->q, pass->angles, R, c->n_heads, c->head_dim);
    stv_rope_forward(x, s->k, pass->angles, R, c->n_kv_heads, c->head_dim);
    keep_keys(x, pass, i_layer, s);
    stv_attention_forward(x, s->attn, s->lse, s->q, s->k, s->v, pass->plan, shape_of(c));
    stv_linear_forward(x, s->mid, s->u_o, s->attn, &l.o, R, pass->dropout);
    stv_add(x, s->mid, s->mid, s->in, R * D);

    stv_rmsnorm_forward(x, normed, s->rstd2, s->mid, l.post_norm, R, D, c->rms_norm_eps);
    stv_linear_forward(x, s->gate, s->u_gate, normed, &l.gate, R, pass->dropout);
    stv_linear_forward(x, s->up, s->u_up, normed, &l.up, R, pass->dropout);
    stv_swiglu_forward(x, act, s->gate, s->up, R * F);
    if (out) {
        stv_linear_forward(x, out, s->u_down, act, &l.down, R, pass->dropout);
        stv_add(x, out, out, s->mid, R * D);
    } else {
        stv_linear_forward_u(x, s->u_down, act, &l.down, R, pass->dropout);
    }
    stv_arena_release(x->arena, mark);
}

/* d (R,D): gradient of the layer's output; becomes the gradient of its input, if input_grad. */
static void layer_backward(stv_exec *x, real *d, const stv_decoder_pass *pass, int64_t i_layer, bool input_grad)
{
    const stv_decoder_config *c = config_of(pass);
    const stv_decoder_saved *s = &pass->layers[i_layer];
    const layer l = resolve(pass->weights, i_layer);
    int64_t R = pass->n_rows, D = c->hidden_size, F = c->intermediate_size, q_size = l.q.n_out, kv_size = l.k.n_out;
    size_t mark = stv_arena_mark(x->arena);
    real *dnormed = stv_reals(x, R, D), *normed = stv_reals(x, R, D);

    size_t mlp_mark = stv_arena_mark(x->arena);
    real *dact = stv_reals(x, R, F), *dgate = stv_reals(x, R, F), *dup = stv_reals(x, R, F);
    real *act = dgate; /* until swiglu_backward */
    if (stv_linear_trains(&l.down)) stv_swiglu_forward(x, act, s->gate, s->up, R * F);
    stv_linear_backward(x, dact, d, act, s->u_down, &l.down, R, pass->dropout);
    stv_swiglu_backward(x, dgate, dup, dact, s->gate, s->up, R * F);
    if (stv_linear_trains(&l.up) || stv_linear_trains(&l.gate)) stv_rmsnorm_forward(x, normed, s->rstd2, s->mid, l.post_norm, R, D, c->rms_norm_eps);
    stv_linear_backward(x, dnormed, dup, normed, s->u_up, &l.up, R, pass->dropout);
    stv_linear_backward_add(x, dnormed, dgate, normed, s->u_gate, &l.gate, R, pass->dropout);
    stv_rmsnorm_backward_add(x, d, l.dpost_norm, dnormed, s->mid, l.post_norm, s->rstd2, R, D);
    stv_arena_release(x->arena, mlp_mark);

    real *dattn = stv_reals(x, R, q_size), *dq = stv_reals(x, R, q_size), *dk = stv_reals(x, R, kv_size), *dv = stv_reals(x, R, kv_size);
    stv_attn_saved saved = {s->q, s->k, s->v, s->attn, s->lse};
    stv_linear_backward(x, dattn, d, s->attn, s->u_o, &l.o, R, pass->dropout);
    stv_attention_backward(x, dq, dk, dv, dattn, &saved, pass->plan, shape_of(c), R);
    stv_rope_backward(x, dk, pass->angles, R, c->n_kv_heads, c->head_dim);
    stv_rope_backward(x, dq, pass->angles, R, c->n_heads, c->head_dim);
    real *din = input_grad || l.dinput_norm ? dnormed : NULL;
    if (stv_linear_trains(&l.q) || stv_linear_trains(&l.k) || stv_linear_trains(&l.v))
        stv_rmsnorm_forward(x, normed, s->rstd1, s->in, l.input_norm, R, D, c->rms_norm_eps);
    stv_linear_backward(x, din, dv, normed, s->u_v, &l.v, R, pass->dropout);
    stv_linear_backward_add(x, din, dk, normed, s->u_k, &l.k, R, pass->dropout);
    stv_linear_backward_add(x, din, dq, normed, s->u_q, &l.q, R, pass->dropout);
    if (din) stv_rmsnorm_backward_add(x, d, l.dinput_norm, dnormed, s->in, l.input_norm, s->rstd1, R, D);
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

real *stv_decoder_forward(stv_exec *x, stv_decoder_pass *pass, real *in)
{
    const stv_decoder_config *c = config_of(pass);
    int64_t R = pass->n_rows, D = c->hidden_size;
    pass->lowest = find_lowest(pass);
    pass->angles = stv_reals(x, R, c->head_dim);
    stv_rope_angles(x, pass->angles, pass->position, R, c->head_dim, c->rope_theta);
    real *shared[2] = {NULL, NULL};
    for (int i = 0; i < 2 && i + 1 < pass->lowest; i++) shared[i] = stv_reals(x, R, D);
    for (int64_t i = 0; i < c->n_layers; i++) {
        real *out = i + 1 < pass->lowest ? shared[i % 2] : stv_reals(x, R, D);
        size_t mark = stv_arena_mark(x->arena);
        pass->layers[i].in = in;
        layer_forward(x, out, pass, i, &pass->layers[i]);
        if (i < pass->lowest || i < pass->n_recompute) stv_arena_release(x->arena, mark);
        in = out;
    }
    return in;
}

void stv_decoder_backward(stv_exec *x, const stv_decoder_pass *pass, real *dh)
{
    for (int64_t i = config_of(pass)->n_layers - 1; i >= pass->lowest; i--) {
        size_t mark = stv_arena_mark(x->arena);
        if (i < pass->n_recompute) layer_forward(x, NULL, pass, i, &pass->layers[i]);
        layer_backward(x, dh, pass, i, i > pass->lowest || pass->input_grad);
        stv_arena_release(x->arena, mark);
    }
}

/* ---- the head ------------------------------------------------------------------------------------------------------------ */

void stv_decoder_head_forward(stv_exec *x, stv_decoder_head *head, const stv_weights *weights, const real *stream)
{
    const stv_decoder_config *c = &weights->model->config.decoder;
    head->in = stv_reals(x, head->n, c->hidden_size);
    head->rstd = stv_reals(x, head->n, 1);
    head->h = stv_reals(x, head->n, c->hidden_size);
    stv_gather_rows(x, head->in, stream, head->row, head->n, c->hidden_size);
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
