/* rope.h - rotary positions, half-split: (a, b) -> (a cos - b sin, b cos + a sin) with a = x[i], b = x[i + head_dim/2].
 * Source: RoFormer (arXiv 2104.09864); LlamaRotaryEmbedding for the half-split pairing. */
#ifndef STV_OPS_ROPE_H
#define STV_OPS_ROPE_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_rope_angles STV_TYPED(stv_rope_angles)
#define stv_rope_forward STV_TYPED(stv_rope_forward)
#define stv_rope_backward STV_TYPED(stv_rope_backward)

/* angles (rows, head_dim/2, 2) = cos, sin of position * theta^(-2i/head_dim), computed in double; once per batch, for all layers. */
void stv_rope_angles(stv_exec *x, real *angles, const int32_t *position, int64_t rows, int64_t head_dim, double theta);
/* In place on qk (rows, n_heads, head_dim). */
void stv_rope_forward(stv_exec *x, real *qk, const real *angles, int64_t rows, int64_t n_heads, int64_t head_dim);
/* In place on the gradient: the inverse rotation. */
void stv_rope_backward(stv_exec *x, real *dqk, const real *angles, int64_t rows, int64_t n_heads, int64_t head_dim);

#endif
