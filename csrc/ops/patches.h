/* patches.h - pixels to patch rows, and the class token and positions of a vision transformer. */
#ifndef STV_OPS_PATCHES_H
#define STV_OPS_PATCHES_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_patchify STV_TYPED(stv_patchify)
#define stv_class_token_forward STV_TYPED(stv_class_token_forward)
#define stv_class_token_backward STV_TYPED(stv_class_token_backward)

/* patches (n*T, 3*P*P), T = (size/P)^2 in raster order, each row in (channel, y, x) order: a patch convolution is then a matrix product
 * with its weight seen as (D, 3*P*P). pixels (n,3,size,size). */
void stv_patchify(stv_exec *x, real *patches, const real *pixels, int64_t n_images, int64_t size, int64_t patch);

/* out (n,T+1,D) = [class; patches] + positions; patches (n,T,D), class (D), positions (T+1,D). */
void stv_class_token_forward(stv_exec *x, real *out, const real *patches, stv_stored class_embedding, stv_stored positions, int64_t n_images,
                             int64_t T, int64_t D);
typedef struct stv_class_token_grads {
    real *dpatches;         /* (n,T,D) overwritten; NULL: not wanted */
    real *dclass_embedding; /* (D) added to; NULL when frozen */
    real *dpositions;       /* (T+1,D) added to; NULL when frozen */
} stv_class_token_grads;
void stv_class_token_backward(stv_exec *x, stv_class_token_grads grads, const real *dout, int64_t n_images, int64_t T, int64_t D);

#endif
