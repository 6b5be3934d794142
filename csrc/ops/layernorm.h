/* layernorm.h - y = w * (x - mean) / sqrt(var + eps) + b, per row, biased variance.
 * Source: Ba et al. 2016 (arXiv 1607.06450); torch.nn.LayerNorm. Sums in double. */
#ifndef STV_OPS_LAYERNORM_H
#define STV_OPS_LAYERNORM_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_layernorm_forward STV_TYPED(stv_layernorm_forward)
#define stv_layernorm_backward_add STV_TYPED(stv_layernorm_backward_add)

typedef struct stv_norm {
    stv_stored weight, bias; /* (D) */
    real *dweight, *dbias;   /* (D), added to; NULL when frozen */
    double eps;
} stv_norm;

/* y (rows,D); stats (rows,2) = mean, rstd saved for backward. */
void stv_layernorm_forward(stv_exec *x, real *y, real *stats, const real *in, const stv_norm *norm, int64_t rows, int64_t D);
/* din (rows,D) is added to (residual stream). */
void stv_layernorm_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *stats, const stv_norm *norm, int64_t rows,
                                int64_t D);

#endif
