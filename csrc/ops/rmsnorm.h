/* rmsnorm.h - y = w * x / sqrt(mean(x^2) + eps), per row.
 * Source: Zhang & Sennrich 2019 (arXiv 1910.07467); LlamaRMSNorm. Sums in double. */
#ifndef STV_OPS_RMSNORM_H
#define STV_OPS_RMSNORM_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_rmsnorm_forward STV_TYPED(stv_rmsnorm_forward)
#define stv_rmsnorm_backward_add STV_TYPED(stv_rmsnorm_backward_add)

/* y (rows,D), rstd (rows) saved for backward; y overlaps nothing. */
void stv_rmsnorm_forward(stv_exec *x, real *y, real *rstd, const real *in, stv_stored weight, int64_t rows, int64_t D, double eps);
/* din (rows,D) is added to, because it is the residual stream's gradient; dweight (D) is added to, NULL when frozen. */
void stv_rmsnorm_backward_add(stv_exec *x, real *din, real *dweight, const real *dy, const real *in, stv_stored weight, const real *rstd,
                              int64_t rows, int64_t D);

#endif
