/* decoder.h - the LLaMA/Mistral stack: rows in, rows out (before the final norm), and its backward.
 *
 *   layer:  h += o(attention(rope(q(n)), rope(k(n)), v(n)))   n = rmsnorm(h)
 *           h += down(silu(gate(n)) * up(n))                  n = rmsnorm(h)
 *
 * Training, prefill and decoding are the same function. They differ in the attention plan (which keys a row sees) and in where keys and values
 * are kept: with the layer, or in a cache that outlives the pass.
 * Source: Touvron et al. 2023 (arXiv 2302.13971), Jiang et al. 2023 (arXiv 2310.06825). */
#ifndef STV_MODEL_DECODER_H
#define STV_MODEL_DECODER_H

#include "model/weights.h"
#include "ops/attention.h"

#define stv_decoder_forward STV_TYPED(stv_decoder_forward)
#define stv_decoder_backward STV_TYPED(stv_decoder_backward)
#define stv_decoder_head_forward STV_TYPED(stv_decoder_head_forward)
#define stv_decoder_head_backward STV_TYPED(stv_decoder_head_backward)

/* Keys and values of all layers, (n_layers, n_rows, n_kv_heads * head_dim) each; row i of the pass goes to cache row row[i], or
 * to row i if `row` is NULL. Borrowed. */
typedef struct stv_decoder_cache {
    real *k, *v;
    int64_t n_rows;
    const int64_t *row;
} stv_decoder_cache;

typedef struct stv_decoder_saved {                        /* one layer, for backward; D width, F intermediate size */
    real *in, *rstd1;                                     /* (R,D) (R) */
    real *q, *k, *v, *attn, *lse;                         /* (R, heads, head_dim) ...; lse (R,H) */
    real *mid, *rstd2;                                    /* (R,D) (R): after attention */
    real *gate, *up;                                      /* (R,F) */
    real *u_q, *u_k, *u_v, *u_o, *u_gate, *u_up, *u_down; /* of the adapters */
} stv_decoder_saved;

typedef struct stv_decoder_pass {
    /* set before forward; borrowed until backward is done */
    const stv_weights *weights;
    int64_t n_rows;
    const int32_t *position; /* (R) */
    const stv_attn_plan *plan;
    const stv_dropout *dropout;     /* NULL: off */
    const stv_decoder_cache *cache; /* NULL: keys are the rows of this pass */
    int64_t n_recompute;            /* the first so many layers keep only their input */
    bool input_grad;                /* backward goes on below the stack */
    /* left by forward */
    real *angles;
    int64_t lowest;            /* the lowest layer that backward enters; n_layers: none */
    stv_decoder_saved *layers; /* (n_layers), the owner's */
} stv_decoder_pass;

/* Returns (R,D) in the arena. `in` (R,D) stays borrowed until backward is done. */
real *stv_decoder_forward(stv_exec *x, stv_decoder_pass *pass, real *in);
/* dh (R,D): gradient of the result; becomes the gradient of `in` if input_grad. */
void stv_decoder_backward(stv_exec *x, const stv_decoder_pass *pass, real *dh);

typedef struct stv_decoder_head { /* the rows whose logits are wanted: gathered, normed */
    const int64_t *row;           /* (n), borrowed */
    int64_t n;
    real *in, *rstd; /* (n,D), (n) saved for backward */
    real *h;         /* (n,D): logits are h W^T */
} stv_decoder_head;

void stv_decoder_head_forward(stv_exec *x, stv_decoder_head *head, const stv_weights *weights, const real *stream);
/* dstream (R,D) is added to, from dh (n,D). */
void stv_decoder_head_backward(stv_exec *x, real *dstream, const real *dh, const stv_decoder_head *head, const stv_weights *weights);

#endif
