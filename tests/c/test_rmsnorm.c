#include "check_exec.h"
#include "check_real.h"
#include "ops/rmsnorm.h"

typedef struct shape {
    int64_t rows, D;
} shape;
static const shape shapes[] = {{1, 1}, {1, 7}, {3, 1}, {5, 8}, {7, 31}, {300, 67}, {2, 1024}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };
static const double eps = 1e-5;

typedef struct run {
    int64_t rows, D;
    real *in, *weight, *dy, *y, *rstd, *din, *dweight;
} run;

static run new_run(shape s)
{
    int64_t n = s.rows * s.D;
    run r = {s.rows,
             s.D,
             check_random_reals(n, 1),
             check_random_reals(s.D, 2),
             check_random_reals(n, 3),
             check_reals(n),
             check_reals(s.rows),
             check_random_reals(n, 4),
             check_random_reals(s.D, 5)};
    return r;
}

static void forward(stv_exec *x, void *context)
{
    run *r = context;
    stv_rmsnorm_forward(x, r->y, r->rstd, r->in, stv_stored_reals(r->weight), r->rows, r->D, eps);
}

static void backward(stv_exec *x, void *context)
{
    run *r = context;
    stv_rmsnorm_backward_add(x, r->din, r->dweight, r->dy, r->in, stv_stored_reals(r->weight), r->rstd, r->rows, r->D);
}

static void values(void)
{
    for (int s = 0; s < N_SHAPES; s++) {
        run r = new_run(shapes[s]);
        double *y = check_new((size_t)(r.rows * r.D) * sizeof *y), *rstd = check_new((size_t)r.rows * sizeof *rstd);
        for (int64_t i = 0; i < r.rows; i++) {
            double sum = 0;
            for (int64_t c = 0; c < r.D; c++) sum += (double)r.in[i * r.D + c] * (double)r.in[i * r.D + c];
            rstd[i] = 1 / sqrt(sum / (double)r.D + eps);
            for (int64_t c = 0; c < r.D; c++) y[i * r.D + c] = (double)r.weight[c] * (double)r.in[i * r.D + c] * rstd[i];
        }
        check_exec(2, forward, &r);
        CHECK_MREL("y", r.y, y, r.rows * r.D, CHECK_TOLERANCE);
        CHECK_MREL("rstd", r.rstd, rstd, r.rows, CHECK_TOLERANCE);
    }
}

/* d/dx of w x rstd written out as the full Jacobian: dy_j (w_j rstd) (delta_ij - x_i x_j rstd^2 / D). */
static void gradient_values(void)
{
    for (int s = 0; s < N_SHAPES; s++) {
        run r = new_run(shapes[s]);
        double *din = check_new((size_t)(r.rows * r.D) * sizeof *din), *dweight = check_new((size_t)r.D * sizeof *dweight);
        check_exec(1, forward, &r);
        for (int64_t c = 0; c < r.D; c++) dweight[c] = (double)r.dweight[c];
        for (int64_t i = 0; i < r.rows; i++) {
            const real *in = r.in + i * r.D, *dy = r.dy + i * r.D;
            double rstd = (double)r.rstd[i];
            for (int64_t c = 0; c < r.D; c++) {
                double sum = (double)r.din[i * r.D + c];
                for (int64_t j = 0; j < r.D; j++)
                    sum += (double)dy[j] * (double)r.weight[j] * rstd * ((c == j) - (double)in[c] * (double)in[j] * rstd * rstd / (double)r.D);
                din[i * r.D + c] = sum;
                dweight[c] += (double)dy[c] * (double)in[c] * rstd;
            }
        }
        check_exec(2, backward, &r);
        CHECK_MREL("din", r.din, din, r.rows * r.D, CHECK_TOLERANCE);
        CHECK_MREL("dweight", r.dweight, dweight, r.D, CHECK_TOLERANCE);
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
    check_exec(1, forward, &r);
    check_exec(1, backward, &r);
    check_gradient("din", loss, &r, r.in, r.din, r.rows * r.D, 1e-6);
    check_gradient("dweight", loss, &r, r.weight, r.dweight, r.D, 1e-6);
}
#endif

static void frozen_weight(void)
{
    run r = new_run((shape){5, 9}), frozen = new_run((shape){5, 9});
    frozen.dweight = NULL;
    check_exec(1, forward, &r);
    check_exec(1, forward, &frozen);
    check_exec(1, backward, &r);
    check_exec(1, backward, &frozen);
    CHECK_SAME_BITS("din", r.din, frozen.din, 5 * 9 * sizeof(real));
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
    }
}

static void extremes(void)
{
    run none = new_run((shape){0, 16});
    real *kept = check_copy_reals(none.dweight, 16);
    check_exec(2, forward, &none);
    check_exec(2, backward, &none);
    CHECK_SAME_BITS("no rows leave dweight alone", none.dweight, kept, 16 * sizeof(real));

    run zeros = new_run((shape){1, 16}); /* a row of zeros: eps alone, no NaN */
    memset(zeros.in, 0, 16 * sizeof(real));
    check_exec(1, forward, &zeros);
    for (int i = 0; i < 16; i++) CHECK(zeros.y[i] == 0);
    CHECK(fabs((double)zeros.rstd[0] * sqrt(eps) - 1) < 1e-6);
}

static const check_case cases[] = {
    {"values", values},
    {"gradient values", gradient_values},
#if STV_REAL_BITS == 64
    {"gradients", gradients},
#endif
    {"frozen weight", frozen_weight},
    {"threads", threads},
    {"extremes", extremes},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
