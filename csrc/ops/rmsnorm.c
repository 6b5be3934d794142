#include "ops/rmsnorm.h"

#include "ops/reduce.h"
#include "ops/rows.h"
#include "ops/split.h"

#include <math.h>

typedef struct forward_args {
    real *y, *rstd;
    const real *in, *weight;
    int64_t D;
    double eps;
} forward_args;

static void forward_rows(const void *arg, int64_t begin, int64_t end)
{
    const forward_args *a = arg;
    int64_t D = a->D;
    for (int64_t r = begin; r < end; r++) {
        const real *in = a->in + r * D;
        real *y = a->y + r * D;
        real rstd = (real)(1 / sqrt(stv_row_dot(in, in, D) / (double)D + a->eps));
        for (int64_t i = 0; i < D; i++) y[i] = a->weight[i] * (in[i] * rstd);
        a->rstd[r] = rstd;
    }
}

void stv_rmsnorm_forward(stv_exec *x, real *y, real *rstd, const real *in, stv_stored weight, int64_t rows, int64_t D, double eps)
{
    size_t mark = stv_arena_mark(x->arena);
    forward_args args = {y, rstd, in, stv_widened(x, weight, D), D, eps};
    if (!stv_measuring(x)) stv_split(x, rows, stv_row_grain(D), forward_rows, &args);
    stv_arena_release(x->arena, mark);
}

typedef struct backward_args {
    real *din, *dweight;
    const real *dy, *in, *weight, *rstd;
    int64_t rows, D;
} backward_args;

/* With xhat = x rstd and g = dy w:  dx = rstd (g - xhat mean(g xhat)). */
static void backward_rows(const void *arg, int64_t begin, int64_t end)
{
    const backward_args *a = arg;
    int64_t D = a->D;
    for (int64_t r = begin; r < end; r++) {
        const real *dy = a->dy + r * D, *in = a->in + r * D;
        real *din = a->din + r * D, rstd = a->rstd[r];
        double mean = stv_row_dot3(dy, a->weight, in, D) * (double)rstd / (double)D;
        real along = (real)(mean * (double)rstd);
        for (int64_t i = 0; i < D; i++) din[i] += rstd * (dy[i] * a->weight[i] - in[i] * along);
    }
}

static void backward_columns(const void *arg, int64_t begin, int64_t end)
{
    const backward_args *a = arg;
    int64_t D = a->D, n = end - begin;
    double sum[STV_COLUMN_GRAIN] = {0};
    for (int64_t r = 0; r < a->rows; r++) {
        const real *dy = a->dy + r * D + begin, *in = a->in + r * D + begin;
        double rstd = (double)a->rstd[r];
        for (int64_t i = 0; i < n; i++) sum[i] += (double)dy[i] * ((double)in[i] * rstd);
    }
    for (int64_t i = 0; i < n; i++) a->dweight[begin + i] += (real)sum[i];
}

void stv_rmsnorm_backward_add(stv_exec *x, real *din, real *dweight, const real *dy, const real *in, stv_stored weight, const real *rstd,
                              int64_t rows, int64_t D)
{
    size_t mark = stv_arena_mark(x->arena);
    backward_args args = {din, dweight, dy, in, stv_widened(x, weight, D), rstd, rows, D};
    if (dweight && !stv_measuring(x)) stv_split(x, D, STV_COLUMN_GRAIN, backward_columns, &args);
    if (!stv_measuring(x)) stv_split(x, rows, stv_row_grain(D), backward_rows, &args);
    stv_arena_release(x->arena, mark);
}
