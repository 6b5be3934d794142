/* projector_cluster.h - the prototype extractor of SQ-LLaVA: every token is enriched with what its prototype has gathered. For each image,
 * with x (L,E) its tokens, V = v(x), F = f(x):
 *
 *   1  C = pool(x), B = pool(F)                         (N,E): adaptive average over tokens, N bins
 *   2  n_rounds times:  P = c(C)                        Linear
 *                       W = softmax over the centres of  rownorm(P) tokennorm(V)^T        (N,L)
 *                       C = W F
 *   3  S = sigmoid(beta + alpha rownorm(C) rownorm(x)^T)    a(l) = first centre with the largest S[.,l]
 *   4  G[i] = (sum over tokens l of centre i of S[i,l] F[l] + B[i]) / (tokens of centre i + 1)
 *   5  y[l] = x[l] + S[a(l),l] G[a(l)]
 *
 * tokennorm scales every channel to unit length over the tokens; norms below 1e-12 count as 1e-12. Steps 1 to 5 are in double from V and F in the
 * model's precision: centres come out nearly equal, and in f32 the argmax of correlated tokens is noise (spec D56). For the gradient a(l) is a
 * constant.
 * Source: Sun et al. 2024 (arXiv 2403.11299); SQ-LLaVA's multimodal_projector/cluster.py, without its (N,L,E) temporaries. */
#ifndef STV_MODEL_PROJECTOR_CLUSTER_H
#define STV_MODEL_PROJECTOR_CLUSTER_H

#include "model/weights.h"

#define stv_cluster_forward STV_TYPED(stv_cluster_forward)
#define stv_cluster_backward STV_TYPED(stv_cluster_backward)
#define stv_cluster_trains STV_TYPED(stv_cluster_trains)

typedef struct stv_cluster_saved { /* n images */
    real *v, *f;                   /* (n*L,E) */
    double *c_in, *p, *w;          /* (n,rounds-1,N,E): entering all rounds but the first, (n,rounds,N,E), (n,rounds,N,L) */
    double *c, *g;                 /* (n,N,E): last centres; what they gathered */
    double *cosine, *s;            /* (n*L): of each token and its centre */
    double *margin;                /* (n*L): largest minus second largest S */
    int32_t *assigned;             /* (n*L): a(l) */
    int32_t *n_assigned;           /* (n,N) */
} stv_cluster_saved;

/* Returns y (n*L,E) in the arena. */
real *stv_cluster_forward(stv_exec *x, const real *in, int64_t n_images, int64_t n_tokens, const stv_weights *weights, stv_cluster_saved *saved);
/* din (n*L,E) overwritten from dy (n*L,E); NULL: not wanted. */
void stv_cluster_backward(stv_exec *x, real *din, const real *dy, const real *in, int64_t n_images, int64_t n_tokens, const stv_weights *weights,
                          const stv_cluster_saved *saved);
bool stv_cluster_trains(const stv_weights *weights);

#endif
