/* projector.h - tower features to the decoder's width: identity, linear, mlpNx_gelu (exact GELU), or the cluster projector.
 * Source: LLaVA's multimodal_projector/builder.py; spec 2.3 for the cluster projector. */
#ifndef STV_MODEL_PROJECTOR_H
#define STV_MODEL_PROJECTOR_H

#include "model/projector_cluster.h"
#include "model/projector_mlp.h"

#define stv_projector_forward STV_TYPED(stv_projector_forward)
#define stv_projector_backward STV_TYPED(stv_projector_backward)
#define stv_projector_trains STV_TYPED(stv_projector_trains)

typedef struct stv_projector_pass {
    /* set before forward; borrowed until backward is done */
    const stv_weights *weights;
    int64_t n_images, n_tokens; /* tokens of one image */
    const real *in;             /* (n_images * n_tokens, E) */
    /* left by forward */
    stv_mlp_saved mlp;
    stv_cluster_saved cluster;
} stv_projector_pass;

/* Returns (n_images * n_tokens, D) in the arena. */
real *stv_projector_forward(stv_exec *x, stv_projector_pass *pass);
/* din (n_images * n_tokens, E) overwritten; NULL: not wanted. */
void stv_projector_backward(stv_exec *x, real *din, const real *dout, const stv_projector_pass *pass);
bool stv_projector_trains(const stv_weights *weights);

#endif
