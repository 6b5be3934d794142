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
#define stv_decoder_more_rows STV_TYPED(stv_decoder_more_rows)
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

typedef struct stv_decoder_saved { /* one layer, for backward; D width, F intermediate size. From mid on R is n_out in the last */
    const real *in;                /* (R,D) */
    real *rstd1;                   /* (R) */
    real *q, *k, *v, *attn, *lse;  /* (R, heads, head_dim) ...; lse (R,H) */
    real *mid, *rstd2;             /* (R,D) (R): after attention */
    real *gate, *up;               /* (R,F) */
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
    const int64_t *out_row;         /* (n_out) rows whose result is wanted: the last layer leaves the others after its attention, where they have
                                     * served as keys; NULL: all */
    int64_t n_out;                  /* unused without out_row */
    /* left by forward */
    real *angles, *last_attn;  /* (R, head_dim); (R, heads, head_dim) of the last layer */
    int64_t lowest;            /* the lowest layer that backward enters; n_layers: none */
    stv_decoder_saved *layers; /* (n_layers), the owner's */
} stv_decoder_pass;

/* Returns (n_out,D), or (R,D) without out_row, in the arena. `in` (R,D) stays borrowed until backward is done. */
const real *stv_decoder_forward(stv_exec *x, stv_decoder_pass *pass, const real *in);
/* The result (n,D) for any rows of the last forward, with the same bits, while what it left is there. */
const real *stv_decoder_more_rows(stv_exec *x, const stv_decoder_pass *pass, const int64_t *row, int64_t n);
/* dout: gradient of the result, overwritten. d (R,D) becomes the gradient of `in` if input_grad; dout itself without out_row. */
void stv_decoder_backward(stv_exec *x, const stv_decoder_pass *pass, real *d, real *dout);

typedef struct stv_decoder_head { /* the rows whose logits are wanted: gathered, normed */
    const int64_t *row;           /* (n) rows of the decoder's result, borrowed; NULL: its first n */
    int64_t n;
    const real *in; /* (n,D) saved for backward, like rstd (n) */
    real *rstd;
    real *h; /* (n,D): logits are h W^T */
} stv_decoder_head;

void stv_decoder_head_forward(stv_exec *x, stv_decoder_head *head, const stv_weights *weights, const real *stream);
/* dstream, of the decoder's result, is added to, from dh (n,D). head->row is not NULL. */
void stv_decoder_head_backward(stv_exec *x, real *dstream, const real *dh, const stv_decoder_head *head, const stv_weights *weights);

#endif
