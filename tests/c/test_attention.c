#include "base/cpu.h"
#include "check_exec.h"
#include "check_real.h"
#include "ops/attention.h"
#include "ops/attention_kernel.h"

/* Segments name their spans by value here; lay_out() turns a list of them into a plan. */
typedef struct segment {
    int64_t q_row, q_count, n_spans;
    stv_span spans[6];
} segment;

typedef struct run {
    stv_attn_plan plan;
    stv_attn_shape shape;
    int64_t n_rows, q_size, k_size; /* query and key rows have the same numbers */
    real *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv;
} run;

static run new_run(const segment *segments, int64_t n_segments, const int64_t *group_begin, int64_t n_groups, int64_t n_rows, stv_attn_shape shape)
{
    stv_attn_segment *laid = check_new((size_t)n_segments * sizeof *laid);
    stv_span *spans = check_new((size_t)n_segments * 6 * sizeof *spans);
    int64_t n_spans = 0;
    for (int64_t s = 0; s < n_segments; s++) {
        laid[s] = (stv_attn_segment){segments[s].q_row, segments[s].q_count, n_spans, segments[s].n_spans};
        for (int64_t i = 0; i < segments[s].n_spans; i++) spans[n_spans++] = segments[s].spans[i];
    }
    run r = {.plan = {laid, spans, group_begin, n_segments, n_groups, true, 0}, .shape = shape, .n_rows = n_rows};
    r.q_size = n_rows * shape.n_heads * shape.head_dim;
    r.k_size = n_rows * shape.n_kv_heads * shape.head_dim;
    r.q = check_random_reals(r.q_size, 1);
    r.k = check_random_reals(r.k_size, 2);
    r.v = check_random_reals(r.k_size, 3);
    r.dout = check_random_reals(r.q_size, 4);
    r.out = check_reals(r.q_size);
    r.lse = check_reals(n_rows * shape.n_heads);
    r.dq = check_reals(r.q_size);
    r.dk = check_reals(r.k_size);
    r.dv = check_reals(r.k_size);
    return r;
}

static void forward(stv_exec *x, void *context)
{
    run *r = context;
    stv_attention_forward(x, r->out, r->lse, r->q, r->k, r->v, &r->plan, r->shape);
}

static void backward(stv_exec *x, void *context)
{
    run *r = context;
    stv_attn_saved saved = {r->q, r->k, r->v, r->out, r->lse};
    stv_attention_backward(x, r->dq, r->dk, r->dv, r->dout, &saved, &r->plan, r->shape, r->n_rows);
}

typedef struct exact {
    double *out, *lse, *dq, *dk, *dv;
} exact;

/* The definition, one query and head at a time, in double. Rows of no segment stay NaN in out, lse and dq, as check_new left them. */
static exact naive(const run *r)
{
    int64_t H = r->shape.n_heads, K = r->shape.n_kv_heads, hd = r->shape.head_dim;
    exact e = {check_new((size_t)r->q_size * sizeof(double)), check_new((size_t)(r->n_rows * H) * sizeof(double)),
               check_new((size_t)r->q_size * sizeof(double)), check_new((size_t)r->k_size * sizeof(double)),
               check_new((size_t)r->k_size * sizeof(double))};
    for (int64_t i = 0; i < r->k_size; i++) e.dk[i] = e.dv[i] = 0;
    int64_t rows[512];
    double p[512];
    for (int64_t s = 0; s < r->plan.n_segments; s++) {
        const stv_attn_segment *segment = &r->plan.segments[s];
        int64_t n_keys = 0;
        for (int64_t i = 0; i < segment->n_spans; i++)
            for (int64_t j = 0; j < r->plan.spans[segment->i_span + i].count; j++) rows[n_keys++] = r->plan.spans[segment->i_span + i].row + j;
        for (int64_t i = 0; i < segment->q_count; i++)
            for (int64_t h = 0; h < H; h++) {
                int64_t position = n_keys - segment->q_count + i, at = (segment->q_row + i) * H + h, kv = h / (H / K);
                int64_t end = r->plan.causal ? position + 1 : n_keys;
                int64_t begin = r->plan.window && position - r->plan.window + 1 > 0 ? position - r->plan.window + 1 : 0;
                double max = -INFINITY, sum = 0, delta = 0;
                for (int64_t j = begin; j < end; j++) {
                    p[j] = 0;
                    for (int64_t d = 0; d < hd; d++) p[j] += (double)r->q[at * hd + d] * (double)r->k[(rows[j] * K + kv) * hd + d];
                    p[j] /= sqrt((double)hd);
                    max = fmax(max, p[j]);
                }
                for (int64_t j = begin; j < end; j++) sum += exp(p[j] - max);
                e.lse[at] = max + log(sum);
                for (int64_t d = 0; d < hd; d++) e.out[at * hd + d] = e.dq[at * hd + d] = 0;
                for (int64_t j = begin; j < end; j++) {
                    p[j] = exp(p[j] - e.lse[at]);
                    for (int64_t d = 0; d < hd; d++) e.out[at * hd + d] += p[j] * (double)r->v[(rows[j] * K + kv) * hd + d];
                }
                for (int64_t d = 0; d < hd; d++) delta += e.out[at * hd + d] * (double)r->dout[at * hd + d];
                for (int64_t j = begin; j < end; j++) {
                    int64_t key = (rows[j] * K + kv) * hd;
                    double dp = 0;
                    for (int64_t d = 0; d < hd; d++) dp += (double)r->dout[at * hd + d] * (double)r->v[key + d];
                    double ds = p[j] * (dp - delta) / sqrt((double)hd);
                    for (int64_t d = 0; d < hd; d++) {
                        e.dq[at * hd + d] += ds * (double)r->k[key + d];
                        e.dk[key + d] += ds * (double)r->q[at * hd + d];
                        e.dv[key + d] += p[j] * (double)r->dout[at * hd + d];
                    }
                }
            }
    }
    return e;
}

/* A row that sees one key has no gradient through its softmax; where that holds for all rows, what is left is rounding of values near one. */
static void check_softmax_gradient(const char *what, const real *got, const double *want, int64_t n, double tolerance)
{
    double largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs(want[i]));
    if (largest > 0) CHECK_MREL(what, got, want, n, tolerance);
    for (int64_t i = 0; i < n && largest == 0; i++) CHECK(fabs((double)got[i]) <= tolerance);
}

static void check_against_naive(const char *what, run *r)
{
    exact e = naive(r);
    check_exec(2, forward, r);
    check_exec(2, backward, r);
    int64_t hd = r->shape.head_dim, H = r->shape.n_heads;
    double tolerance = 2 * CHECK_TOLERANCE; /* sums over up to 130 keys of terms of either sign */
    for (int64_t row = 0; row < r->n_rows; row++) {
        bool written = !isnan(e.lse[row * H]);
        CHECK(written == !isnan((double)r->lse[row * H]) && written == !isnan((double)r->dq[row * H * hd]));
        if (!written) /* of no segment: m-rel below shall not see it */
            for (int64_t i = row * H * hd; i < (row + 1) * H * hd; i++) e.out[i] = e.dq[i] = (double)(r->out[i] = r->dq[i] = 0);
        if (!written)
            for (int64_t i = row * H; i < (row + 1) * H; i++) e.lse[i] = (double)(r->lse[i] = 0);
    }
    CHECK_MREL(what, r->out, e.out, r->q_size, tolerance);
    CHECK_MREL(what, r->lse, e.lse, r->n_rows * H, tolerance);
    check_softmax_gradient(what, r->dq, e.dq, r->q_size, tolerance);
    check_softmax_gradient(what, r->dk, e.dk, r->k_size, tolerance);
    CHECK_MREL(what, r->dv, e.dv, r->k_size, tolerance);
}

static const stv_attn_shape shapes[] = {{1, 1, 1}, {2, 2, 5}, {4, 2, 8}, {6, 2, 24}, {3, 1, 32}, {2, 2, 67}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static const int64_t one_group[] = {0, 1};

static void plain(void)
{
    static const int64_t lengths[] = {1, 2, 15, 16, 17, 47, 130}, windows[] = {0, 1, 3, 20};
    for (int s = 0; s < N_SHAPES; s++)
        for (int l = 0; l < 7; l++) {
            segment one = {0, lengths[l], 1, {{0, lengths[l]}}};
            for (int w = 0; w < 4; w++) {
                run r = new_run(&one, 1, one_group, 1, lengths[l], shapes[s]);
                r.plan.window = windows[w];
                check_against_naive("causal", &r);
            }
            run r = new_run(&one, 1, one_group, 1, lengths[l], shapes[s]);
            r.plan.causal = false;
            check_against_naive("not causal", &r);
        }
}

/* A prefix of 20 rows with branches of 13, 7 and 1 rows, the last a grandchild; a second tree of 31 rows laid around the first's last branch;
 * rows 72..79 belong to nobody. */
static const segment tree[] = {
    {0, 20, 1, {{0, 20}}},
    {20, 13, 2, {{0, 20}, {20, 13}}},
    {33, 7, 2, {{0, 20}, {33, 7}}},
    {60, 1, 3, {{0, 20}, {33, 7}, {60, 1}}},
    {40, 20, 1, {{40, 20}}},
    {40, 0, 1, {{40, 20}}}, /* no queries: nothing to do */
    {61, 11, 2, {{40, 20}, {61, 11}}},
};
static const int64_t tree_groups[] = {0, 4, 7};
enum { TREE_ROWS = 80 };

static run new_tree(stv_attn_shape shape) { return new_run(tree, 7, tree_groups, 2, TREE_ROWS, shape); }

static void trees(void)
{
    for (int s = 0; s < N_SHAPES; s++)
        for (int64_t window = 0; window <= 25; window += 5) {
            run r = new_tree(shapes[s]);
            r.plan.window = window;
            check_against_naive("tree", &r);
        }
}

#if STV_REAL_BITS == 64
static double loss(void *context)
{
    run *r = context;
    check_exec(1, forward, r);
    return check_weighted_sum(r->out, r->dout, r->q_size);
}

static void gradients(void)
{
    static const segment small[] = {{0, 4, 1, {{0, 4}}}, {4, 3, 2, {{0, 4}, {4, 3}}}, {7, 2, 2, {{0, 4}, {7, 2}}}};
    static const int64_t groups[] = {0, 3};
    for (int64_t window = 0; window <= 3; window += 3) {
        run r = new_run(small, 3, groups, 1, 9, (stv_attn_shape){2, 1, 6});
        r.plan.window = window;
        check_exec(1, forward, &r);
        check_exec(1, backward, &r);
        check_gradient("dq", loss, &r, r.q, r.dq, r.q_size, 1e-6);
        check_gradient("dk", loss, &r, r.k, r.dk, r.k_size, 1e-6);
        check_gradient("dv", loss, &r, r.v, r.dv, r.k_size, 1e-6);
    }
}
#endif

/* ---- bits ---------------------------------------------------------------------------------------------------------------- */

static void check_same_outputs(const char *what, const run *a, int64_t row_a, const run *b, int64_t row_b, int64_t n)
{
    int64_t width = a->shape.n_heads * a->shape.head_dim, H = a->shape.n_heads;
    CHECK_SAME_BITS(what, a->out + row_a * width, b->out + row_b * width, (size_t)(n * width) * sizeof(real));
    CHECK_SAME_BITS(what, a->lse + row_a * H, b->lse + row_b * H, (size_t)(n * H) * sizeof(real));
}

/* Rows of `to` get the queries, keys and values of rows of `from`. */
static void copy_rows(run *to, int64_t to_row, const run *from, int64_t from_row, int64_t n)
{
    int64_t q = from->shape.n_heads * from->shape.head_dim, k = from->shape.n_kv_heads * from->shape.head_dim;
    memcpy(to->q + to_row * q, from->q + from_row * q, (size_t)(n * q) * sizeof(real));
    memcpy(to->dout + to_row * q, from->dout + from_row * q, (size_t)(n * q) * sizeof(real));
    memcpy(to->k + to_row * k, from->k + from_row * k, (size_t)(n * k) * sizeof(real));
    memcpy(to->v + to_row * k, from->v + from_row * k, (size_t)(n * k) * sizeof(real));
}

/* 70 keys in one span, or cut, or lying in other rows of the buffer: the same numbers. */
static void cut_spans(void)
{
    static const segment whole = {0, 70, 1, {{0, 70}}}, cut = {0, 70, 4, {{0, 10}, {10, 0}, {10, 33}, {43, 27}}},
                         moved = {130, 70, 3, {{101, 10}, {3, 33}, {173, 27}}};
    for (int s = 0; s < N_SHAPES; s++)
        for (int64_t window = 0; window <= 40; window += 20) {
            run a = new_run(&whole, 1, one_group, 1, 70, shapes[s]), b = new_run(&cut, 1, one_group, 1, 70, shapes[s]),
                c = new_run(&moved, 1, one_group, 1, 200, shapes[s]);
            int64_t q = a.shape.n_heads * a.shape.head_dim;
            copy_rows(&c, 101, &a, 0, 10);
            copy_rows(&c, 3, &a, 10, 33);
            copy_rows(&c, 173, &a, 43, 27);
            memcpy(c.q + 130 * q, a.q, (size_t)(70 * q) * sizeof(real));
            a.plan.window = b.plan.window = c.plan.window = window;
            check_exec(1, forward, &a);
            check_exec(1, forward, &b);
            check_exec(1, forward, &c);
            check_same_outputs("cut", &a, 0, &b, 0, 70);
            check_same_outputs("moved", &a, 0, &c, 130, 70);
        }
}

/* The tree's first prefix and its branches as three sequences of their own. */
static void shared_prefix(void)
{
    static const segment apart[] = {{0, 33, 1, {{0, 33}}}, {33, 28, 1, {{33, 28}}}, {61, 31, 1, {{61, 31}}}};
    static const int64_t groups[] = {0, 1, 2, 3};
    /* {row of `apart`, row of the tree, rows} */
    static const int64_t parts[][3] = {{0, 0, 20}, {20, 20, 13}, {33, 0, 20}, {53, 33, 7}, {60, 60, 1}, {61, 40, 20}, {81, 61, 11}};
    for (int s = 0; s < N_SHAPES; s++)
        for (int64_t window = 0; window <= 24; window += 12) {
            run shared = new_tree(shapes[s]), separate = new_run(apart, 3, groups, 3, 92, shapes[s]);
            int64_t q = shared.shape.n_heads * shared.shape.head_dim, k = shared.shape.n_kv_heads * shared.shape.head_dim;
            for (int p = 0; p < 7; p++) copy_rows(&separate, parts[p][0], &shared, parts[p][1], parts[p][2]);
            /* The loss reads the prefix's outputs once, so its second copy gets no gradient. */
            memset(separate.dout + 33 * q, 0, (size_t)(20 * q) * sizeof(real));
            shared.plan.window = separate.plan.window = window;
            check_exec(2, forward, &shared);
            check_exec(2, forward, &separate);
            for (int p = 0; p < 7; p++) check_same_outputs("shared prefix", &separate, parts[p][0], &shared, parts[p][1], parts[p][2]);

            check_exec(2, backward, &shared);
            check_exec(2, backward, &separate);
            double *dq = check_new((size_t)shared.q_size * sizeof *dq), *dk = check_new((size_t)shared.k_size * sizeof *dk),
                   *dv = check_new((size_t)shared.k_size * sizeof *dv);
            memset(dq, 0, (size_t)shared.q_size * sizeof *dq);
            memset(dk, 0, (size_t)shared.k_size * sizeof *dk);
            memset(dv, 0, (size_t)shared.k_size * sizeof *dv);
            for (int p = 0; p < 7; p++) {
                for (int64_t i = 0; i < parts[p][2] * q; i++) dq[parts[p][1] * q + i] += (double)separate.dq[parts[p][0] * q + i];
                for (int64_t i = 0; i < parts[p][2] * k; i++) {
                    dk[parts[p][1] * k + i] += (double)separate.dk[parts[p][0] * k + i];
                    dv[parts[p][1] * k + i] += (double)separate.dv[parts[p][0] * k + i];
                }
            }
            CHECK_MREL("dq", shared.dq, dq, 72 * q, CHECK_TOLERANCE); /* rows 72.. are in no segment */
            CHECK_MREL("dk", shared.dk, dk, shared.k_size, CHECK_TOLERANCE);
            CHECK_MREL("dv", shared.dv, dv, shared.k_size, CHECK_TOLERANCE);
        }
}

/* Decoding row by row, and prefill in pieces, over growing spans of a cache: the bits of one prefill. */
static void cache(void)
{
    enum { N = 75 };
    static const segment prefill = {0, N, 1, {{0, N}}};
    for (int s = 0; s < N_SHAPES; s++)
        for (int64_t window = 0; window <= 30; window += 10) {
            run all = new_run(&prefill, 1, one_group, 1, N, shapes[s]);
            all.plan.window = window;
            check_exec(2, forward, &all);
            for (int64_t step = 1; step <= 18; step += 17)
                for (int64_t row = 0; row < N; row += step) {
                    int64_t n = row + step < N ? step : N - row;
                    segment next = {row, n, 2, {{0, row}, {row, n}}};
                    run one = new_run(&next, 1, one_group, 1, N, shapes[s]);
                    one.plan.window = window;
                    check_exec(1, forward, &one);
                    check_same_outputs("cache", &all, row, &one, row, n);
                }
        }
}

static void threads(void)
{
    /* Large enough that the pool is used. */
    static const segment big[] = {
        {0, 100, 1, {{0, 100}}}, {100, 80, 2, {{0, 100}, {100, 80}}}, {180, 70, 2, {{0, 100}, {180, 70}}}, {250, 90, 1, {{250, 90}}}};
    static const int64_t groups[] = {0, 3, 4};
    stv_attn_shape shape = {6, 3, 24};
    run one = new_run(big, 4, groups, 2, 340, shape);
    check_exec(1, forward, &one);
    check_exec(1, backward, &one);
    for (int n_threads = 2; n_threads <= 4; n_threads += 2) {
        run many = new_run(big, 4, groups, 2, 340, shape);
        check_exec(n_threads, forward, &many);
        check_exec(n_threads, backward, &many);
        check_same_outputs("threads", &one, 0, &many, 0, 340);
        CHECK_SAME_BITS("dq", one.dq, many.dq, (size_t)one.q_size * sizeof(real));
        CHECK_SAME_BITS("dk", one.dk, many.dk, (size_t)one.k_size * sizeof(real));
        CHECK_SAME_BITS("dv", one.dv, many.dv, (size_t)one.k_size * sizeof(real));
    }
}

/* Scores of +-10^4: one key takes all, nothing overflows. */
static void extremes(void)
{
    static const segment one = {0, 40, 1, {{0, 40}}};
    run r = new_run(&one, 1, one_group, 1, 40, (stv_attn_shape){1, 1, 4});
    for (int64_t i = 0; i < 40; i++)
        for (int64_t d = 0; d < 4; d++) {
            r.q[i * 4 + d] = d == 0 ? 200 : 0;
            r.k[i * 4 + d] = d == 0 ? (i == 7 ? 100 : -100) : 0;
        }
    check_exec(1, forward, &r);
    check_exec(1, backward, &r);
    for (int64_t i = 7; i < 40; i++) {
        CHECK_SAME_BITS("the winner's value", r.out + i * 4, r.v + 7 * 4, 4 * sizeof(real));
        CHECK(r.lse[i] == 10000);
        for (int64_t d = 0; d < 4; d++) CHECK(fabs((double)r.dq[i * 4 + d]) <= 100 * CHECK_TOLERANCE); /* keys are of size 100 */
    }
    for (int64_t i = 0; i < 160; i++) CHECK(isfinite((double)r.dk[i]) && isfinite((double)r.dv[i]));

    run none = new_run(&one, 0, (const int64_t[]){0, 0}, 1, 3, (stv_attn_shape){2, 1, 4}); /* no segments: dk and dv are zero */
    check_exec(2, forward, &none);
    check_exec(2, backward, &none);
    for (int64_t i = 0; i < none.k_size; i++) CHECK(none.dk[i] == 0 && none.dv[i] == 0);
}

/* ---- kernels of every level this machine has --------------------------------------------------------------------------- */

static void check_kernel(const char *name, const stv_attn_kernel *kernel)
{
    enum { STRIDE = 96 };
    for (int64_t rows = 1; rows <= 19; rows += 3)
        for (int64_t cols = 1; cols <= 70; cols += 23)
            for (int64_t depth = 0; depth <= 33; depth += 11)
                for (int transposed = 0; transposed <= 1; transposed++) {
                    real *a = check_random_reals(STRIDE * STRIDE, 1), *b = check_random_reals(STRIDE * STRIDE, 2),
                         *c = check_random_reals(STRIDE * STRIDE, 3);
                    double *want = check_new(STRIDE * STRIDE * sizeof *want);
                    real *got = check_reals(STRIDE * STRIDE);
                    stv_attn_left left = {a, transposed ? 1 : STRIDE, transposed ? STRIDE : 1};
                    kernel->product(c, STRIDE, left, b, STRIDE, (stv_attn_extent){rows, cols, depth}, false);
                    kernel->product(c, STRIDE, left, b, STRIDE, (stv_attn_extent){rows, cols, depth}, true);
                    for (int64_t i = 0; i < rows; i++)
                        for (int64_t j = 0; j < cols; j++) {
                            double sum = 0;
                            for (int64_t k = 0; k < depth; k++) sum += (double)a[i * left.row + k * left.depth] * (double)b[k * STRIDE + j];
                            want[i * cols + j] = 2 * sum;
                            got[i * cols + j] = c[i * STRIDE + j];
                        }
                    CHECK_MREL(name, got, want, rows * cols, CHECK_TOLERANCE);
                }
    /* In place and rearranged must agree bit for bit. */
    enum { KEYS = 37, DIM = 21 };
    real *q = check_random_reals(DIM, 1), *k = check_random_reals(KEYS * DIM, 2), *k_transposed = check_reals(DIM * 64);
    real *s = check_reals(KEYS), *s_product = check_reals(64), *out = check_reals(DIM), *out_product = check_reals(64),
         *k_padded = check_reals(KEYS * 48);
    for (int64_t j = 0; j < KEYS; j++)
        for (int64_t d = 0; d < DIM; d++) k_transposed[d * 64 + j] = k_padded[j * 48 + d] = k[j * DIM + d];
    kernel->scores(s, q, k, DIM, KEYS, DIM);
    kernel->product(s_product, 64, (stv_attn_left){q, DIM, 1}, k_transposed, 64, (stv_attn_extent){1, KEYS, DIM}, false);
    CHECK_SAME_BITS(name, s, s_product, KEYS * sizeof(real));
    memset(out, 0, DIM * sizeof(real));
    kernel->values(out, s, k, DIM, KEYS, DIM);
    kernel->product(out_product, 64, (stv_attn_left){s, KEYS, 1}, k_padded, 48, (stv_attn_extent){1, DIM, KEYS}, false);
    CHECK_SAME_BITS(name, out, out_product, DIM * sizeof(real));
}

static void kernels(void)
{
    check_kernel("portable", &stv_attn_portable);
#if defined(__x86_64__)
    if (stv_cpu() >= STV_CPU_AVX2) check_kernel("avx2", &stv_attn_avx2);
    if (stv_cpu() >= STV_CPU_AVX512) check_kernel("avx512", &stv_attn_avx512);
#endif
}

static const check_case cases[] = {
    {"plain", plain},         {"trees", trees},     {"cut spans", cut_spans}, {"shared prefix", shared_prefix},
    {"cache", cache},         {"threads", threads}, {"extremes", extremes},   {"kernels", kernels},
#if STV_REAL_BITS == 64
    {"gradients", gradients},
#endif
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
