/* linear.h - y = x W^T + b + s drop(x) A^T B^T: a linear layer with an optional low-rank adapter.
 *
 * Source: LoRA (arXiv 2106.09685, eq. 3); PEFT's lora.Linear for dropout on the adapter's input only and scale = alpha/r
 * (alpha/sqrt(r) for rsLoRA, decided by the caller). */
#ifndef STV_OPS_LINEAR_H
#define STV_OPS_LINEAR_H

#include "ops/dropout.h"

#define stv_linear_forward STV_TYPED(stv_linear_forward)
#define stv_linear_forward_u STV_TYPED(stv_linear_forward_u)
#define stv_linear_backward STV_TYPED(stv_linear_backward)
#define stv_linear_backward_add STV_TYPED(stv_linear_backward_add)
#define stv_linear_merge STV_TYPED(stv_linear_merge)

typedef struct stv_lora {
    stv_stored a;  /* (r,K) */
    stv_stored b;  /* (N,r) */
    real *da, *db; /* gradients, added to; NULL when frozen */
    int64_t rank;  /* 0: no adapter, every other field unused */
    real scale;
    float dropout;
    uint32_t module_id; /* names the dropout stream */
} stv_lora;

typedef struct stv_linear {
    stv_stored weight;   /* (N,K) */
    stv_stored bias;     /* (N); data NULL: none */
    real *dweight;       /* (N,K), added to; NULL when frozen */
    real *dbias;         /* (N), added to; NULL when frozen */
    int64_t n_in, n_out; /* K, N */
    stv_lora lora;
} stv_linear;

/* y (rows,N) from in (rows,K). Fills u (rows,r) = s drop(in) A^T, which backward needs; u may be NULL when rank = 0. */
void stv_linear_forward(stv_exec *x, real *y, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop);
/* u alone, with the same bits: all that backward needs of the last linear of a layer that is computed again. */
void stv_linear_forward_u(stv_exec *x, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop);

/* From dy (rows,N): din (rows,K) overwritten, or added to by the _add form (q, k and v share their input); NULL: not wanted.
 * Weight, bias, A and B gradients add. `in`, `u` and `drop` as in forward. */
void stv_linear_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                         const stv_dropout *drop);
void stv_linear_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                             const stv_dropout *drop);

/* merged (N,K) = weight + s B A. */
void stv_linear_merge(stv_exec *x, real *merged, const stv_linear *lin);

#endif
