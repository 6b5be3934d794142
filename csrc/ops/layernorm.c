#include "ops/layernorm.h"

#include "ops/reduce.h"
#include "ops/rows.h"
#include "ops/split.h"

#include <math.h>

typedef struct forward_args {
    real *y, *stats;
    const real *in, *weight, *bias;
    double eps;
    int64_t D;
} forward_args;

static void forward_rows(const void *arg, int64_t begin, int64_t end)
{
    const forward_args *a = arg;
    const real *weight = a->weight, *bias = a->bias;
    int64_t D = a->D;
    for (int64_t r = begin; r < end; r++) {
        const real *in = a->in + r * D;
        real *y = a->y + r * D;
        /* Two passes: E[x^2] - mean^2 would lose everything when the mean is large. */
        double exact_mean = stv_row_sum(in, D) / (double)D;
        real mean = (real)exact_mean, rstd = (real)(1 / sqrt(stv_row_spread(in, exact_mean, D) / (double)D + a->eps));
        for (int64_t i = 0; i < D; i++) y[i] = weight[i] * ((in[i] - mean) * rstd) + bias[i];
        a->stats[2 * r] = mean;
        a->stats[2 * r + 1] = rstd;
    }
}

void stv_layernorm_forward(stv_exec *x, real *y, real *stats, const real *in, const stv_norm *norm, int64_t rows, int64_t D)
{
    size_t mark = stv_arena_mark(x->arena);
    forward_args args = {y, stats, in, stv_widened(x, norm->weight, D), stv_widened(x, norm->bias, D), norm->eps, D};
    if (!stv_measuring(x)) stv_split(x, rows, stv_row_grain(D), forward_rows, &args);
    stv_arena_release(x->arena, mark);
}

typedef struct backward_args {
    real *din;
    const real *dy, *in, *stats, *weight;
    const stv_norm *norm;
    int64_t rows, D;
} backward_args;

/* With xhat = (x - mean) rstd and g = dy w:  dx = rstd (g - mean(g) - xhat mean(g xhat)). */
static void backward_rows(const void *arg, int64_t begin, int64_t end)
{
    const backward_args *a = arg;
    const real *weight = a->weight;
    int64_t D = a->D;
    for (int64_t r = begin; r < end; r++) {
        const real *dy = a->dy + r * D, *in = a->in + r * D;
        real *din = a->din + r * D, mean = a->stats[2 * r], rstd = a->stats[2 * r + 1];
        double sum_g = stv_row_dot(dy, weight, D);
        double sum_g_xhat = (stv_row_dot3(dy, weight, in, D) - (double)mean * sum_g) * (double)rstd;
        real mean_g = (real)(sum_g / (double)D), along = (real)(sum_g_xhat / (double)D * (double)rstd);
        for (int64_t i = 0; i < D; i++) din[i] += rstd * (dy[i] * weight[i] - mean_g - (in[i] - mean) * along);
    }
}

static void backward_columns(const void *arg, int64_t begin, int64_t end)
{
    const backward_args *a = arg;
    int64_t D = a->D, n = end - begin;
    double dweight[STV_COLUMN_GRAIN] = {0}, dbias[STV_COLUMN_GRAIN] = {0};
    for (int64_t r = 0; r < a->rows; r++) {
        const real *dy = a->dy + r * D + begin, *in = a->in + r * D + begin;
        double mean = (double)a->stats[2 * r], rstd = (double)a->stats[2 * r + 1];
        for (int64_t i = 0; i < n; i++) {
            dweight[i] += (double)dy[i] * (((double)in[i] - mean) * rstd);
            dbias[i] += (double)dy[i];
        }
    }
    for (int64_t i = 0; i < n && a->norm->dweight; i++) a->norm->dweight[begin + i] += (real)dweight[i];
    for (int64_t i = 0; i < n && a->norm->dbias; i++) a->norm->dbias[begin + i] += (real)dbias[i];
}

void stv_layernorm_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *stats, const stv_norm *norm, int64_t rows,
                                int64_t D)
{
    size_t mark = stv_arena_mark(x->arena);
    backward_args args = {din, dy, in, stats, stv_widened(x, norm->weight, D), norm, rows, D};
    if ((norm->dweight || norm->dbias) && !stv_measuring(x)) stv_split(x, D, STV_COLUMN_GRAIN, backward_columns, &args);
    if (!stv_measuring(x)) stv_split(x, rows, stv_row_grain(D), backward_rows, &args);
    stv_arena_release(x->arena, mark);
}
