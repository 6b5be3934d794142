/* reduce.h - private to ops: sums along one row, in double, over eight interleaved partial sums. The order is fixed by n alone, so the
 * bits are too, and the compiler may keep the eight in vector registers. */
#ifndef STV_OPS_REDUCE_H
#define STV_OPS_REDUCE_H

#include "tensor/real.h"

#define STV_LANES 8

static inline double stv_fold(const double lane[STV_LANES])
{
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

#define STV_REDUCE(term) \
    double lane[STV_LANES] = {0}; \
    int64_t i0 = 0; \
    for (; i0 + STV_LANES <= n; i0 += STV_LANES) \
        for (int l = 0; l < STV_LANES; l++) { \
            int64_t i = i0 + l; \
            lane[l] += (term); \
        } \
    for (int64_t i = i0; i < n; i++) lane[i - i0] += (term); \
    return stv_fold(lane)

static inline double stv_row_sum(const real *a, int64_t n) { STV_REDUCE((double)a[i]); }
static inline double stv_row_dot(const real *a, const real *b, int64_t n) { STV_REDUCE((double)a[i] * (double)b[i]); }
static inline double stv_row_dot3(const real *a, const real *b, const real *c, int64_t n) { STV_REDUCE((double)a[i] * (double)b[i] * (double)c[i]); }
static inline double stv_row_spread(const real *a, double mean, int64_t n) { STV_REDUCE(((double)a[i] - mean) * ((double)a[i] - mean)); }

/* The largest element, at least `floor`; NaN is passed over. */
static inline real stv_row_max(const real *a, real floor, int64_t n)
{
    real lane[STV_LANES], max = floor;
    for (int l = 0; l < STV_LANES; l++) lane[l] = floor;
    int64_t i = 0;
    for (; i + STV_LANES <= n; i += STV_LANES)
        for (int l = 0; l < STV_LANES; l++) lane[l] = a[i + l] > lane[l] ? a[i + l] : lane[l];
    for (; i < n; i++) max = a[i] > max ? a[i] : max;
    for (int l = 0; l < STV_LANES; l++) max = lane[l] > max ? lane[l] : max;
    return max;
}

#undef STV_REDUCE

#endif
