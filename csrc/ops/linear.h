/* linear.h - y = x W^T + b + s drop(x) A^T B^T: a linear layer with an optional low-rank adapter.
 *
 * With a magnitude m (N), DoRA: every row of V = W + s B A has the length m gives it. With g = m / |V|, row by row,
 *
 *   y = g (drop(x) V^T) + b + (x - drop(x)) W^T
 *
 * where |V| is a constant to backward. The last term is PEFT's: only what the adapter adds to the base sees dropout. Without dropout it is zero, and
 * y = x (g V)^T + b.
 *
 * Source: LoRA (arXiv 2106.09685, eq. 3); PEFT's lora.Linear for dropout on the adapter's input only and scale = alpha/r
 * (alpha/sqrt(r) for rsLoRA, decided by the caller). DoRA (arXiv 2402.09353, eq. 5 and section 4.3 for the constant); PEFT's DoraLinearLayer. */
#ifndef STV_OPS_LINEAR_H
#define STV_OPS_LINEAR_H

#include "ops/dropout.h"

#define stv_linear_forward STV_TYPED(stv_linear_forward)
#define stv_linear_forward_u STV_TYPED(stv_linear_forward_u)
#define stv_linear_backward STV_TYPED(stv_linear_backward)
#define stv_linear_backward_add STV_TYPED(stv_linear_backward_add)
#define stv_linear_norms STV_TYPED(stv_linear_norms)
#define stv_linear_merge STV_TYPED(stv_linear_merge)

typedef struct stv_lora {
    stv_stored a;         /* (r,K) */
    stv_stored b;         /* (N,r) */
    real *da, *db;        /* gradients, added to; NULL when frozen */
    stv_stored magnitude; /* (N); data NULL: not DoRA */
    real *dmagnitude;     /* (N), added to; NULL when frozen */
    const real *norm;     /* (N) of stv_linear_norms, borrowed; DoRA only */
    int64_t rank;         /* 0: no adapter, every other field unused */
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

/* Reals that forward leaves in u for backward: u (rows,r) and, where a magnitude trains, v (rows,N) behind it. */
static inline int64_t stv_linear_u_width(const stv_linear *lin) { return lin->lora.rank + (lin->lora.dmagnitude ? lin->n_out : 0); }

/* y (rows,N) from in (rows,K). Fills u (rows,r) = s drop(in) A^T, and v (rows,N) = drop(in) V^T if a magnitude trains, which backward needs; u may be
 * NULL when rank = 0. */
void stv_linear_forward(stv_exec *x, real *y, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop);
/* u (and v) alone, with the same bits: all that backward needs of the last linear of a layer that is computed again. */
void stv_linear_forward_u(stv_exec *x, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop);

/* From dy (rows,N): din (rows,K) overwritten, or added to by the _add form (q, k and v share their input); NULL: not wanted.
 * Weight, bias, A, B and magnitude gradients add. `in`, `u` and `drop` as in forward. */
void stv_linear_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                         const stv_dropout *drop);
void stv_linear_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                             const stv_dropout *drop);

/* norm (N) = the lengths of the rows of V = weight + s B A: N K (r + 1) products, so once for all the passes that weight and adapter stay the same. */
void stv_linear_norms(stv_exec *x, real *norm, const stv_linear *lin);

/* merged (N,K) = V; with a magnitude g V. lora.norm is not read. */
void stv_linear_merge(stv_exec *x, real *merged, const stv_linear *lin);

#endif
