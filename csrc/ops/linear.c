/* linear.c - the adapter in the forward pass is two thin products: u = s drop(x) A^T, y += u B^T. With du = dy B (so that dL/d(drop(x) A^T) = s du):
 *
 *   dW += dy^T x    db += sum_rows dy    dB += dy^T u    dA += (s du)^T drop(x)    dx = dy W + drop'(s du A)
 *
 * drop(x) is not kept: its mask is recomputed from where it is (dropout.h).
 *
 * DoRA: v = drop(x) W^T + u B^T, y = g v + b + (x - drop(x)) W^T. With dz = g dy, A and B see dz in the place of dy, and
 *
 *   dm += sum_rows dy v / |V|    without dropout  dW += dz^T x                              dx = dz W + s du A
 *                                with             dW += dy^T x + (dz - dy)^T drop(x)        dx = dy W + drop'((dz - dy) W + s du A)
 *
 * v is kept, as any product is: to have it again would cost another product with W. */
#include "ops/linear.h"

#include "ops/gemm.h"
#include "ops/reduce.h"
#include "ops/rows.h"
#include "ops/split.h"

#include <math.h>
#include <string.h>

/* ---- bias ---------------------------------------------------------------------------------------------------------------- */

typedef struct bias_args {
    real *y;          /* forward: (rows,n) */
    const real *bias; /* (n) */
    real *dbias;      /* backward: (n) */
    const real *dy;   /* (rows,n) */
    int64_t rows, n;
} bias_args;

static void spread_rows(const void *arg, int64_t begin, int64_t end)
{
    const bias_args *args = arg;
    for (int64_t i = begin; i < end; i++) memcpy(args->y + i * args->n, args->bias, (size_t)args->n * sizeof(real));
}

/* Every row of y = bias; the product then adds to it. */
static void bias_forward(stv_exec *x, real *y, stv_stored bias, int64_t rows, int64_t n)
{
    size_t mark = stv_arena_mark(x->arena);
    bias_args args = {.y = y, .bias = stv_widened(x, bias, n), .n = n};
    if (!stv_measuring(x)) stv_split(x, rows, stv_row_grain(n), spread_rows, &args);
    stv_arena_release(x->arena, mark);
}

static void sum_columns(const void *arg, int64_t begin, int64_t end)
{
    const bias_args *args = arg;
    double sum[STV_COLUMN_GRAIN] = {0};
    for (int64_t i = 0; i < args->rows; i++)
        for (int64_t j = begin; j < end; j++) sum[j - begin] += args->dy[i * args->n + j];
    for (int64_t j = begin; j < end; j++) args->dbias[j] += (real)sum[j - begin];
}

/* dbias += sum of the rows of dy, in row order. */
static void bias_backward(stv_exec *x, real *dbias, const real *dy, int64_t rows, int64_t n)
{
    if (stv_measuring(x)) return;
    stv_split(x, n, STV_COLUMN_GRAIN, sum_columns, &(bias_args){.dbias = dbias, .dy = dy, .rows = rows, .n = n});
}

/* ---- linear -------------------------------------------------------------------------------------------------------------- */

static bool is_dora(const stv_linear *lin) { return lin->lora.rank > 0 && lin->lora.magnitude.data; }

static bool drops(const stv_linear *lin, const stv_dropout *drop) { return drop && lin->lora.rank > 0 && lin->lora.dropout > 0; }

/* y = s in; y may be in. */
static void scaled(stv_exec *x, real *y, const real *in, int64_t n, real scale)
{
    if (stv_measuring(x)) return;
    for (int64_t i = 0; i < n; i++) y[i] = in[i] * scale;
}

/* drop(in): `in` itself, or in the arena. */
static const real *dropped(stv_exec *x, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    if (!drops(lin, drop)) return in;
    real *scratch = stv_reals(x, rows, lin->n_in);
    stv_dropout_apply(x, scratch, in, rows, lin->n_in, lin->lora.dropout, lin->lora.module_id, drop);
    return scratch;
}

/* y = in W^T + b. */
static void base_forward(stv_exec *x, real *y, const real *in, const stv_linear *lin, int64_t rows)
{
    if (lin->bias.data) bias_forward(x, y, lin->bias, rows, lin->n_out);
    stv_matmul_nt_stored(x, y, in, lin->weight, rows, lin->n_out, lin->n_in, lin->bias.data != NULL);
}

static void lora_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                          const stv_dropout *drop)
{
    const stv_lora *lora = &lin->lora;
    if (lora->db) stv_matmul_tn(x, lora->db, dy, u, lin->n_out, lora->rank, rows, true);
    if (!lora->da && !din) return;

    size_t mark = stv_arena_mark(x->arena);
    real *du = stv_reals(x, rows, lora->rank);
    real *scratch = drops(lin, drop) ? stv_reals(x, rows, lin->n_in) : NULL;
    stv_matmul_nn_stored(x, du, dy, lora->b, rows, lora->rank, lin->n_out, false);
    scaled(x, du, du, rows * lora->rank, lora->scale);
    if (lora->da) {
        if (scratch) stv_dropout_apply(x, scratch, in, rows, lin->n_in, lora->dropout, lora->module_id, drop);
        stv_matmul_tn(x, lora->da, du, scratch ? scratch : in, lora->rank, lin->n_in, rows, true);
    }
    if (din && scratch) {
        stv_matmul_nn_stored(x, scratch, du, lora->a, rows, lin->n_in, lora->rank, false);
        stv_dropout_apply(x, scratch, scratch, rows, lin->n_in, lora->dropout, lora->module_id, drop);
        stv_add(x, din, din, scratch, rows * lin->n_in);
    } else if (din) {
        stv_matmul_nn_stored(x, din, du, lora->a, rows, lin->n_in, lora->rank, true);
    }
    stv_arena_release(x->arena, mark);
}

/* What is left when din has dy W. */
static void backward_after_din(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                               const stv_dropout *drop)
{
    if (lin->dweight) stv_matmul_tn(x, lin->dweight, dy, in, lin->n_out, lin->n_in, rows, true);
    if (lin->lora.rank > 0) lora_backward(x, din, dy, in, u, lin, rows, drop);
}

/* ---- DoRA ---------------------------------------------------------------------------------------------------------------- */

typedef struct dora_args {
    real *y;           /* (rows,n) */
    const real *a, *b; /* (rows,n) */
    const real *gain;  /* (n) */
    const real *norm;  /* (n) */
    real *dmagnitude;  /* (n) */
    int64_t rows, n;
    bool add;
} dora_args;

/* m / |V|, (N) in the arena. */
static const real *gains(stv_exec *x, const stv_linear *lin)
{
    real *gain = stv_reals(x, lin->n_out, 1);
    const real *magnitude = stv_widened(x, lin->lora.magnitude, lin->n_out);
    for (int64_t j = 0; j < lin->n_out && !stv_measuring(x); j++) gain[j] = magnitude[j] / lin->lora.norm[j];
    return gain;
}

static void gain_rows(const void *arg, int64_t begin, int64_t end)
{
    const dora_args *args = arg;
    for (int64_t i = begin; i < end; i++) {
        const real *a = args->a + i * args->n;
        real *y = args->y + i * args->n;
        for (int64_t j = 0; j < args->n; j++) y[j] = (args->add ? y[j] : 0) + args->gain[j] * a[j];
    }
}

/* y (+)= gain a, column by column. */
static void gained(stv_exec *x, real *y, const real *a, const real *gain, int64_t rows, int64_t n, bool add)
{
    if (stv_measuring(x)) return;
    stv_split(x, rows, stv_row_grain(n), gain_rows, &(dora_args){.y = y, .a = a, .gain = gain, .n = n, .add = add});
}

static void subtract_range(const void *arg, int64_t begin, int64_t end)
{
    const dora_args *args = arg;
    for (int64_t i = begin; i < end; i++) args->y[i] = args->a[i] - args->b[i];
}

/* y = a - b; y may be a or b. */
static void difference(stv_exec *x, real *y, const real *a, const real *b, int64_t n)
{
    if (stv_measuring(x)) return;
    stv_split(x, n, STV_ELEMENT_GRAIN, subtract_range, &(dora_args){.y = y, .a = a, .b = b});
}

static void magnitude_columns(const void *arg, int64_t begin, int64_t end)
{
    const dora_args *args = arg;
    double sum[STV_COLUMN_GRAIN] = {0};
    for (int64_t i = 0; i < args->rows; i++)
        for (int64_t j = begin; j < end; j++) sum[j - begin] += (double)args->a[i * args->n + j] * (double)args->b[i * args->n + j];
    for (int64_t j = begin; j < end; j++) args->dmagnitude[j] += (real)(sum[j - begin] / (double)args->norm[j]);
}

/* dm += sum_rows dy v / |V|, in row order. */
static void magnitude_backward(stv_exec *x, const real *dy, const real *v, const stv_linear *lin, int64_t rows)
{
    if (stv_measuring(x)) return;
    dora_args args = {.a = dy, .b = v, .norm = lin->lora.norm, .dmagnitude = lin->lora.dmagnitude, .rows = rows, .n = lin->n_out};
    stv_split(x, lin->n_out, STV_COLUMN_GRAIN, magnitude_columns, &args);
}

/* u and, unless NULL, v = drop(in) V^T. */
static void direction_forward(stv_exec *x, real *u, real *v, const real *dropped_in, const stv_linear *lin, int64_t rows)
{
    const stv_lora *lora = &lin->lora;
    stv_matmul_nt_stored(x, u, dropped_in, lora->a, rows, lora->rank, lin->n_in, false);
    scaled(x, u, u, rows * lora->rank, lora->scale);
    if (!v) return;
    stv_matmul_nt_stored(x, v, dropped_in, lin->weight, rows, lin->n_out, lin->n_in, false);
    stv_matmul_nt_stored(x, v, u, lora->b, rows, lin->n_out, lora->rank, true);
}

/* Where v lies behind u; NULL: it is not kept. */
static real *kept_v(real *u, const stv_linear *lin, int64_t rows) { return lin->lora.dmagnitude ? u + rows * lin->lora.rank : NULL; }

static void dora_forward(stv_exec *x, real *y, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    size_t mark = stv_arena_mark(x->arena);
    real *v = kept_v(u, lin, rows);
    if (!v) v = stv_reals(x, rows, lin->n_out);
    const real *dropped_in = dropped(x, in, lin, rows, drop), *gain = gains(x, lin);
    direction_forward(x, u, v, dropped_in, lin, rows);
    bool add = lin->bias.data;
    if (drops(lin, drop)) {
        real *rest = stv_reals(x, rows, lin->n_in);
        difference(x, rest, in, dropped_in, rows * lin->n_in);
        base_forward(x, y, rest, lin, rows);
        add = true;
    } else if (lin->bias.data) {
        bias_forward(x, y, lin->bias, rows, lin->n_out);
    }
    gained(x, y, v, gain, rows, lin->n_out, add);
    stv_arena_release(x->arena, mark);
}

static void dora_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                          const stv_dropout *drop, bool add)
{
    const stv_lora *lora = &lin->lora;
    int64_t N = lin->n_out, K = lin->n_in;
    size_t mark = stv_arena_mark(x->arena);
    real *dz = stv_reals(x, rows, N);
    gained(x, dz, dy, gains(x, lin), rows, N, false);
    if (lora->dmagnitude) magnitude_backward(x, dy, u + rows * lora->rank, lin, rows);
    if (!drops(lin, drop)) {
        if (din) stv_matmul_nn_stored(x, din, dz, lin->weight, rows, K, N, add);
        backward_after_din(x, din, dz, in, u, lin, rows, drop);
    } else {
        if (din) stv_matmul_nn_stored(x, din, dy, lin->weight, rows, K, N, add);
        if (lin->dweight) stv_matmul_tn(x, lin->dweight, dy, in, N, K, rows, true);
        lora_backward(x, din, dz, in, u, lin, rows, drop);
        real *beyond = dz, *scratch = stv_reals(x, rows, K); /* of the base */
        difference(x, beyond, dz, dy, rows * N);
        if (din) {
            stv_matmul_nn_stored(x, scratch, beyond, lin->weight, rows, K, N, false);
            stv_dropout_apply(x, scratch, scratch, rows, K, lora->dropout, lora->module_id, drop);
            stv_add(x, din, din, scratch, rows * K);
        }
        if (lin->dweight) stv_matmul_tn(x, lin->dweight, beyond, dropped(x, in, lin, rows, drop), N, K, rows, true);
    }
    stv_arena_release(x->arena, mark);
}

/* ---- both ---------------------------------------------------------------------------------------------------------------- */

void stv_linear_forward(stv_exec *x, real *y, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    const stv_lora *lora = &lin->lora;
    if (is_dora(lin)) {
        dora_forward(x, y, u, in, lin, rows, drop);
        return;
    }
    base_forward(x, y, in, lin, rows);
    stv_linear_forward_u(x, u, in, lin, rows, drop);
    if (lora->rank > 0) stv_matmul_nt_stored(x, y, u, lora->b, rows, lin->n_out, lora->rank, true);
}

void stv_linear_forward_u(stv_exec *x, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    if (lin->lora.rank == 0) return;
    size_t mark = stv_arena_mark(x->arena);
    direction_forward(x, u, kept_v(u, lin, rows), dropped(x, in, lin, rows, drop), lin, rows);
    stv_arena_release(x->arena, mark);
}

static void backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                     const stv_dropout *drop, bool add)
{
    if (lin->dbias) bias_backward(x, lin->dbias, dy, rows, lin->n_out);
    if (is_dora(lin)) {
        dora_backward(x, din, dy, in, u, lin, rows, drop, add);
        return;
    }
    if (din) stv_matmul_nn_stored(x, din, dy, lin->weight, rows, lin->n_in, lin->n_out, add);
    backward_after_din(x, din, dy, in, u, lin, rows, drop);
}

void stv_linear_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                         const stv_dropout *drop)
{
    backward(x, din, dy, in, u, lin, rows, drop, false);
}

void stv_linear_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                             const stv_dropout *drop)
{
    backward(x, din, dy, in, u, lin, rows, drop, true);
}

/* ---- the weight ---------------------------------------------------------------------------------------------------------- */

/* v (N,K) = W + s B A. */
static void direction(stv_exec *x, real *v, const stv_linear *lin)
{
    const stv_lora *lora = &lin->lora;
    if (!stv_measuring(x) && v != lin->weight.data) stv_widen(v, lin->weight, lin->n_out * lin->n_in);
    if (lora->rank == 0) return;
    size_t mark = stv_arena_mark(x->arena);
    real *scaled_b = stv_reals(x, lin->n_out, lora->rank);
    scaled(x, scaled_b, stv_widened(x, lora->b, lin->n_out * lora->rank), lin->n_out * lora->rank, lora->scale);
    stv_matmul_nn_stored(x, v, scaled_b, lora->a, lin->n_out, lin->n_in, lora->rank, true);
    stv_arena_release(x->arena, mark);
}

typedef struct weight_args {
    real *v, *norm;        /* (rows,n), (rows) */
    const real *magnitude; /* (rows); NULL: only the norms are wanted */
    int64_t n;
} weight_args;

static void weight_rows(const void *arg, int64_t begin, int64_t end)
{
    const weight_args *args = arg;
    for (int64_t i = begin; i < end; i++) {
        real *v = args->v + i * args->n, norm = (real)sqrt(stv_row_dot(v, v, args->n));
        if (args->norm) args->norm[i] = norm;
        if (!args->magnitude) continue;
        real gain = args->magnitude[i] / norm;
        for (int64_t k = 0; k < args->n; k++) v[k] *= gain;
    }
}

enum { NORM_ROWS = 128 }; /* of V at a time: 2 MB at K = 4096 in f32 */

void stv_linear_norms(stv_exec *x, real *norm, const stv_linear *lin)
{
    int64_t K = lin->n_in;
    for (int64_t begin = 0; begin < lin->n_out; begin += NORM_ROWS) {
        stv_linear part = *lin;
        part.n_out = lin->n_out - begin < NORM_ROWS ? lin->n_out - begin : NORM_ROWS;
        part.weight = stv_stored_from(lin->weight, begin * K);
        part.lora.b = stv_stored_from(lin->lora.b, begin * lin->lora.rank);
        size_t mark = stv_arena_mark(x->arena);
        real *v = stv_reals(x, part.n_out, K);
        direction(x, v, &part);
        if (!stv_measuring(x)) stv_split(x, part.n_out, stv_row_grain(K), weight_rows, &(weight_args){.v = v, .norm = norm + begin, .n = K});
        stv_arena_release(x->arena, mark);
    }
}

void stv_linear_merge(stv_exec *x, real *merged, const stv_linear *lin)
{
    direction(x, merged, lin);
    if (!is_dora(lin)) return;
    size_t mark = stv_arena_mark(x->arena);
    weight_args args = {.v = merged, .magnitude = stv_widened(x, lin->lora.magnitude, lin->n_out), .n = lin->n_in};
    if (!stv_measuring(x)) stv_split(x, lin->n_out, stv_row_grain(lin->n_in), weight_rows, &args);
    stv_arena_release(x->arena, mark);
}
