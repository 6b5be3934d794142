/* check_real.h - buffers of `real` and the tolerance of the precision under test. */
#ifndef STV_TESTS_CHECK_REAL_H
#define STV_TESTS_CHECK_REAL_H

#include "check.h"
#include "tensor/real.h"

/* m-rel tolerance of one operator against the same formula in double. */
#if STV_REAL_BITS == 32
#define CHECK_TOLERANCE 2e-6 /* a few dozen roundings of 6e-8 */
#else
#define CHECK_TOLERANCE 1e-13
#endif

static inline real *check_reals(int64_t n) { return check_new((size_t)n * sizeof(real)); }

static inline real *check_random_reals(int64_t n, uint64_t seed)
{
    real *p = check_reals(n);
    check_fill(p, n, seed);
    return p;
}

static inline real *check_copy_reals(const real *from, int64_t n)
{
    real *p = check_reals(n);
    memcpy(p, from, (size_t)n * sizeof(real));
    return p;
}

/* sum_i weight[i] y[i]: a scalar whose gradient in y is `weight`. */
static inline double check_weighted_sum(const real *y, const real *weight, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)y[i] * (double)weight[i];
    return sum;
}

#endif
