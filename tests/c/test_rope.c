#include "check_exec.h"
#include "check_real.h"
#include "ops/rope.h"

typedef struct run {
    int64_t rows, n_heads, head_dim;
    int32_t *position;
    real *angles, *qk;
    bool backward;
} run;

static run new_run(int64_t rows, int64_t n_heads, int64_t head_dim)
{
    run r = {rows,
             n_heads,
             head_dim,
             check_new((size_t)rows * sizeof(int32_t)),
             check_reals(rows * head_dim),
             check_random_reals(rows * n_heads * head_dim, 1),
             false};
    for (int64_t i = 0; i < rows; i++) r.position[i] = (int32_t)(i * 37 % 4096);
    return r;
}

static void angles(stv_exec *x, void *context)
{
    run *r = context;
    stv_rope_angles(x, r->angles, r->position, r->rows, r->head_dim, 10000);
}

static void rotate(stv_exec *x, void *context)
{
    run *r = context;
    if (r->backward) stv_rope_backward(x, r->qk, r->angles, r->rows, r->n_heads, r->head_dim);
    else stv_rope_forward(x, r->qk, r->angles, r->rows, r->n_heads, r->head_dim);
}

static void values(void)
{
    static const int64_t shapes[][3] = {{1, 1, 2}, {3, 5, 6}, {2, 1, 128}, {101, 3, 24}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        run r = new_run(shapes[s][0], shapes[s][1], shapes[s][2]);
        int64_t half = r.head_dim / 2, n = r.rows * r.n_heads * r.head_dim;
        double *want_angles = check_new((size_t)(r.rows * r.head_dim) * sizeof(double)), *want = check_new((size_t)n * sizeof(double));
        for (int64_t row = 0; row < r.rows; row++)
            for (int64_t i = 0; i < half; i++) {
                double angle = r.position[row] * pow(10000, -2.0 * (double)i / (double)r.head_dim);
                want_angles[(row * half + i) * 2] = cos(angle);
                want_angles[(row * half + i) * 2 + 1] = sin(angle);
                for (int64_t h = 0; h < r.n_heads; h++) {
                    int64_t at = (row * r.n_heads + h) * r.head_dim + i;
                    double a = (double)r.qk[at], b = (double)r.qk[at + half];
                    want[at] = a * cos(angle) - b * sin(angle);
                    want[at + half] = b * cos(angle) + a * sin(angle);
                }
            }
        check_exec(2, angles, &r);
        check_exec(2, rotate, &r);
        /* f64: an angle of some thousands carries 1e-12 of its own rounding. */
        double tolerance = STV_REAL_BITS == 32 ? CHECK_TOLERANCE : 1e-11;
        CHECK_MREL("angles", r.angles, want_angles, r.rows * r.head_dim, tolerance);
        CHECK_MREL("rotated", r.qk, want, n, tolerance);
    }
}

/* A rotation's transpose is its inverse: <R x, y> = <x, R^T y>, and R^T R = 1. */
static void backward(void)
{
    run r = new_run(13, 3, 10), g = new_run(13, 3, 10);
    int64_t n = 13 * 3 * 10;
    real *x = check_copy_reals(r.qk, n), *y = check_random_reals(n, 2);
    memcpy(g.qk, y, (size_t)n * sizeof(real));
    check_exec(1, angles, &r);
    check_exec(1, angles, &g);
    check_exec(1, rotate, &r);
    g.backward = true;
    check_exec(1, rotate, &g);
    double left = check_weighted_sum(r.qk, y, n), right = check_weighted_sum(x, g.qk, n);
    CHECK(fabs(left - right) <= 100 * CHECK_TOLERANCE * fabs(left));
    r.backward = true;
    check_exec(1, rotate, &r);
    CHECK_MREL("there and back", r.qk, x, n, CHECK_TOLERANCE);
}

static void threads(void)
{
    run one = new_run(403, 4, 64);
    check_exec(1, angles, &one);
    check_exec(1, rotate, &one);
    for (int n_threads = 2; n_threads <= 4; n_threads += 2) {
        run many = new_run(403, 4, 64);
        check_exec(n_threads, angles, &many);
        check_exec(n_threads, rotate, &many);
        CHECK_SAME_BITS("angles", one.angles, many.angles, 403 * 64 * sizeof(real));
        CHECK_SAME_BITS("qk", one.qk, many.qk, 403 * 4 * 64 * sizeof(real));
    }
    run none = new_run(0, 4, 64);
    check_exec(2, angles, &none);
    check_exec(2, rotate, &none);
}

static const check_case cases[] = {{"values", values}, {"backward", backward}, {"threads", threads}};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
