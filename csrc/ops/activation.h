/* activation.h - the elementwise non-linearities. */
#ifndef STV_OPS_ACTIVATION_H
#define STV_OPS_ACTIVATION_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_activation_forward STV_TYPED(stv_activation_forward)
#define stv_activation_backward STV_TYPED(stv_activation_backward)
#define stv_swiglu_forward STV_TYPED(stv_swiglu_forward)
#define stv_swiglu_backward STV_TYPED(stv_swiglu_backward)

typedef enum stv_activation { STV_GELU = 0 /* exact: x Phi(x) */, STV_QUICK_GELU = 1 /* x sigmoid(1.702 x) */ } stv_activation;

void stv_activation_forward(stv_exec *x, real *y, const real *in, int64_t n, stv_activation kind);
/* din overwritten; din may be dy. */
void stv_activation_backward(stv_exec *x, real *din, const real *dy, const real *in, int64_t n, stv_activation kind);

/* y = silu(gate) * up (SwiGLU, arXiv 2002.05202). */
void stv_swiglu_forward(stv_exec *x, real *y, const real *gate, const real *up, int64_t n);
/* dgate, dup overwritten; they overlap nothing else. */
void stv_swiglu_backward(stv_exec *x, real *dgate, real *dup, const real *dy, const real *gate, const real *up, int64_t n);

#endif
