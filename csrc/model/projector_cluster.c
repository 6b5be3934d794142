/* projector_cluster.c - one image after another; the matrix products run on all threads, the elementwise work between them (a few million
 * elements an image, against 2.6 GFLOP of products at real size) on one. */
#include "model/projector_cluster.h"

#include "ops/gemm.h"
#include "ops/rows.h"

#include <math.h>
#include <string.h>

static const double EPS = 1e-12;

static double *doubles(stv_exec *x, int64_t rows, int64_t cols)
{
    size_t size_bytes;
    if (!stv_size_mul(&size_bytes, (size_t)rows, (size_t)cols) || !stv_size_mul(&size_bytes, size_bytes, sizeof(double))) size_bytes = SIZE_MAX;
    return stv_arena_alloc(x->arena, size_bytes);
}

static double *widened(stv_exec *x, const real *in, int64_t rows, int64_t cols)
{
    double *out = doubles(x, rows, cols);
    if (!stv_measuring(x))
        for (int64_t i = 0; i < rows * cols; i++) out[i] = (double)in[i];
    return out;
}

/* Of one element. */
static double scalar(const stv_weights *weights, int tensor)
{
    real scratch;
    return (double)*stv_read(stv_weight(weights, tensor), 0, 1, &scratch);
}

static double dot(const double *a, const double *b, int64_t n)
{
    double lane[4] = {0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) lane[j] += a[i + j] * b[i + j];
    for (; i < n; i++) lane[0] += a[i] * b[i];
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

static void add_scaled(double *y, double a, const double *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * in[i];
}

static void add_scaled_reals(double *y, double a, const real *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * (double)in[i];
}

/* ---- the small operators, each with its backward ----------------------------------------------------------------------------- */

/* Bin i of N covers tokens floor(i L / N) .. ceil((i+1) L / N) - 1; bins may share a token. */
static int64_t bin_begin(int64_t i, int64_t L, int64_t N) { return i * L / N; }
static int64_t bin_end(int64_t i, int64_t L, int64_t N) { return ((i + 1) * L + N - 1) / N; }

/* out (N,E) */
static void pool_forward(double *out, const real *in, int64_t L, int64_t N, int64_t E)
{
    memset(out, 0, (size_t)(N * E) * sizeof *out);
    for (int64_t i = 0; i < N; i++) {
        int64_t begin = bin_begin(i, L, N), end = bin_end(i, L, N);
        for (int64_t l = begin; l < end; l++) add_scaled_reals(out + i * E, 1, in + l * E, E);
        for (int64_t e = 0; e < E; e++) out[i * E + e] /= (double)(end - begin);
    }
}

static void pool_backward_add(double *din, const double *dout, int64_t L, int64_t N, int64_t E)
{
    for (int64_t i = 0; i < N; i++) {
        int64_t begin = bin_begin(i, L, N), end = bin_end(i, L, N);
        for (int64_t l = begin; l < end; l++) add_scaled(din + l * E, 1 / (double)(end - begin), dout + i * E, E);
    }
}

/* Into the gradient of x, which an image has in the model's precision: the largest thing that would live through all of its backward. */
static void pool_backward_add_reals(real *din, const double *dout, int64_t L, int64_t N, int64_t E)
{
    for (int64_t i = 0; i < N; i++) {
        int64_t begin = bin_begin(i, L, N), end = bin_end(i, L, N);
        for (int64_t l = begin; l < end; l++)
            for (int64_t e = 0; e < E; e++) din[l * E + e] += (real)(dout[i * E + e] / (double)(end - begin));
    }
}

/* Rows to unit length. out (n,E) may be in; norm (n) */
static void row_norm_forward(double *out, double *norm, const double *in, int64_t n, int64_t E)
{
    for (int64_t i = 0; i < n; i++) {
        norm[i] = sqrt(dot(in + i * E, in + i * E, E));
        double length = norm[i] > EPS ? norm[i] : EPS;
        for (int64_t e = 0; e < E; e++) out[i * E + e] = in[i * E + e] / length;
    }
}

/* din (n,E) may be dout: din = (dout - out (out . dout)) / norm; a clamped norm is a constant. */
static void row_norm_backward(double *din, const double *dout, const double *out, const double *norm, int64_t n, int64_t E)
{
    for (int64_t i = 0; i < n; i++) {
        bool clamped = !(norm[i] > EPS);
        double length = clamped ? EPS : norm[i], along = clamped ? 0 : dot(out + i * E, dout + i * E, E);
        for (int64_t e = 0; e < E; e++) din[i * E + e] = (dout[i * E + e] - out[i * E + e] * along) / length;
    }
}

/* Columns (channels over the tokens) to unit length. out (L,E), norm (E) */
static void token_norm_forward(double *out, double *norm, const double *in, int64_t L, int64_t E)
{
    memset(norm, 0, (size_t)E * sizeof *norm);
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < E; e++) norm[e] += in[l * E + e] * in[l * E + e];
    for (int64_t e = 0; e < E; e++) norm[e] = sqrt(norm[e]);
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < E; e++) out[l * E + e] = in[l * E + e] / (norm[e] > EPS ? norm[e] : EPS);
}

/* d (L,E) in place; along (E) is scratch. */
static void token_norm_backward(double *d, double *along, const double *out, const double *norm, int64_t L, int64_t E)
{
    memset(along, 0, (size_t)E * sizeof *along);
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < E; e++) along[e] += out[l * E + e] * d[l * E + e];
    for (int64_t l = 0; l < L; l++)
        for (int64_t e = 0; e < E; e++) {
            bool clamped = !(norm[e] > EPS);
            d[l * E + e] = (d[l * E + e] - (clamped ? 0 : out[l * E + e] * along[e])) / (clamped ? EPS : norm[e]);
        }
}

/* Over the centres, in place on a (N,L): the columns sum to one. max, sum (L) are scratch. */
static void center_softmax_forward(double *a, double *max, double *sum, int64_t N, int64_t L)
{
    for (int64_t l = 0; l < L; l++) {
        max[l] = a[l];
        sum[l] = 0;
    }
    for (int64_t i = 1; i < N; i++)
        for (int64_t l = 0; l < L; l++) max[l] = a[i * L + l] > max[l] ? a[i * L + l] : max[l];
    for (int64_t i = 0; i < N; i++)
        for (int64_t l = 0; l < L; l++) sum[l] += a[i * L + l] = exp(a[i * L + l] - max[l]);
    for (int64_t i = 0; i < N; i++)
        for (int64_t l = 0; l < L; l++) a[i * L + l] /= sum[l];
}

/* d (N,L) in place: d = w (d - sum over centres of w d). sum (L) is scratch. */
static void center_softmax_backward(double *d, double *sum, const double *w, int64_t N, int64_t L)
{
    memset(sum, 0, (size_t)L * sizeof *sum);
    for (int64_t i = 0; i < N; i++)
        for (int64_t l = 0; l < L; l++) sum[l] += w[i * L + l] * d[i * L + l];
    for (int64_t i = 0; i < N; i++)
        for (int64_t l = 0; l < L; l++) d[i * L + l] = w[i * L + l] * (d[i * L + l] - sum[l]);
}

/* ---- one image ------------------------------------------------------------------------------------------------------------- */

typedef struct sizes {
    int64_t L, E, N, rounds;
} sizes;

static sizes sizes_of(const stv_weights *weights, int64_t n_tokens)
{
    const stv_projector_config *c = &weights->model->config.projector;
    return (sizes){n_tokens, c->in_size, c->n_centers, c->n_rounds};
}

/* The part of `saved` that belongs to image i. Addresses only: valid while measuring too. */
static stv_cluster_saved image_of(const stv_cluster_saved *saved, int64_t i, sizes z)
{
    int64_t tokens = i * z.L, centers = i * z.N * z.E;
    return (stv_cluster_saved){
        .v = saved->v + tokens * z.E,
        .f = saved->f + tokens * z.E,
        .c_in = saved->c_in + centers * (z.rounds - 1),
        .p = saved->p + centers * z.rounds,
        .w = saved->w + i * z.rounds * z.N * z.L,
        .c = saved->c + centers,
        .g = saved->g + centers,
        .cosine = saved->cosine + tokens,
        .s = saved->s + tokens,
        .margin = saved->margin + tokens,
        .assigned = saved->assigned + tokens,
        .n_assigned = saved->n_assigned + i * z.N,
    };
}

static double sigmoid(double z) { return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z)); }

/* similarity (N,L) holds the cosines. */
static void assign(stv_cluster_saved *o, const double *similarity, double alpha, double beta, sizes z)
{
    memset(o->n_assigned, 0, (size_t)z.N * sizeof *o->n_assigned);
    for (int64_t l = 0; l < z.L; l++) {
        double best = -1, second = 0;
        for (int64_t i = 0; i < z.N; i++) {
            double cosine = similarity[i * z.L + l], s = sigmoid(beta + alpha * cosine);
            if (s > best) {
                second = best > 0 ? best : 0;
                best = s;
                o->assigned[l] = (int32_t)i;
                o->cosine[l] = cosine;
            } else if (s > second) {
                second = s;
            }
        }
        if (best < 0) { /* not a number: any centre does, the result shows it */
            o->assigned[l] = 0;
            o->cosine[l] = best = similarity[l];
        }
        o->s[l] = best;
        o->margin[l] = best - second;
        o->n_assigned[o->assigned[l]]++;
    }
}

/* g (N,E) holds the pooled F; becomes what the centres gathered. y = x + s g. */
static void gather_and_spread(real *y, stv_cluster_saved *o, const real *in, sizes z)
{
    for (int64_t l = 0; l < z.L; l++) add_scaled_reals(o->g + o->assigned[l] * z.E, o->s[l], o->f + l * z.E, z.E);
    for (int64_t i = 0; i < z.N; i++)
        for (int64_t e = 0; e < z.E; e++) o->g[i * z.E + e] /= (double)(o->n_assigned[i] + 1);
    for (int64_t l = 0; l < z.L; l++) {
        const double *g = o->g + o->assigned[l] * z.E;
        for (int64_t e = 0; e < z.E; e++) y[l * z.E + e] = (real)((double)in[l * z.E + e] + o->s[l] * g[e]);
    }
}

static void image_forward(stv_exec *x, real *y, stv_cluster_saved *o, const real *in, const stv_linear *c, const stv_weights *weights, sizes z)
{
    int64_t L = z.L, E = z.E, N = z.N;
    size_t mark = stv_arena_mark(x->arena);
    double *x_hat = widened(x, in, L, E), *v = widened(x, o->v, L, E);
    double *norm = doubles(x, 1, L > E ? L : E), *sum = doubles(x, 1, L), *row_norms = doubles(x, 1, L > N ? L : N), *p_hat = doubles(x, N, E);
    double *similarity = doubles(x, N, L);
    const real *bias = stv_widened(x, c->bias, E);
    bool measuring = stv_measuring(x);
    if (!measuring) {
        token_norm_forward(v, norm, v, L, E);
        pool_forward(p_hat, in, L, N, E); /* what the first round begins with; backward pools again */
        pool_forward(o->g, o->f, L, N, E);
    }
    for (int64_t t = 0; t < z.rounds; t++) {
        double *c_in = t > 0 ? o->c_in + (t - 1) * N * E : p_hat, *p = o->p + t * N * E, *w = o->w + t * N * L;
        if (!measuring)
            for (int64_t i = 0; i < N * E; i++) p[i] = (double)bias[i % E];
        stv_matmul_nt_stored_f64(x, p, c_in, c->weight, N, E, E, true);
        if (!measuring) row_norm_forward(p_hat, row_norms, p, N, E);
        stv_matmul_nt_f64(x, w, p_hat, v, N, L, E, false);
        if (!measuring) center_softmax_forward(w, norm, sum, N, L);
        stv_matmul_nn_stored_f64(x, t + 1 < z.rounds ? o->c_in + t * N * E : o->c, w, stv_stored_reals(o->f), N, E, L, false);
    }
    if (!measuring) {
        row_norm_forward(p_hat, row_norms, o->c, N, E);
        row_norm_forward(x_hat, row_norms, x_hat, L, E);
    }
    stv_matmul_nt_f64(x, similarity, p_hat, x_hat, N, L, E, false);
    if (!measuring) {
        const stv_projector_params *ids = &weights->model->projector;
        assign(o, similarity, scalar(weights, ids->sim_alpha), scalar(weights, ids->sim_beta), z);
        gather_and_spread(y, o, in, z);
    }
    stv_arena_release(x->arena, mark);
}

/* What backward reads of one image. */
typedef struct image {
    const real *in, *dy; /* (L,E) */
    const stv_cluster_saved *o;
    const stv_linear *c;
    double alpha;
    sizes z;
} image;

typedef struct image_grads {
    real *dx;             /* (L,E), or NULL */
    double *df, *dv, *dc; /* (L,E) twice, (N,E): of the centres */
    double dalpha, dbeta;
} image_grads;

/* Steps 5, 4 and 3 upside down: from dy to dx, df, dc. */
static void assignment_backward(stv_exec *x, image_grads *d, const image *m)
{
    const stv_cluster_saved *o = m->o;
    int64_t L = m->z.L, E = m->z.E, N = m->z.N;
    size_t mark = stv_arena_mark(x->arena);
    double *x_hat = widened(x, m->in, L, E), *c_hat = doubles(x, N, E), *dx_hat = doubles(x, L, E), *dg = doubles(x, N, E);
    double *x_norm = doubles(x, 1, L), *c_norm = doubles(x, 1, N), *ds = doubles(x, 1, L), *row = doubles(x, 1, E);
    if (!stv_measuring(x)) {
        row_norm_forward(x_hat, x_norm, x_hat, L, E);
        row_norm_forward(c_hat, c_norm, o->c, N, E);
        memset(d->df, 0, (size_t)(L * E) * sizeof(double));
        memset(d->dc, 0, (size_t)(N * E) * sizeof(double));
        memset(dg, 0, (size_t)(N * E) * sizeof(double));
        for (int64_t l = 0; l < L; l++) {
            int64_t a = o->assigned[l] * E;
            for (int64_t e = 0; e < E; e++) row[e] = (double)m->dy[l * E + e];
            ds[l] = dot(row, o->g + a, E);
            add_scaled(dg + a, o->s[l], row, E);
        }
        for (int64_t i = 0; i < N; i++)
            for (int64_t e = 0; e < E; e++) dg[i * E + e] /= (double)(o->n_assigned[i] + 1);
        pool_backward_add(d->df, dg, L, N, E);
        for (int64_t l = 0; l < L; l++) {
            int64_t a = o->assigned[l] * E;
            for (int64_t e = 0; e < E; e++) ds[l] += (double)o->f[l * E + e] * dg[a + e];
            add_scaled(d->df + l * E, o->s[l], dg + a, E);
            double dz = ds[l] * o->s[l] * (1 - o->s[l]);
            d->dbeta += dz;
            d->dalpha += dz * o->cosine[l];
            add_scaled(d->dc + a, dz * m->alpha, x_hat + l * E, E);
            for (int64_t e = 0; e < E; e++) dx_hat[l * E + e] = dz * m->alpha * c_hat[a + e];
        }
        row_norm_backward(dx_hat, dx_hat, x_hat, x_norm, L, E);
        for (int64_t i = 0; d->dx && i < L * E; i++) d->dx[i] = (real)((double)m->dy[i] + dx_hat[i]);
        row_norm_backward(d->dc, d->dc, c_hat, c_norm, N, E);
    }
    stv_arena_release(x->arena, mark);
}

static void narrow(real *out, const double *in, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = (real)in[i];
}

/* Of Linear_c, from dp (N,E) and its input: sums as everywhere, in the model's precision. */
static void center_gradients(stv_exec *x, const stv_linear *c, const double *dp, const double *c_in, int64_t N, int64_t E)
{
    if (!c->dweight && !c->dbias) return;
    size_t mark = stv_arena_mark(x->arena);
    real *dy = stv_reals(x, N, E), *in = stv_reals(x, N, E);
    if (!stv_measuring(x)) {
        narrow(dy, dp, N * E);
        narrow(in, c_in, N * E);
        for (int64_t e = 0; c->dbias && e < E; e++) {
            double sum = 0;
            for (int64_t i = 0; i < N; i++) sum += dp[i * E + e];
            c->dbias[e] += (real)sum;
        }
    }
    if (c->dweight) stv_matmul_tn(x, c->dweight, dy, in, E, E, N, true);
    stv_arena_release(x->arena, mark);
}

/* The rounds upside down, then the two normalisations before them: dv, and more of dx and df. */
static void rounds_backward(stv_exec *x, image_grads *d, const image *m)
{
    const stv_cluster_saved *o = m->o;
    const stv_linear *c = m->c;
    int64_t L = m->z.L, E = m->z.E, N = m->z.N;
    bool measuring = stv_measuring(x);
    size_t mark = stv_arena_mark(x->arena);
    double *v_hat = widened(x, o->v, L, E), *p_hat = doubles(x, N, E), *dp = doubles(x, N, E), *dw = doubles(x, N, L);
    double *v_norm = doubles(x, 1, E), *p_norm = doubles(x, 1, N), *sum = doubles(x, 1, L > E ? L : E);
    if (!measuring) {
        token_norm_forward(v_hat, v_norm, v_hat, L, E);
        memset(d->dv, 0, (size_t)(L * E) * sizeof(double));
    }
    for (int64_t t = m->z.rounds - 1; t >= 0; t--) {
        const double *c_in = t > 0 ? o->c_in + (t - 1) * N * E : p_hat, *p = o->p + t * N * E, *w = o->w + t * N * L;
        stv_matmul_nt_stored_f64(x, dw, d->dc, stv_stored_reals(o->f), N, L, E, false);
        stv_matmul_tn_f64(x, d->df, w, d->dc, L, E, N, true);
        if (!measuring) {
            center_softmax_backward(dw, sum, w, N, L);
            row_norm_forward(p_hat, p_norm, p, N, E);
        }
        stv_matmul_tn_f64(x, d->dv, dw, p_hat, L, E, N, true);
        stv_matmul_nn_f64(x, dp, dw, v_hat, N, E, L, false);
        if (!measuring) row_norm_backward(dp, dp, p_hat, p_norm, N, E);
        if (!measuring && t == 0) pool_forward(p_hat, m->in, L, N, E);
        center_gradients(x, c, dp, c_in, N, E);
        stv_matmul_nn_stored_f64(x, d->dc, dp, c->weight, N, E, E, false);
    }
    if (!measuring) {
        if (d->dx) pool_backward_add_reals(d->dx, d->dc, L, N, E);
        token_norm_backward(d->dv, sum, v_hat, v_norm, L, E);
    }
    stv_arena_release(x->arena, mark);
}

/* dv, df (L,E) in the model's precision, for v and f's linear backward; din (L,E) or NULL. dscalars adds up. */
static void image_backward(stv_exec *x, real *din, real *dv, real *df, double dscalars[2], const image *m)
{
    int64_t L = m->z.L, E = m->z.E;
    size_t mark = stv_arena_mark(x->arena);
    image_grads d = {.dx = din, .df = doubles(x, L, E), .dv = NULL, .dc = doubles(x, m->z.N, E)};
    assignment_backward(x, &d, m);
    d.dv = doubles(x, L, E);
    rounds_backward(x, &d, m);
    if (!stv_measuring(x)) {
        dscalars[0] += d.dalpha;
        dscalars[1] += d.dbeta;
        narrow(dv, d.dv, L * E);
        narrow(df, d.df, L * E);
    }
    stv_arena_release(x->arena, mark);
}

/* ---- all images ------------------------------------------------------------------------------------------------------------ */

static void add_scalar(stv_exec *x, real *grad, double value)
{
    if (grad && !stv_measuring(x)) *grad += (real)value;
}

bool stv_cluster_trains(const stv_weights *weights)
{
    const stv_projector_params *ids = &weights->model->projector;
    stv_linear c = stv_weights_affine(weights, ids->c), v = stv_weights_affine(weights, ids->v), f = stv_weights_affine(weights, ids->f);
    return stv_linear_trains(&c) || stv_linear_trains(&v) || stv_linear_trains(&f) || stv_weight_grad(weights, ids->sim_alpha) ||
           stv_weight_grad(weights, ids->sim_beta);
}

real *stv_cluster_forward(stv_exec *x, const real *in, int64_t n_images, int64_t n_tokens, const stv_weights *weights, stv_cluster_saved *saved)
{
    sizes z = sizes_of(weights, n_tokens);
    int64_t n_rows = n_images * z.L, n_centers = n_images * z.N;
    stv_linear v = stv_weights_affine(weights, weights->model->projector.v), f = stv_weights_affine(weights, weights->model->projector.f);
    real *y = stv_reals(x, n_rows, z.E);
    *saved = (stv_cluster_saved){
        .v = stv_reals(x, n_rows, z.E),
        .f = stv_reals(x, n_rows, z.E),
        .c_in = doubles(x, n_centers * (z.rounds - 1), z.E),
        .p = doubles(x, n_centers * z.rounds, z.E),
        .w = doubles(x, n_centers * z.rounds, z.L),
        .c = doubles(x, n_centers, z.E),
        .g = doubles(x, n_centers, z.E),
        .cosine = doubles(x, n_rows, 1),
        .s = doubles(x, n_rows, 1),
        .margin = doubles(x, n_rows, 1),
        .assigned = stv_arena_alloc(x->arena, (size_t)n_rows * sizeof(int32_t)),
        .n_assigned = stv_arena_alloc(x->arena, (size_t)n_centers * sizeof(int32_t)),
    };
    stv_linear_forward(x, saved->v, NULL, in, &v, n_rows, NULL);
    stv_linear_forward(x, saved->f, NULL, in, &f, n_rows, NULL);
    const stv_linear c = stv_weights_affine(weights, weights->model->projector.c);
    for (int64_t i = 0; i < n_images; i++) {
        stv_cluster_saved o = image_of(saved, i, z);
        image_forward(x, y + i * z.L * z.E, &o, in + i * z.L * z.E, &c, weights, z);
    }
    return y;
}

void stv_cluster_backward(stv_exec *x, real *din, const real *dy, const real *in, int64_t n_images, int64_t n_tokens, const stv_weights *weights,
                          const stv_cluster_saved *saved)
{
    const stv_projector_params *ids = &weights->model->projector;
    sizes z = sizes_of(weights, n_tokens);
    int64_t n_rows = n_images * z.L;
    stv_linear v = stv_weights_affine(weights, ids->v), f = stv_weights_affine(weights, ids->f), c = stv_weights_affine(weights, ids->c);
    size_t mark = stv_arena_mark(x->arena);
    real *dv = stv_reals(x, n_rows, z.E), *df = stv_reals(x, n_rows, z.E);
    double dscalars[2] = {0, 0};
    for (int64_t i = 0; i < n_images; i++) {
        stv_cluster_saved o = image_of(saved, i, z);
        int64_t first = i * z.L * z.E;
        const double alpha = stv_measuring(x) ? 0 : scalar(weights, ids->sim_alpha);
        const image m = {in + first, dy + first, &o, &c, alpha, z};
        image_backward(x, din ? din + first : NULL, dv + first, df + first, dscalars, &m);
    }
    add_scalar(x, stv_weight_grad(weights, ids->sim_alpha), dscalars[0]);
    add_scalar(x, stv_weight_grad(weights, ids->sim_beta), dscalars[1]);
    stv_linear_backward_add(x, din, df, in, NULL, &f, n_rows, NULL);
    stv_linear_backward_add(x, din, dv, in, NULL, &v, n_rows, NULL);
    stv_arena_release(x->arena, mark);
}
