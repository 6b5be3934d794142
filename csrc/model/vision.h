/* vision.h - the CLIP vision tower up to the layer whose output becomes features, and its backward.
 *
 *   pixels -> patches -> [class; patches] + positions -> pre_layrnorm -> layers 0..select -> rows of patches (and class)
 *   layer:  h += out_proj(attention(q(n), k(n), v(n)))   n = layernorm1(h)
 *           h += fc2(act(fc1(n)))                        n = layernorm2(h)
 *
 * Later layers and the post-LayerNorm run only when asked for (inspection): they reach no output (spec D2).
 * Source: Radford et al. 2021 (arXiv 2103.00020); transformers' CLIPVisionModel; LLaVA's feature_select. */
#ifndef STV_MODEL_VISION_H
#define STV_MODEL_VISION_H

#include "model/inputs.h"
#include "model/weights.h"

#define stv_vision_forward STV_TYPED(stv_vision_forward)
#define stv_vision_backward STV_TYPED(stv_vision_backward)

typedef struct stv_vision_saved {                  /* one layer, for backward; R rows, E width, F intermediate size */
    real *in, *stats1;                             /* (R,E) (R,2) */
    real *q, *k, *v, *attn, *lse;                  /* (R,E) ...; lse (R,H) */
    real *mid, *stats2;                            /* (R,E) (R,2): after attention */
    real *hidden;                                  /* (R,F) */
    real *u_q, *u_k, *u_v, *u_out, *u_fc1, *u_fc2; /* of the adapters */
} stv_vision_saved;

typedef struct stv_vision_pass {
    /* set before forward; borrowed until backward is done */
    const stv_weights *weights; /* its `grads` decides whether there is a backward (spec D1) */
    const stv_image_rows *rows;
    const real *pixels;         /* (n,3,size,size) */
    const stv_dropout *dropout; /* NULL: off */
    int64_t n_recompute;        /* the first so many layers keep only their input */
    bool all_layers;            /* also the layers behind select_layer, and the pooled class token */
    /* left by forward */
    int64_t lowest;                   /* what backward enters last: -1 embeddings, else a layer; the number of layers used: nothing */
    real *patches, *embedded, *stats; /* (n*P,3*p*p), (R,E), (R,2) of pre_layrnorm */
    real *pooled;                     /* (n,E), after all_layers */
    stv_vision_saved *layers;         /* (n_layers), the owner's */
    real **hidden;                    /* (n_layers+1) hidden states after all_layers, the owner's */
} stv_vision_pass;

/* Returns features (n*T,E) in the arena. */
real *stv_vision_forward(stv_exec *x, stv_vision_pass *pass);
void stv_vision_backward(stv_exec *x, const stv_vision_pass *pass, const real *dfeatures);

#endif
