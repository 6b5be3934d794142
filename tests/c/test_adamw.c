/* AdamW against a literal transcription of the update in double, untouched elements, the gradient norm, threads, the schedules. */
#include "check.h"
#include "train/adamw.h"

enum { N = 40000 }; /* more than two blocks, not a multiple of one */

static void update_equals_formula(void)
{
    real *theta = check_new(N * sizeof(real)), *m = check_new(N * sizeof(real)), *v = check_new(N * sizeof(real));
    real *grad = check_new(N * sizeof(real)), *start = check_new(N * sizeof(real)), *other = check_new(3 * N * sizeof(real));
    double *want = check_new(N * sizeof(double)), *wm = check_new(N * sizeof(double)), *wv = check_new(N * sizeof(double));
    check_fill(theta, N, 1);
    memcpy(start, theta, N * sizeof(real));
    memset(m, 0, N * sizeof(real));
    memset(v, 0, N * sizeof(real));
    for (int i = 0; i < N; i++) want[i] = (double)theta[i], wm[i] = wv[i] = 0;
    memcpy(other, theta, N * sizeof(real));
    memset(other + N, 0, 2 * N * sizeof(real));
    stv_pool *one, *four;
    CHECK(stv_pool_create(&one, 1) == STV_OK && stv_pool_create(&four, 4) == STV_OK);
    stv_adamw_range range = {3, N - 5, 1e-3, 0.1};
    for (int step = 1; step <= 5; step++) {
        stv_adamw_config c = {0.9, 0.999, 1e-8, step, 0.5};
        check_fill(grad, N, 100 + (uint64_t)step);
        stv_adamw_update(one, theta, m, v, grad, &range, &c);
        stv_adamw_update(four, other, other + N, other + 2 * N, grad, &range, &c);
        for (int i = 3; i < N - 5; i++) {
            double g = 0.5 * (double)grad[i];
            want[i] *= 1 - 1e-3 * 0.1;
            wm[i] = 0.9 * wm[i] + (1 - 0.9) * g;
            wv[i] = 0.999 * wv[i] + (1 - 0.999) * g * g;
            want[i] -= 1e-3 / (1 - pow(0.9, step)) * wm[i] / (sqrt(wv[i]) / sqrt(1 - pow(0.999, step)) + 1e-8);
        }
    }
    double tolerance = sizeof(real) == 4 ? 1e-6 : 1e-14; /* five roundings of one update each */
    CHECK_MREL("theta", theta, want, N, tolerance);
    CHECK_MREL("m", m, wm, N - 5, tolerance);
    CHECK_MREL("v", v, wv, N - 5, tolerance);
    CHECK_SAME_BITS("1 and 4 threads", theta, other, N * sizeof(real));
    CHECK_SAME_BITS("before the range", theta, start, 3 * sizeof(real));
    CHECK_SAME_BITS("behind the range", theta + N - 5, start + N - 5, 5 * sizeof(real));
    stv_pool_free(one);
    stv_pool_free(four);
}

static void norm(void)
{
    real *grad = check_new(N * sizeof(real));
    check_fill(grad, N, 7);
    double want = 0;
    for (int i = 11; i < N - 2; i++) want += (double)grad[i] * (double)grad[i];
    double got = stv_sum_of_squares(grad, 11, N - 2);
    CHECK_MREL("sum of squares", &got, &want, 1, 1e-13);
    CHECK(stv_sum_of_squares(grad, 5, 5) == 0);
    grad[20000] = (real)NAN;
    CHECK(isnan(stv_sum_of_squares(grad, 0, N)));
}

/* lambda(t) of notes on transformers 4.31: first update at 0, cosine to 0 at the end. */
static void schedules(void)
{
    CHECK(stv_schedule(STV_SCHEDULE_COSINE, 0, 3, 20, 0) == 0);
    CHECK(stv_schedule(STV_SCHEDULE_COSINE, 3, 3, 20, 0) == 1);
    CHECK(fabs(stv_schedule(STV_SCHEDULE_COSINE, 1, 3, 20, 0) - 1.0 / 3) < 1e-15);
    CHECK(fabs(stv_schedule(STV_SCHEDULE_COSINE, 10, 0, 20, 0) - 0.5) < 1e-15);
    CHECK(fabs(stv_schedule(STV_SCHEDULE_COSINE, 10, 0, 20, 0.02) - 0.51) < 1e-15);
    CHECK(fabs(stv_schedule(STV_SCHEDULE_LINEAR, 15, 10, 20, 0) - 0.5) < 1e-15);
    CHECK(stv_schedule(STV_SCHEDULE_LINEAR, 25, 10, 20, 0) == 0 && stv_schedule(STV_SCHEDULE_COSINE, 25, 10, 20, 0.1) == 0.1);
    CHECK(stv_schedule(STV_SCHEDULE_CONSTANT, 999, 10, 20, 0) == 1 && stv_schedule(STV_SCHEDULE_CONSTANT, 0, 0, 0, 0) == 1);
}

int main(int argc, char **argv)
{
    static const check_case cases[] = {{"update equals formula", update_equals_formula}, {"norm", norm}, {"schedules", schedules}};
    return CHECK_RUN(cases);
}
