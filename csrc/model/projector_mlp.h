/* projector_mlp.h - Linear, then activation and Linear as often as the model has layers. One layer is the linear projector. */
#ifndef STV_MODEL_PROJECTOR_MLP_H
#define STV_MODEL_PROJECTOR_MLP_H

#include "model/weights.h"
#include "ops/activation.h"

#define stv_mlp_forward STV_TYPED(stv_mlp_forward)
#define stv_mlp_backward STV_TYPED(stv_mlp_backward)
#define stv_mlp_trains STV_TYPED(stv_mlp_trains)

typedef struct stv_mlp_saved {
    const real *in[STV_MAX_PROJECTOR_DEPTH]; /* input of each layer */
    real *hidden[STV_MAX_PROJECTOR_DEPTH];   /* its output before the activation; the last is not kept */
} stv_mlp_saved;

/* out (rows,D) from in (rows,E); `in` stays borrowed until backward is done. */
void stv_mlp_forward(stv_exec *x, real *out, const real *in, int64_t rows, stv_activation kind, const stv_weights *weights, stv_mlp_saved *saved);
/* din (rows,E) overwritten; NULL: not wanted. */
void stv_mlp_backward(stv_exec *x, real *din, const real *dout, int64_t rows, stv_activation kind, const stv_weights *weights,
                      const stv_mlp_saved *saved);
bool stv_mlp_trains(const stv_weights *weights);

#endif
