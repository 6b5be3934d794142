#include "model/projector_mlp.h"

static stv_linear layer(const stv_weights *weights, int64_t i) { return stv_weights_affine(weights, weights->model->projector.mlp[i]); }

bool stv_mlp_trains(const stv_weights *weights)
{
    for (int64_t i = 0; i < weights->model->projector.n_mlp; i++) {
        stv_linear lin = layer(weights, i);
        if (stv_linear_trains(&lin)) return true;
    }
    return false;
}

void stv_mlp_forward(stv_exec *x, real *out, const real *in, int64_t rows, stv_activation kind, const stv_weights *weights, stv_mlp_saved *saved)
{
    int64_t n_layers = weights->model->projector.n_mlp;
    for (int64_t i = 0; i < n_layers; i++) {
        stv_linear lin = layer(weights, i);
        bool last = i == n_layers - 1;
        saved->in[i] = in;
        saved->hidden[i] = last ? NULL : stv_reals(x, rows, lin.n_out);
        stv_linear_forward(x, last ? out : saved->hidden[i], NULL, in, &lin, rows, NULL);
        if (last) break;
        real *act = stv_reals(x, rows, lin.n_out);
        stv_activation_forward(x, act, saved->hidden[i], rows * lin.n_out, kind);
        in = act;
    }
}

void stv_mlp_backward(stv_exec *x, real *din, const real *dout, int64_t rows, stv_activation kind, const stv_weights *weights,
                      const stv_mlp_saved *saved)
{
    size_t mark = stv_arena_mark(x->arena);
    for (int64_t i = weights->model->projector.n_mlp - 1; i >= 0; i--) {
        stv_linear lin = layer(weights, i);
        real *dlayer_in = i == 0 ? din : stv_reals(x, rows, lin.n_in);
        stv_linear_backward(x, dlayer_in, dout, saved->in[i], NULL, &lin, rows, NULL);
        if (i > 0) stv_activation_backward(x, dlayer_in, dlayer_in, saved->hidden[i - 1], rows * lin.n_in, kind);
        dout = dlayer_in;
    }
    stv_arena_release(x->arena, mark);
}
