#include "model/vision.h"

#include "ops/activation.h"
#include "ops/attention.h"
#include "ops/patches.h"
#include "ops/rows.h"

typedef struct layer {
    stv_norm norm1, norm2;
    stv_linear q, k, v, out, fc1, fc2;
} layer;

static layer resolve(const stv_weights *w, int64_t i_layer)
{
    const stv_vision_layer *l = &w->model->vision.layers[i_layer];
    double eps = w->model->config.vision.layer_norm_eps;
    return (layer){
        .norm1 = stv_weights_norm(w, l->norm1, eps),
        .norm2 = stv_weights_norm(w, l->norm2, eps),
        .q = stv_weights_linear(w, l->q),
        .k = stv_weights_linear(w, l->k),
        .v = stv_weights_linear(w, l->v),
        .out = stv_weights_linear(w, l->out),
        .fc1 = stv_weights_linear(w, l->fc1),
        .fc2 = stv_weights_linear(w, l->fc2),
    };
}

static bool trains(const layer *l)
{
    return stv_norm_trains(&l->norm1) || stv_norm_trains(&l->norm2) || stv_linear_trains(&l->q) || stv_linear_trains(&l->k) ||
           stv_linear_trains(&l->v) || stv_linear_trains(&l->out) || stv_linear_trains(&l->fc1) || stv_linear_trains(&l->fc2);
}

static const stv_vision_config *config_of(const stv_vision_pass *pass) { return &pass->weights->model->config.vision; }

static stv_attn_shape shape_of(const stv_vision_config *c) { return (stv_attn_shape){c->n_heads, c->n_heads, c->hidden_size / c->n_heads}; }

/* ---- one layer ----------------------------------------------------------------------------------------------------------- */

/* out (R,E); NULL: only what backward needs (a layer computed again). */
static void layer_forward(stv_exec *x, real *out, const stv_vision_pass *pass, int64_t i_layer, stv_vision_saved *s)
{
    const stv_vision_config *c = config_of(pass);
    const layer l = resolve(pass->weights, i_layer);
    int64_t R = pass->rows->n_rows, E = c->hidden_size, F = c->intermediate_size;
    s->stats1 = stv_reals(x, R, 2);
    s->q = stv_reals(x, R, E);
    s->k = stv_reals(x, R, E);
    s->v = stv_reals(x, R, E);
    s->attn = stv_reals(x, R, E);
    s->lse = stv_reals(x, R, c->n_heads);
    s->mid = stv_reals(x, R, E);
    s->stats2 = stv_reals(x, R, 2);
    s->hidden = stv_reals(x, R, F);
    s->u_q = stv_lora_reals(x, R, &l.q);
    s->u_k = stv_lora_reals(x, R, &l.k);
    s->u_v = stv_lora_reals(x, R, &l.v);
    s->u_out = stv_lora_reals(x, R, &l.out);
    s->u_fc1 = stv_lora_reals(x, R, &l.fc1);
    s->u_fc2 = stv_lora_reals(x, R, &l.fc2);
    size_t mark = stv_arena_mark(x->arena);
    real *normed = stv_reals(x, R, E), *act = stv_reals(x, R, F);

    stv_layernorm_forward(x, normed, s->stats1, s->in, &l.norm1, R, E);
    stv_linear_forward(x, s->q, s->u_q, normed, &l.q, R, pass->dropout);
    stv_linear_forward(x, s->k, s->u_k, normed, &l.k, R, pass->dropout);
    stv_linear_forward(x, s->v, s->u_v, normed, &l.v, R, pass->dropout);
    stv_attention_forward(x, s->attn, s->lse, s->q, s->k, s->v, &pass->rows->plan, shape_of(c));
    stv_linear_forward(x, s->mid, s->u_out, s->attn, &l.out, R, pass->dropout);
    stv_add(x, s->mid, s->mid, s->in, R * E);

    stv_layernorm_forward(x, normed, s->stats2, s->mid, &l.norm2, R, E);
    stv_linear_forward(x, s->hidden, s->u_fc1, normed, &l.fc1, R, pass->dropout);
    stv_activation_forward(x, act, s->hidden, R * F, (stv_activation)c->activation);
    if (out) {
        stv_linear_forward(x, out, s->u_fc2, act, &l.fc2, R, pass->dropout);
        stv_add(x, out, out, s->mid, R * E);
    } else {
        stv_linear_forward_u(x, s->u_fc2, act, &l.fc2, R, pass->dropout);
    }
    stv_arena_release(x->arena, mark);
}

/* d (R,E): gradient of the layer's output; becomes the gradient of its input, if input_grad. */
static void layer_backward(stv_exec *x, real *d, const stv_vision_pass *pass, int64_t i_layer, bool input_grad)
{
    const stv_vision_config *c = config_of(pass);
    const stv_vision_saved *s = &pass->layers[i_layer];
    const layer l = resolve(pass->weights, i_layer);
    int64_t R = pass->rows->n_rows, E = c->hidden_size, F = c->intermediate_size;
    size_t mark = stv_arena_mark(x->arena);
    real *dnormed = stv_reals(x, R, E), *normed = stv_reals(x, R, E);

    size_t mlp_mark = stv_arena_mark(x->arena);
    real *dhidden = stv_reals(x, R, F), *act = stv_reals(x, R, F);
    if (stv_linear_trains(&l.fc2)) stv_activation_forward(x, act, s->hidden, R * F, (stv_activation)c->activation);
    stv_linear_backward(x, dhidden, d, act, s->u_fc2, &l.fc2, R, pass->dropout);
    stv_activation_backward(x, dhidden, dhidden, s->hidden, R * F, (stv_activation)c->activation);
    if (stv_linear_trains(&l.fc1)) stv_layernorm_forward(x, normed, s->stats2, s->mid, &l.norm2, R, E);
    stv_linear_backward(x, dnormed, dhidden, normed, s->u_fc1, &l.fc1, R, pass->dropout);
    stv_layernorm_backward_add(x, d, dnormed, s->mid, s->stats2, &l.norm2, R, E);
    stv_arena_release(x->arena, mlp_mark);

    real *dattn = stv_reals(x, R, E), *dq = stv_reals(x, R, E), *dk = stv_reals(x, R, E), *dv = stv_reals(x, R, E);
    stv_attn_saved saved = {s->q, s->k, s->v, s->attn, s->lse};
    stv_linear_backward(x, dattn, d, s->attn, s->u_out, &l.out, R, pass->dropout);
    stv_attention_backward(x, dq, dk, dv, dattn, &saved, &pass->rows->plan, shape_of(c), R);
    real *din = input_grad || stv_norm_trains(&l.norm1) ? dnormed : NULL;
    if (stv_linear_trains(&l.q) || stv_linear_trains(&l.k) || stv_linear_trains(&l.v))
        stv_layernorm_forward(x, normed, s->stats1, s->in, &l.norm1, R, E);
    stv_linear_backward(x, din, dv, normed, s->u_v, &l.v, R, pass->dropout);
    stv_linear_backward_add(x, din, dk, normed, s->u_k, &l.k, R, pass->dropout);
    stv_linear_backward_add(x, din, dq, normed, s->u_q, &l.q, R, pass->dropout);
    if (din) stv_layernorm_backward_add(x, d, dnormed, s->in, s->stats1, &l.norm1, R, E);
    stv_arena_release(x->arena, mark);
}

/* ---- embeddings ---------------------------------------------------------------------------------------------------------- */

typedef struct embeddings {
    stv_linear patch;
    stv_norm pre_norm;
    stv_stored class_embedding, positions;
    real *dclass_embedding, *dpositions;
} embeddings;

static embeddings resolve_embeddings(const stv_weights *w)
{
    const stv_vision_params *v = &w->model->vision;
    return (embeddings){
        .patch = stv_weights_affine(w, (stv_affine){v->patch_embedding, -1}),
        .pre_norm = stv_weights_norm(w, v->pre_norm, w->model->config.vision.layer_norm_eps),
        .class_embedding = stv_weight(w, v->class_embedding),
        .dclass_embedding = stv_weight_grad(w, v->class_embedding),
        .positions = stv_weight(w, v->position_embedding),
        .dpositions = stv_weight_grad(w, v->position_embedding),
    };
}

static bool embeddings_train(const embeddings *e)
{
    return stv_linear_trains(&e->patch) || stv_norm_trains(&e->pre_norm) || e->dclass_embedding || e->dpositions;
}

/* out (R,E) = pre_layrnorm([class; patches] + positions). */
static void embed_forward(stv_exec *x, real *out, stv_vision_pass *pass)
{
    const stv_vision_config *c = config_of(pass);
    const embeddings e = resolve_embeddings(pass->weights);
    int64_t n = pass->rows->n_images, P = stv_config_n_patches(c), E = c->hidden_size;
    pass->embedded = stv_reals(x, pass->rows->n_rows, E);
    pass->stats = stv_reals(x, pass->rows->n_rows, 2);
    pass->patches = stv_reals(x, n * P, e.patch.n_in);
    size_t mark = stv_arena_mark(x->arena);
    real *projected = stv_reals(x, n * P, E);
    stv_patchify(x, pass->patches, pass->pixels, n, c->image_size, c->patch_size);
    stv_linear_forward(x, projected, NULL, pass->patches, &e.patch, n * P, NULL);
    stv_class_token_forward(x, pass->embedded, projected, e.class_embedding, e.positions, n, P, E);
    stv_layernorm_forward(x, out, pass->stats, pass->embedded, &e.pre_norm, pass->rows->n_rows, E);
    stv_arena_release(x->arena, mark);
}

static void embed_backward(stv_exec *x, const real *dout, const stv_vision_pass *pass)
{
    const stv_vision_config *c = config_of(pass);
    const embeddings e = resolve_embeddings(pass->weights);
    int64_t n = pass->rows->n_images, P = stv_config_n_patches(c), R = pass->rows->n_rows, E = c->hidden_size;
    size_t mark = stv_arena_mark(x->arena);
    real *dembedded = stv_reals(x, R, E), *dprojected = e.patch.dweight ? stv_reals(x, n * P, E) : NULL;
    stv_zero(x, dembedded, R * E);
    stv_layernorm_backward_add(x, dembedded, dout, pass->embedded, pass->stats, &e.pre_norm, R, E);
    stv_class_token_grads grads = {dprojected, e.dclass_embedding, e.dpositions};
    stv_class_token_backward(x, grads, dembedded, n, P, E);
    if (dprojected) stv_linear_backward(x, NULL, dprojected, pass->patches, NULL, &e.patch, n * P, NULL);
    stv_arena_release(x->arena, mark);
}

/* ---- the tower ----------------------------------------------------------------------------------------------------------- */

static int64_t find_lowest(const stv_vision_pass *pass)
{
    const embeddings e = resolve_embeddings(pass->weights);
    if (embeddings_train(&e)) return -1;
    int64_t n_used = stv_config_n_layers_used(config_of(pass)), i = 0;
    while (i < n_used) {
        const layer l = resolve(pass->weights, i);
        if (trains(&l)) break;
        i++;
    }
    return i;
}

static void pool_class(stv_exec *x, stv_vision_pass *pass, const real *last)
{
    const stv_vision_config *c = config_of(pass);
    int64_t n = pass->rows->n_images, E = c->hidden_size;
    stv_norm norm = stv_weights_norm(pass->weights, pass->weights->model->vision.post_norm, c->layer_norm_eps);
    pass->pooled = stv_reals(x, n, E);
    size_t mark = stv_arena_mark(x->arena);
    real *class_token = stv_reals(x, n, E), *stats = stv_reals(x, n, 2);
    stv_gather_rows(x, class_token, last, pass->rows->class_row, n, E);
    stv_layernorm_forward(x, pass->pooled, stats, class_token, &norm, n, E);
    stv_arena_release(x->arena, mark);
}

real *stv_vision_forward(stv_exec *x, stv_vision_pass *pass)
{
    const stv_vision_config *c = config_of(pass);
    int64_t R = pass->rows->n_rows, E = c->hidden_size, n_used = stv_config_n_layers_used(c), n_run = pass->all_layers ? c->n_layers : n_used;
    int64_t n_features = pass->rows->n_images * stv_config_tokens_per_image(&pass->weights->model->config);
    stv_weights_find_norms(x, pass->weights, STV_PART_VISION, pass->all_layers);
    pass->lowest = find_lowest(pass);
    real *features = stv_reals(x, n_features, E), *shared[2] = {NULL, NULL};
    for (int i = 0; i < 2 && !pass->all_layers && i + 1 < pass->lowest; i++) shared[i] = stv_reals(x, R, E);

    real *hidden = stv_reals(x, R, E);
    size_t embed_mark = stv_arena_mark(x->arena);
    embed_forward(x, hidden, pass);
    if (pass->lowest >= 0) stv_arena_release(x->arena, embed_mark);
    for (int64_t i = 0; i <= n_run; i++) {
        if (pass->all_layers) pass->hidden[i] = hidden;
        if (i == n_used) stv_gather_rows(x, features, hidden, pass->rows->selected, n_features, E);
        if (i == n_run) break;
        real *out = shared[i % 2] && i + 1 < pass->lowest ? shared[i % 2] : stv_reals(x, R, E);
        size_t mark = stv_arena_mark(x->arena);
        pass->layers[i].in = hidden;
        layer_forward(x, out, pass, i, &pass->layers[i]);
        if (i < pass->lowest || i < pass->n_recompute || i >= n_used) stv_arena_release(x->arena, mark);
        hidden = out;
    }
    if (pass->all_layers) pool_class(x, pass, hidden);
    return features;
}

void stv_vision_backward(stv_exec *x, const stv_vision_pass *pass, const real *dfeatures)
{
    const stv_vision_config *c = config_of(pass);
    int64_t R = pass->rows->n_rows, E = c->hidden_size, n_used = stv_config_n_layers_used(c);
    if (pass->lowest == n_used) return;
    size_t mark = stv_arena_mark(x->arena);
    real *d = stv_reals(x, R, E);
    stv_zero(x, d, R * E);
    stv_scatter_add_rows(x, d, dfeatures, pass->rows->selected, pass->rows->n_images * stv_config_tokens_per_image(&pass->weights->model->config), E);
    for (int64_t i = n_used - 1; i >= pass->lowest && i >= 0; i--) {
        size_t layer_mark = stv_arena_mark(x->arena);
        if (i < pass->n_recompute) layer_forward(x, NULL, pass, i, &pass->layers[i]);
        layer_backward(x, d, pass, i, i > pass->lowest);
        stv_arena_release(x->arena, layer_mark);
    }
    if (pass->lowest < 0) embed_backward(x, d, pass);
    stv_arena_release(x->arena, mark);
}
