#include "check_exec.h"
#include "check_real.h"
#include "ops/layernorm.h"

typedef struct shape {
    int64_t rows, D;
} shape;
static const shape shapes[] = {{1, 1}, {1, 7}, {3, 2}, {5, 8}, {7, 31}, {300, 67}, {2, 1024}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

typedef struct run {
    int64_t rows, D;
    real *in, *weight, *bias, *dy, *y, *stats, *din, *dweight, *dbias;
    bool frozen;
} run;

static run new_run(shape s)
{
    int64_t n = s.rows * s.D;
    run r = {s.rows,
             s.D,
             check_random_reals(n, 1),
             check_random_reals(s.D, 2),
             check_random_reals(s.D, 3),
             check_random_reals(n, 4),
             check_reals(n),
             check_reals(2 * s.rows),
             check_random_reals(n, 5),
             check_random_reals(s.D, 6),
             check_random_reals(s.D, 7),
             false};
    return r;
}

static stv_norm norm_of(const run *r)
{
    return (stv_norm){stv_stored_reals(r->weight), stv_stored_reals(r->bias), r->frozen ? NULL : r->dweight, r->frozen ? NULL : r->dbias, 1e-5};
}

static void forward(stv_exec *x, void *context)
{
    run *r = context;
    stv_norm norm = norm_of(r);
    stv_layernorm_forward(x, r->y, r->stats, r->in, &norm, r->rows, r->D);
}

static void backward(stv_exec *x, void *context)
{
    run *r = context;
    stv_norm norm = norm_of(r);
    stv_layernorm_backward_add(x, r->din, r->dy, r->in, r->stats, &norm, r->rows, r->D);
}

/* Plain loops in double. */
static void naive(const run *r, double *y, double *din, double *dweight, double *dbias)
{
    int64_t D = r->D;
    double n = (double)D;
    for (int64_t c = 0; c < D; c++) {
        dweight[c] = (double)r->dweight[c];
        dbias[c] = (double)r->dbias[c];
    }
    for (int64_t i = 0; i < r->rows; i++) {
        const real *in = r->in + i * D, *dy = r->dy + i * D;
        double mean = 0, variance = 0, mean_g = 0, mean_gx = 0;
        for (int64_t c = 0; c < D; c++) mean += (double)in[c] / n;
        for (int64_t c = 0; c < D; c++) variance += ((double)in[c] - mean) * ((double)in[c] - mean) / n;
        double rstd = 1 / sqrt(variance + 1e-5);
        for (int64_t c = 0; c < D; c++) {
            double xhat = ((double)in[c] - mean) * rstd, g = (double)dy[c] * (double)r->weight[c];
            y[i * D + c] = (double)r->weight[c] * xhat + (double)r->bias[c];
            mean_g += g / n;
            mean_gx += g * xhat / n;
            dweight[c] += (double)dy[c] * xhat;
            dbias[c] += (double)dy[c];
        }
        for (int64_t c = 0; c < D; c++) {
            double xhat = ((double)in[c] - mean) * rstd, g = (double)dy[c] * (double)r->weight[c];
            din[i * D + c] = (double)r->din[i * D + c] + rstd * (g - mean_g - xhat * mean_gx);
        }
    }
}

static void values(void)
{
    for (int s = 0; s < N_SHAPES; s++) {
        run r = new_run(shapes[s]);
        size_t rows_bytes = (size_t)(r.rows * r.D) * sizeof(double), row_bytes = (size_t)r.D * sizeof(double);
        double *y = check_new(rows_bytes), *din = check_new(rows_bytes), *dweight = check_new(row_bytes), *dbias = check_new(row_bytes);
        naive(&r, y, din, dweight, dbias);
        check_exec(2, forward, &r);
        check_exec(2, backward, &r);
        CHECK_MREL("y", r.y, y, r.rows * r.D, CHECK_TOLERANCE);
        CHECK_MREL("din", r.din, din, r.rows * r.D, CHECK_TOLERANCE);
        CHECK_MREL("dweight", r.dweight, dweight, r.D, CHECK_TOLERANCE);
        CHECK_MREL("dbias", r.dbias, dbias, r.D, CHECK_TOLERANCE);
    }
}

#if STV_REAL_BITS == 64
static double loss(void *context)
{
    run *r = context;
    check_exec(1, forward, r);
    return check_weighted_sum(r->y, r->dy, r->rows * r->D);
}

static void gradients(void)
{
    run r = new_run((shape){3, 11});
    memset(r.din, 0, (size_t)(r.rows * r.D) * sizeof(real));
    memset(r.dweight, 0, (size_t)r.D * sizeof(real));
    memset(r.dbias, 0, (size_t)r.D * sizeof(real));
    check_exec(1, forward, &r);
    check_exec(1, backward, &r);
    check_gradient("din", loss, &r, r.in, r.din, r.rows * r.D, 1e-6);
    check_gradient("dweight", loss, &r, r.weight, r.dweight, r.D, 1e-6);
    check_gradient("dbias", loss, &r, r.bias, r.dbias, r.D, 1e-6);
}
#endif

static void frozen(void)
{
    run r = new_run((shape){5, 9}), f = new_run((shape){5, 9});
    f.frozen = true;
    real *kept = check_copy_reals(f.dweight, 9);
    check_exec(1, forward, &r);
    check_exec(1, forward, &f);
    check_exec(1, backward, &r);
    check_exec(1, backward, &f);
    CHECK_SAME_BITS("din", r.din, f.din, 5 * 9 * sizeof(real));
    CHECK_SAME_BITS("dweight", f.dweight, kept, 9 * sizeof(real));
}

static void threads(void)
{
    shape s = {700, 200};
    run one = new_run(s);
    check_exec(1, forward, &one);
    check_exec(1, backward, &one);
    for (int n_threads = 2; n_threads <= 4; n_threads += 2) {
        run many = new_run(s);
        check_exec(n_threads, forward, &many);
        check_exec(n_threads, backward, &many);
        CHECK_SAME_BITS("y", one.y, many.y, (size_t)(s.rows * s.D) * sizeof(real));
        CHECK_SAME_BITS("din", one.din, many.din, (size_t)(s.rows * s.D) * sizeof(real));
        CHECK_SAME_BITS("dweight", one.dweight, many.dweight, (size_t)s.D * sizeof(real));
        CHECK_SAME_BITS("dbias", one.dbias, many.dbias, (size_t)s.D * sizeof(real));
    }
}

static void extremes(void)
{
    run none = new_run((shape){0, 16});
    real *kept = check_copy_reals(none.dbias, 16);
    check_exec(2, forward, &none);
    check_exec(2, backward, &none);
    CHECK_SAME_BITS("no rows leave dbias alone", none.dbias, kept, 16 * sizeof(real));

    /* Mean 1000, spread 1: E[x^2] - mean^2 in f32 would have lost 6 of 7 digits. What is left is the rounding of the inputs' mean. */
    run far = new_run((shape){4, 64});
    for (int i = 0; i < 4 * 64; i++) far.in[i] += 1000;
    double y[4 * 64], din[4 * 64], dweight[64], dbias[64];
    naive(&far, y, din, dweight, dbias);
    check_exec(1, forward, &far);
    CHECK_MREL("far from zero", far.y, y, 4 * 64, STV_REAL_BITS == 32 ? 1e-4 : 1e-12);
}

static const check_case cases[] = {
    {"values", values},
#if STV_REAL_BITS == 64
    {"gradients", gradients},
#endif
    {"frozen", frozen},       {"threads", threads}, {"extremes", extremes},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
