#include "check_exec.h"
#include "check_real.h"
#include "ops/logprob.h"

typedef struct run {
    stv_targets targets;
    int64_t D, V;
    real *h, *w, *dh, *dw;
    double *logp, *lse, *dlogp, *mean_logit;
    bool frozen;
} run;

/* Row i carries i % 3 targets (row 0: none); their numbers run backwards, so that order matters; two tokens of a row may be equal. */
static run new_run(int64_t n_rows, int64_t D, int64_t V)
{
    int64_t *row_begin = check_new((size_t)(n_rows + 1) * sizeof *row_begin), n = 0;
    row_begin[0] = 0;
    for (int64_t i = 0; i < n_rows; i++) row_begin[i + 1] = n += i % 3;
    int64_t *order = check_new((size_t)n * sizeof *order);
    int32_t *token = check_new((size_t)n * sizeof *token);
    for (int64_t t = 0; t < n; t++) {
        order[t] = n - 1 - t;
        token[t] = (int32_t)(t * 389 % V);
        if (t % 4 == 3) token[t] = token[t - 1];
        if (t == 0) token[t] = (int32_t)(V - 1);
    }
    run r = {{n_rows, n, row_begin, order, token},
             D,
             V,
             check_random_reals(n_rows * D, 1),
             check_random_reals(V * D, 2),
             check_reals(n_rows * D),
             check_random_reals(V * D, 3),
             check_new((size_t)n * sizeof(double)),
             check_new((size_t)n_rows * sizeof(double)),
             check_new((size_t)n * sizeof(double)),
             check_new((size_t)n_rows * sizeof(double)),
             false};
    check_fill(r.dlogp, n, 4);
    return r;
}

static void forward(stv_exec *x, void *context)
{
    run *r = context;
    stv_logprob_forward(x, r->logp, r->lse, r->h, stv_stored_reals(r->w), r->D, r->V, &r->targets);
}

static void backward(stv_exec *x, void *context)
{
    run *r = context;
    stv_logprob_backward(x, (stv_logprob_grads){r->dh, r->frozen ? NULL : r->dw}, r->dlogp, r->lse, r->h, stv_stored_reals(r->w), r->D, r->V,
                         &r->targets);
}

static void mean_logit(stv_exec *x, void *context)
{
    run *r = context;
    stv_mean_logit(x, r->mean_logit, r->h, stv_stored_reals(r->w), r->targets.n_rows, r->D, r->V);
}

typedef struct exact {
    double *logp, *lse, *dh, *dw, *mean_logit;
} exact;

static exact naive(const run *r)
{
    const stv_targets *targets = &r->targets;
    int64_t D = r->D, V = r->V, n_rows = targets->n_rows;
    exact e = {check_new((size_t)targets->n_targets * sizeof(double)), check_new((size_t)n_rows * sizeof(double)),
               check_new((size_t)(n_rows * D) * sizeof(double)), check_new((size_t)(V * D) * sizeof(double)),
               check_new((size_t)n_rows * sizeof(double))};
    double *logit = check_new((size_t)V * sizeof *logit);
    for (int64_t i = 0; i < V * D; i++) e.dw[i] = (double)r->dw[i];
    for (int64_t i = 0; i < n_rows; i++) {
        double max = -INFINITY, sum = 0, total = 0, mean = 0;
        for (int64_t v = 0; v < V; v++) {
            logit[v] = 0;
            for (int64_t d = 0; d < D; d++) logit[v] += (double)r->h[i * D + d] * (double)r->w[v * D + d];
            max = fmax(max, logit[v]);
            mean += logit[v] / (double)V;
        }
        e.mean_logit[i] = mean;
        for (int64_t v = 0; v < V; v++) sum += exp(logit[v] - max);
        e.lse[i] = max + log(sum);
        for (int64_t d = 0; d < D; d++) e.dh[i * D + d] = 0;
        for (int64_t j = targets->row_begin[i]; j < targets->row_begin[i + 1]; j++) {
            int64_t t = targets->order[j], v = targets->token[t];
            e.logp[t] = logit[v] - e.lse[i];
            total += r->dlogp[t];
            for (int64_t d = 0; d < D; d++) {
                e.dh[i * D + d] += r->dlogp[t] * (double)r->w[v * D + d];
                e.dw[v * D + d] += r->dlogp[t] * (double)r->h[i * D + d];
            }
        }
        for (int64_t v = 0; v < V; v++) {
            double p = exp(logit[v] - e.lse[i]);
            for (int64_t d = 0; d < D; d++) {
                e.dh[i * D + d] -= total * p * (double)r->w[v * D + d];
                e.dw[v * D + d] -= total * p * (double)r->h[i * D + d];
            }
        }
    }
    return e;
}

static const int64_t shapes[][3] = {{1, 1, 1}, {4, 7, 2}, {5, 16, 511}, {11, 24, 512}, {7, 33, 513}, {23, 17, 1603}, {0, 8, 600}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static void values(void)
{
    for (int s = 0; s < N_SHAPES; s++)
        for (int scale = 1; scale <= 30; scale += 29) { /* flat and peaked distributions */
            run r = new_run(shapes[s][0], shapes[s][1], shapes[s][2]);
            for (int64_t i = 0; i < r.targets.n_rows * r.D; i++) r.h[i] *= (real)scale;
            exact e = naive(&r);
            check_exec(2, forward, &r);
            check_exec(2, backward, &r);
            check_exec(2, mean_logit, &r);
            CHECK_MREL("logp", r.logp, e.logp, r.targets.n_targets, CHECK_TOLERANCE);
            CHECK_MREL("lse", r.lse, e.lse, r.targets.n_rows, CHECK_TOLERANCE);
            CHECK_MREL("mean logit", r.mean_logit, e.mean_logit, r.targets.n_rows, CHECK_TOLERANCE);
            /* A logit of size scale * D carries an error of that size times 6e-8, and p = exp(logit - lse) inherits it. */
            double tolerance = CHECK_TOLERANCE * (1 + scale);
            CHECK_MREL("dh", r.dh, e.dh, r.targets.n_rows * r.D, tolerance);
            CHECK_MREL("dw", r.dw, e.dw, r.V * r.D, tolerance);
        }
}

#if STV_REAL_BITS == 64
static double loss(void *context)
{
    run *r = context;
    check_exec(1, forward, r);
    return check_weighted_sum(r->logp, r->dlogp, r->targets.n_targets);
}

static void gradients(void)
{
    run r = new_run(8, 6, 515);
    memset(r.dw, 0, (size_t)(r.V * r.D) * sizeof(real));
    check_exec(1, forward, &r);
    check_exec(1, backward, &r);
    check_gradient("dh", loss, &r, r.h, r.dh, 8 * 6, 1e-6);
    check_gradient("dw", loss, &r, r.w, r.dw, 515 * 6, 1e-6);
}
#endif

static void frozen(void)
{
    run r = new_run(5, 9, 600), f = new_run(5, 9, 600);
    real *kept = check_copy_reals(f.dw, 600 * 9);
    f.frozen = true;
    check_exec(1, forward, &r);
    check_exec(1, forward, &f);
    check_exec(1, backward, &r);
    check_exec(1, backward, &f);
    CHECK_SAME_BITS("dh", r.dh, f.dh, 5 * 9 * sizeof(real));
    CHECK_SAME_BITS("dw", f.dw, kept, 600 * 9 * sizeof(real));
}

/* A row's log-probabilities have the same bits alone and among others. */
static void batch_invariance(void)
{
    run many = new_run(60, 32, 700);
    check_exec(2, forward, &many);
    for (int64_t row = 1; row < 60; row += 7) {
        int64_t first = many.targets.row_begin[row], n = many.targets.row_begin[row + 1] - first, begin[2] = {0, n};
        if (n == 0) continue;
        run one = many;
        one.targets = (stv_targets){1, many.targets.n_targets, begin, many.targets.order + first, many.targets.token};
        one.h = many.h + row * 32;
        one.logp = check_new((size_t)many.targets.n_targets * sizeof(double));
        one.lse = check_new(sizeof(double));
        check_exec(1, forward, &one);
        CHECK_SAME_BITS("lse", one.lse, many.lse + row, sizeof(double));
        for (int64_t i = 0; i < n; i++) {
            int64_t t = many.targets.order[first + i];
            CHECK_SAME_BITS("logp", one.logp + t, many.logp + t, sizeof(double));
        }
    }
}

static void threads(void)
{
    run one = new_run(150, 40, 1300);
    check_exec(1, forward, &one);
    check_exec(1, backward, &one);
    check_exec(1, mean_logit, &one);
    for (int n_threads = 2; n_threads <= 4; n_threads += 2) {
        run many = new_run(150, 40, 1300);
        check_exec(n_threads, forward, &many);
        check_exec(n_threads, backward, &many);
        check_exec(n_threads, mean_logit, &many);
        CHECK_SAME_BITS("logp", one.logp, many.logp, (size_t)one.targets.n_targets * sizeof(double));
        CHECK_SAME_BITS("dh", one.dh, many.dh, 150 * 40 * sizeof(real));
        CHECK_SAME_BITS("dw", one.dw, many.dw, 1300 * 40 * sizeof(real));
        CHECK_SAME_BITS("mean logit", one.mean_logit, many.mean_logit, 150 * sizeof(double));
    }
}

/* Logits of +-10^4, the largest in the second strip: log-probabilities 0 and -20000, no overflow, gradients exact. */
static void extremes(void)
{
    int64_t row_begin[] = {0, 2}, order[] = {0, 1};
    int32_t token[] = {600, 3};
    run r = new_run(1, 1, 1000);
    r.targets = (stv_targets){1, 2, row_begin, order, token};
    r.logp = check_new(2 * sizeof(double));
    r.dlogp = check_new(2 * sizeof(double));
    r.dlogp[0] = 1;
    r.dlogp[1] = 0.5;
    r.h[0] = 100;
    for (int64_t v = 0; v < 1000; v++) {
        r.w[v] = v == 600 ? 100 : -100;
        r.dw[v] = 0;
    }
    check_exec(1, forward, &r);
    check_exec(1, backward, &r);
    CHECK(r.lse[0] == 10000 && r.logp[0] == 0 && r.logp[1] == -20000);
    CHECK(r.dw[600] == 100 * (1 - 1.5) && r.dw[3] == 100 * 0.5 && r.dw[0] == 0);
    CHECK(r.dh[0] == 100 * (1 - 1.5) - 100 * 0.5);
}

static const check_case cases[] = {
    {"values", values},
#if STV_REAL_BITS == 64
    {"gradients", gradients},
#endif
    {"frozen", frozen},       {"batch invariance", batch_invariance}, {"threads", threads}, {"extremes", extremes},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
