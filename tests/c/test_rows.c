#include "check_exec.h"
#include "check_real.h"
#include "ops/rows.h"

static const int64_t sizes[] = {0, 1, 7, 97, 40009};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

typedef struct run {
    int64_t n, D;
    real *y, *a, *b, *features, *dfeatures;
    int64_t *index;
    int32_t *token;
    bool finite;
} run;

/* n rows of D; tables of 11 rows. */
static run new_run(int64_t n, int64_t D)
{
    run r = {n,
             D,
             check_random_reals(11 * D, 1),
             check_random_reals(n * D, 2),
             check_random_reals(11 * D, 3),
             check_random_reals(11 * D, 4),
             check_random_reals(11 * D, 5),
             check_new((size_t)n * sizeof(int64_t)),
             check_new((size_t)n * sizeof(int32_t)),
             false};
    for (int64_t i = 0; i < n; i++) {
        r.index[i] = i * i % 11;
        r.token[i] = (int32_t)(i * 7 % 11);
    }
    return r;
}

static void elementwise_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_zero(x, r->y, r->n);
    stv_copy(x, r->b, r->a, r->n);
    stv_add(x, r->features, r->a, r->b, r->n);
    stv_add(x, r->a, r->a, r->b, r->n); /* in place */
}

static void elementwise(void)
{
    for (int s = 0; s < N_SIZES; s++)
        for (int n_threads = 1; n_threads <= 4; n_threads *= 2) {
            int64_t n = sizes[s];
            run r = {.n = n, .y = check_reals(n), .a = check_random_reals(n, 1), .b = check_reals(n), .features = check_reals(n)};
            real *a = check_copy_reals(r.a, n);
            check_exec(n_threads, elementwise_exec, &r);
            bool right = true;
            for (int64_t i = 0; i < n; i++) right &= r.y[i] == 0 && r.b[i] == a[i] && r.features[i] == a[i] + a[i] && r.a[i] == r.features[i];
            CHECK(right);
        }
}

static void gather_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_gather_rows(x, r->a, r->b, r->index, r->n, r->D);
}

static void scatter_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_scatter_add_rows(x, r->y, r->a, r->index, r->n, r->D);
}

/* The sums are written out in the order of i, so the bits must agree. */
static void gather_scatter(void)
{
    static const int64_t widths[] = {1, 3, 64, 131};
    for (int w = 0; w < 4; w++)
        for (int n_threads = 1; n_threads <= 4; n_threads *= 2) {
            int64_t n = 53, D = widths[w];
            run r = new_run(n, D);
            real *y = check_copy_reals(r.y, 11 * D);
            for (int64_t i = 0; i < n; i++)
                for (int64_t c = 0; c < D; c++) y[r.index[i] * D + c] += r.a[i * D + c];
            check_exec(n_threads, scatter_exec, &r);
            CHECK_SAME_BITS("scatter", r.y, y, (size_t)(11 * D) * sizeof(real));
            check_exec(n_threads, gather_exec, &r);
            for (int64_t i = 0; i < n; i++) CHECK_SAME_BITS("gather", r.a + i * D, r.b + r.index[i] * D, (size_t)D * sizeof(real));
        }
}

static void finite_exec(stv_exec *x, void *context)
{
    run *r = context;
    r->finite = stv_all_finite(x, r->a, r->n);
}

static void all_finite(void)
{
    static const double bad[] = {INFINITY, -INFINITY, NAN};
    for (int s = 0; s < N_SIZES; s++) {
        int64_t n = sizes[s];
        run r = {.n = n, .a = check_random_reals(n, 1)};
        if (n) r.a[0] = STV_REAL_BITS == 32 ? (real)3e38 : (real)1e308;
        check_exec(2, finite_exec, &r);
        CHECK(r.finite);
        for (int64_t at = 0; at < n; at += 1 + n / 5)
            for (int b = 0; b < 3; b++) {
                real kept = r.a[at];
                r.a[at] = (real)bad[b];
                check_exec(2, finite_exec, &r);
                CHECK(!r.finite);
                r.a[at] = kept;
            }
    }
}

static void splice_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_splice_forward(x, r->a, stv_stored_reals(r->b), r->features, r->token, r->index, r->n, r->D);
}

static void unsplice_exec(stv_exec *x, void *context)
{
    run *r = context;
    stv_splice_backward(x, r->y, r->dfeatures, r->a, r->token, r->index, r->n, r->D);
}

static void splice(void)
{
    static const int64_t widths[] = {1, 67, 128};
    for (int w = 0; w < 3; w++)
        for (int n_threads = 1; n_threads <= 4; n_threads *= 2) {
            int64_t n = 41, D = widths[w];
            run r = new_run(n, D);
            for (int64_t i = 0; i < n; i++) {
                if (i % 3) r.index[i] = -1;
                else r.token[i] = -1; /* an image row has no token */
            }
            check_exec(n_threads, splice_exec, &r);
            for (int64_t i = 0; i < n; i++)
                CHECK_SAME_BITS("row", r.a + i * D, r.index[i] >= 0 ? r.features + r.index[i] * D : r.b + r.token[i] * D, (size_t)D * sizeof(real));

            real *dtable = check_copy_reals(r.y, 11 * D), *dfeatures = check_copy_reals(r.dfeatures, 11 * D);
            for (int64_t i = 0; i < n; i++)
                for (int64_t c = 0; c < D; c++) {
                    if (r.index[i] >= 0) dfeatures[r.index[i] * D + c] += r.a[i * D + c];
                    else dtable[r.token[i] * D + c] += r.a[i * D + c];
                }
            run no_table = r, no_features = r;
            no_table.y = NULL;
            no_table.dfeatures = check_copy_reals(r.dfeatures, 11 * D);
            no_features.dfeatures = NULL;
            no_features.y = check_copy_reals(r.y, 11 * D);
            check_exec(n_threads, unsplice_exec, &r);
            check_exec(n_threads, unsplice_exec, &no_table);
            check_exec(n_threads, unsplice_exec, &no_features);
            size_t size_bytes = (size_t)(11 * D) * sizeof(real);
            CHECK_SAME_BITS("dtable", r.y, dtable, size_bytes);
            CHECK_SAME_BITS("dfeatures", r.dfeatures, dfeatures, size_bytes);
            CHECK_SAME_BITS("dfeatures alone", no_table.dfeatures, dfeatures, size_bytes);
            CHECK_SAME_BITS("dtable alone", no_features.y, dtable, size_bytes);
        }
}

static const check_case cases[] = {{"elementwise", elementwise}, {"gather, scatter", gather_scatter}, {"all finite", all_finite}, {"splice", splice}};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
