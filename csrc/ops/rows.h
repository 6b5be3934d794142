/* rows.h - moving rows about, and the small elementwise work between layers. */
#ifndef STV_OPS_ROWS_H
#define STV_OPS_ROWS_H

#include "base/alloc.h"
#include "base/exec.h"
#include "tensor/real.h"

#include <stdbool.h>
#include <stdint.h>

#define stv_widened STV_TYPED(stv_widened)
#define stv_zero STV_TYPED(stv_zero)
#define stv_copy STV_TYPED(stv_copy)
#define stv_add STV_TYPED(stv_add)
#define stv_gather_rows STV_TYPED(stv_gather_rows)
#define stv_scatter_add_rows STV_TYPED(stv_scatter_add_rows)
#define stv_all_finite STV_TYPED(stv_all_finite)
#define stv_splice_forward STV_TYPED(stv_splice_forward)
#define stv_splice_backward STV_TYPED(stv_splice_backward)

/* (rows,D) reals in the arena, uninitialised. A size beyond size_t is refused when the measured arena is created. */
static inline real *stv_reals(stv_exec *x, int64_t rows, int64_t D)
{
    size_t size_bytes;
    if (!stv_size_mul(&size_bytes, (size_t)rows, (size_t)D) || !stv_size_mul(&size_bytes, size_bytes, sizeof(real))) size_bytes = SIZE_MAX;
    return stv_arena_alloc(x->arena, size_bytes);
}

/* Stored values (n) as reals: where they lie, or widened in the arena. The arena gives the room either way, so that a pass which was measured runs also
 * after a weight was bound anew in another precision. */
const real *stv_widened(stv_exec *x, stv_stored values, int64_t n);

void stv_zero(stv_exec *x, real *y, int64_t n);
void stv_copy(stv_exec *x, real *y, const real *in, int64_t n);
/* y = a + b; y may be a or b. */
void stv_add(stv_exec *x, real *y, const real *a, const real *b, int64_t n);
/* y (n,D) = in[index[i]]. */
void stv_gather_rows(stv_exec *x, real *y, const real *in, const int64_t *index, int64_t n, int64_t D);
/* y[index[i]] += in (n,D), in the order of i; rows may repeat. */
void stv_scatter_add_rows(stv_exec *x, real *y, const real *in, const int64_t *index, int64_t n, int64_t D);
/* True if every element is finite. Always true while measuring. */
bool stv_all_finite(stv_exec *x, const real *in, int64_t n);

/* The splice: row i of y (rows,D) is table[token[i]], or features[feature[i]] where feature[i] >= 0. feature NULL: tokens only. */
void stv_splice_forward(stv_exec *x, real *y, stv_stored table, const real *features, const int32_t *token, const int64_t *feature, int64_t rows,
                        int64_t D);
/* dtable and dfeatures are added to, in row order; either may be NULL. */
void stv_splice_backward(stv_exec *x, real *dtable, real *dfeatures, const real *dy, const int32_t *token, const int64_t *feature, int64_t rows,
                         int64_t D);

#endif
