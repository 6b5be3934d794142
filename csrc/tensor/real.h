/* real.h - one source, two precisions.
 *
 * Every file of ops/, model/, train/adamw and infer/ that touches numbers is compiled twice, with -DSTV_REAL_BITS=32 and 64.
 * `real` is the element type; STV_TYPED(name) gives a function its _f32 or _f64 symbol. A header writes, once per function,
 *
 *     #define stv_rmsnorm_forward STV_TYPED(stv_rmsnorm_forward)
 *
 * and from there on everybody calls stv_rmsnorm_forward. f64 is slow and exact: the check that f32 computes the right thing.
 *
 * Activations and gradients are always real; weights are stv_stored, real or narrower. */
#ifndef STV_TENSOR_REAL_H
#define STV_TENSOR_REAL_H

#include "tensor/widen.h"

#if !defined(STV_REAL_BITS)
#error "typed files are compiled with -DSTV_REAL_BITS=32 or 64"
#elif STV_REAL_BITS == 32
typedef float real;
#define STV_TYPED(name) name##_f32
#define STV_REAL_DTYPE STV_DTYPE_F32
#define STV_REAL(x) x##f
#else
typedef double real;
#define STV_TYPED(name) name##_f64
#define STV_REAL_DTYPE STV_DTYPE_F64
#define STV_REAL(x) x
#endif

#define stv_widen STV_TYPED(stv_widen)

static inline stv_stored stv_stored_reals(const real *data)
{
    stv_stored s = {data, STV_REAL_DTYPE};
    return s;
}

/* n values from `first` on: where they lie, or widened into scratch (n). */
static inline const real *stv_read(stv_stored values, int64_t first, int64_t n, real *scratch)
{
    stv_stored from = stv_stored_from(values, first);
    if (from.dtype == STV_REAL_DTYPE) return (const real *)from.data;
    stv_widen(scratch, from, n);
    return scratch;
}

#endif
