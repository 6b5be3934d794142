#include "model/projector.h"

#include "ops/rows.h"

static const stv_projector_config *config_of(const stv_weights *weights) { return &weights->model->config.projector; }

bool stv_projector_trains(const stv_weights *weights)
{
    return stv_mlp_trains(weights) || (config_of(weights)->kind == STV_PROJECTOR_CLUSTER && stv_cluster_trains(weights));
}

real *stv_projector_forward(stv_exec *x, stv_projector_pass *pass)
{
    const stv_projector_config *c = config_of(pass->weights);
    int64_t n = pass->n_images * pass->n_tokens;
    real *out = stv_reals(x, n, c->out_size);
    switch (c->kind) {
    case STV_PROJECTOR_IDENTITY: stv_copy(x, out, pass->in, n * c->out_size); break;
    case STV_PROJECTOR_LINEAR:
    case STV_PROJECTOR_MLP: stv_mlp_forward(x, out, pass->in, n, STV_GELU, pass->weights, &pass->mlp); break;
    case STV_PROJECTOR_CLUSTER: {
        real *enriched = stv_cluster_forward(x, pass->in, pass->n_images, pass->n_tokens, pass->weights, &pass->cluster);
        stv_mlp_forward(x, out, enriched, n, STV_QUICK_GELU, pass->weights, &pass->mlp);
        break;
    }
    }
    return out;
}

void stv_projector_backward(stv_exec *x, real *din, const real *dout, const stv_projector_pass *pass)
{
    const stv_projector_config *c = config_of(pass->weights);
    int64_t n = pass->n_images * pass->n_tokens;
    switch (c->kind) {
    case STV_PROJECTOR_IDENTITY:
        if (din) stv_copy(x, din, dout, n * c->out_size);
        break;
    case STV_PROJECTOR_LINEAR:
    case STV_PROJECTOR_MLP: stv_mlp_backward(x, din, dout, n, STV_GELU, pass->weights, &pass->mlp); break;
    case STV_PROJECTOR_CLUSTER: {
        size_t mark = stv_arena_mark(x->arena);
        real *denriched = din || stv_cluster_trains(pass->weights) ? stv_reals(x, n, c->in_size) : NULL;
        stv_mlp_backward(x, denriched, dout, n, STV_QUICK_GELU, pass->weights, &pass->mlp);
        if (denriched) stv_cluster_backward(x, din, denriched, pass->in, pass->n_images, pass->n_tokens, pass->weights, &pass->cluster);
        stv_arena_release(x->arena, mark);
        break;
    }
    }
}
