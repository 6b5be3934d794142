#include "check_exec.h"
#include "check_real.h"
#include "ops/activation.h"
#include "ops/fastmath.h"

static const int64_t sizes[] = {0, 1, 7, 64, 97, 10007};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

typedef struct run {
    int64_t n;
    stv_activation kind;
    real *in, *up, *dy, *y, *din, *dup;
} run;

static run new_run(int64_t n, stv_activation kind, double scale)
{
    run r = {n, kind, check_random_reals(n, 1), check_random_reals(n, 2), check_random_reals(n, 3), check_reals(n), check_reals(n), check_reals(n)};
    for (int64_t i = 0; i < n; i++) r.in[i] *= (real)scale;
    return r;
}

static void activation(stv_exec *x, void *context)
{
    run *r = context;
    stv_activation_forward(x, r->y, r->in, r->n, r->kind);
    stv_activation_backward(x, r->din, r->dy, r->in, r->n, r->kind);
}

static void swiglu(stv_exec *x, void *context)
{
    run *r = context;
    stv_swiglu_forward(x, r->y, r->in, r->up, r->n);
    stv_swiglu_backward(x, r->din, r->dup, r->dy, r->in, r->up, r->n);
}

static double gelu(double x) { return 0.5 * x * (1 + erf(x / sqrt(2))); }
static double gelu_slope(double x) { return 0.5 * (1 + erf(x / sqrt(2))) + x * exp(-0.5 * x * x) / sqrt(2 * acos(-1)); }
static double logistic(double x) { return 1 / (1 + exp(-x)); }
static double quick_gelu(double x) { return x * logistic(1.702 * x); }
static double quick_gelu_slope(double x) { return logistic(1.702 * x) * (1 + 1.702 * x * logistic(-1.702 * x)); }
static double silu(double x) { return x * logistic(x); }
static double silu_slope(double x) { return logistic(x) * (1 + x * logistic(-x)); }

static void activation_values(void)
{
    for (int s = 0; s < N_SIZES; s++)
        for (int kind = STV_GELU; kind <= STV_QUICK_GELU; kind++) {
            int64_t n = sizes[s];
            run r = new_run(n, (stv_activation)kind, 6);
            double *y = check_new((size_t)n * sizeof *y), *din = check_new((size_t)n * sizeof *din);
            for (int64_t i = 0; i < n; i++) {
                double in = (double)r.in[i];
                y[i] = kind == STV_GELU ? gelu(in) : quick_gelu(in);
                din[i] = (double)r.dy[i] * (kind == STV_GELU ? gelu_slope(in) : quick_gelu_slope(in));
            }
            check_exec(2, activation, &r);
            CHECK_MREL("y", r.y, y, n, CHECK_TOLERANCE);
            CHECK_MREL("din", r.din, din, n, CHECK_TOLERANCE);
        }
}

static void swiglu_values(void)
{
    for (int s = 0; s < N_SIZES; s++) {
        int64_t n = sizes[s];
        run r = new_run(n, STV_GELU, 6);
        double *y = check_new((size_t)n * sizeof *y), *din = check_new((size_t)n * sizeof *din), *dup = check_new((size_t)n * sizeof *dup);
        for (int64_t i = 0; i < n; i++) {
            double gate = (double)r.in[i], up = (double)r.up[i], dy = (double)r.dy[i];
            y[i] = silu(gate) * up;
            din[i] = dy * up * silu_slope(gate);
            dup[i] = dy * silu(gate);
        }
        check_exec(2, swiglu, &r);
        CHECK_MREL("y", r.y, y, n, CHECK_TOLERANCE);
        CHECK_MREL("dgate", r.din, din, n, CHECK_TOLERANCE);
        CHECK_MREL("dup", r.dup, dup, n, CHECK_TOLERANCE);
    }
}

#if STV_REAL_BITS == 64
static double activation_loss(void *context)
{
    run *r = context;
    check_exec(1, activation, r);
    return check_weighted_sum(r->y, r->dy, r->n);
}

static double swiglu_loss(void *context)
{
    run *r = context;
    check_exec(1, swiglu, r);
    return check_weighted_sum(r->y, r->dy, r->n);
}

static void gradients(void)
{
    for (int kind = STV_GELU; kind <= STV_QUICK_GELU; kind++) {
        run r = new_run(23, (stv_activation)kind, 3);
        check_exec(1, activation, &r);
        check_gradient("activation", activation_loss, &r, r.in, check_copy_reals(r.din, r.n), r.n, 1e-6);
    }
    run r = new_run(23, STV_GELU, 3);
    check_exec(1, swiglu, &r);
    check_gradient("gate", swiglu_loss, &r, r.in, check_copy_reals(r.din, r.n), r.n, 1e-6);
    check_gradient("up", swiglu_loss, &r, r.up, check_copy_reals(r.dup, r.n), r.n, 1e-6);
}
#endif

static void in_place_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_activation_backward(x, r->dy, r->dy, r->in, r->n, r->kind);
}

static void in_place(void)
{
    for (int kind = STV_GELU; kind <= STV_QUICK_GELU; kind++) {
        run r = new_run(101, (stv_activation)kind, 3);
        check_exec(1, activation, &r);
        check_exec(1, in_place_exec, &r);
        CHECK_SAME_BITS("din over dy", r.dy, r.din, 101 * sizeof(real));
    }
}

static void threads(void)
{
    int64_t n = 30011;
    run one = new_run(n, STV_QUICK_GELU, 6), one_swiglu = new_run(n, STV_GELU, 6);
    check_exec(1, activation, &one);
    check_exec(1, swiglu, &one_swiglu);
    for (int n_threads = 2; n_threads <= 4; n_threads += 2) {
        run many = new_run(n, STV_QUICK_GELU, 6), many_swiglu = new_run(n, STV_GELU, 6);
        check_exec(n_threads, activation, &many);
        check_exec(n_threads, swiglu, &many_swiglu);
        CHECK_SAME_BITS("y", one.y, many.y, (size_t)n * sizeof(real));
        CHECK_SAME_BITS("din", one.din, many.din, (size_t)n * sizeof(real));
        CHECK_SAME_BITS("swiglu y", one_swiglu.y, many_swiglu.y, (size_t)n * sizeof(real));
        CHECK_SAME_BITS("dgate", one_swiglu.din, many_swiglu.din, (size_t)n * sizeof(real));
    }
}

/* Where the exponential over- or underflows the functions are 0 or x, never NaN. */
static void extremes(void)
{
    for (int kind = STV_GELU; kind <= STV_QUICK_GELU; kind++) {
        run r = new_run(2, (stv_activation)kind, 1);
        r.in[0] = -10000;
        r.in[1] = 10000;
        check_exec(1, activation, &r);
        CHECK(r.y[0] == 0 && r.y[1] == 10000);
        CHECK(r.din[0] == 0 && r.din[1] == r.dy[1]);
        check_exec(1, swiglu, &r);
        CHECK(r.y[0] == 0 && r.y[1] == 10000 * r.up[1]);
        CHECK(r.din[0] == 0 && r.din[1] == r.dy[1] * r.up[1]);
    }
}

/* exp_real against libm in double: within 1 ulp where the result is normal, the nearest or its neighbour where it is subnormal. */
static void exponential(void)
{
    double worst = 0;
    for (int64_t i = 0; i < 400000; i++) {
        real x = (real)(-104 + 192.7 * (double)i / 400000);
        double want = exp((double)x), got = (double)exp_real(x);
#if STV_REAL_BITS == 32
        double ulp = (double)(nextafterf((float)want, INFINITY) - (float)want);
#else
        double ulp = nextafter(want, INFINITY) - want;
#endif
        worst = fmax(worst, fabs(got - want) / ulp);
    }
    CHECK(worst <= 1);
    CHECK(exp_real(0) == 1);
    CHECK(exp_real(-INFINITY) == 0 && exp_real(INFINITY) == INFINITY && isnan(exp_real(NAN)));
    CHECK(exp_real(-100000) == 0 && exp_real(100000) == INFINITY);
}

static const check_case cases[] = {
    {"activation values", activation_values},
    {"swiglu values", swiglu_values},
#if STV_REAL_BITS == 64
    {"gradients", gradients},
#endif
    {"in place", in_place},
    {"threads", threads},
    {"extremes", extremes},
    {"exponential", exponential},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
