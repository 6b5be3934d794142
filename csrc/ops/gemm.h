/* gemm.h - matrix products. Row-major, contiguous.
 *
 * Batch invariance: a row of the result has the same bits whatever M is, in any place, at any thread count. All products run on our own kernel,
 * where every output is one chain of FMAs over k in order (gemm_kernel.h); gemm.c says why not on a BLAS. Threads split the output, never a sum.
 *
 * Both precisions are declared here, because the cluster projector of an f32 model computes its rounds in f64. */
#ifndef STV_OPS_GEMM_H
#define STV_OPS_GEMM_H

#include "base/exec.h"
#include "tensor/real.h"

#include <stdbool.h>

/* y (M,N) = a (M,K) w (N,K)^T, or y += ... when `add`. y overlaps neither input. The product of a linear layer, forward. */
void stv_matmul_nt_f32(stv_exec *x, float *y, const float *a, const float *w, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_nt_f64(stv_exec *x, double *y, const double *a, const double *w, int64_t M, int64_t N, int64_t K, bool add);
/* y (M,N) = a (M,K) b (K,N). Input gradient: dx = dy W. */
void stv_matmul_nn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_nn_f64(stv_exec *x, double *y, const double *a, const double *b, int64_t M, int64_t N, int64_t K, bool add);
/* y (M,N) = a (K,M)^T b (K,N). Weight gradient: dW = dy^T x; here K counts rows, and their sum runs in row order. */
void stv_matmul_tn_f32(stv_exec *x, float *y, const float *a, const float *b, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_tn_f64(stv_exec *x, double *y, const double *a, const double *b, int64_t M, int64_t N, int64_t K, bool add);

/* nt and nn with a right side as it is stored, in any precision that the product's holds exactly. It is widened while it is packed, never as a whole:
 * the bits are those of the product with widened values. */
void stv_matmul_nt_stored_f32(stv_exec *x, float *y, const float *a, stv_stored w, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_nt_stored_f64(stv_exec *x, double *y, const double *a, stv_stored w, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_nn_stored_f32(stv_exec *x, float *y, const float *a, stv_stored b, int64_t M, int64_t N, int64_t K, bool add);
void stv_matmul_nn_stored_f64(stv_exec *x, double *y, const double *a, stv_stored b, int64_t M, int64_t N, int64_t K, bool add);

#define stv_matmul_nt STV_TYPED(stv_matmul_nt)
#define stv_matmul_nn STV_TYPED(stv_matmul_nn)
#define stv_matmul_tn STV_TYPED(stv_matmul_tn)
#define stv_matmul_nt_stored STV_TYPED(stv_matmul_nt_stored)
#define stv_matmul_nn_stored STV_TYPED(stv_matmul_nn_stored)

#endif
