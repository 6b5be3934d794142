/* gemm_blas.h - OpenBLAS where it is faster and nobody can tell: large weight gradients.
 *
 * A forward product must give a row the same bits in any batch, and OpenBLAS does not promise that (gemm.c). A weight gradient sums over all rows of the
 * batch anyway, so all it has to be is the same at any thread count: it is cut into blocks of output rows of one fixed size, each a
 * single-threaded call. Measured on Ice Lake, both sides limited to the same instructions, ours / OpenBLAS: AVX-512 1.05, AVX2 0.90, portable 0.90. */
#ifndef STV_OPS_GEMM_BLAS_H
#define STV_OPS_GEMM_BLAS_H

#include "base/exec.h"

#include <stdbool.h>
#include <stdint.h>

/* y (M,N) = a (K,M)^T b (K,N), or += when `add`. False, with y untouched: built without OpenBLAS, too small to gain, or
 * a processor with AVX-512, where our own kernel is faster. */
bool stv_gemm_blas_tn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add);
/* "openblas (bundled)", "openblas (system)" or "none". */
const char *stv_gemm_blas_name(void);

#endif
