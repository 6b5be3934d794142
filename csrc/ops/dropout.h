/* dropout.h - inverted dropout whose mask is a function of where it is, so that it is never stored.
 *
 * keep(row, col) is drawn from Philox at (seed; step, module, sample of the row, position of the row in its own sequence, col):
 * packing, sharing a prefix, recomputing or changing the thread count never changes a mask. A row shared by several sequences
 * has one mask. */
#ifndef STV_OPS_DROPOUT_H
#define STV_OPS_DROPOUT_H

#include "base/exec.h"
#include "tensor/real.h"

#define stv_dropout_apply STV_TYPED(stv_dropout_apply)

/* Borrowed for the length of a forward or backward call; NULL in place of the struct means: no dropout now (evaluation). */
typedef struct stv_dropout {
    uint64_t seed, step;
    const uint64_t *row_sample;  /* (rows) */
    const int32_t *row_position; /* (rows) */
} stv_dropout;

/* y (rows,n) = in * keep / (1-p), 0 <= p < 1; y may be in. The same call applied to a gradient is its own backward. */
void stv_dropout_apply(stv_exec *x, real *y, const real *in, int64_t rows, int64_t n, float p, uint32_t module_id, const stv_dropout *drop);

#endif
