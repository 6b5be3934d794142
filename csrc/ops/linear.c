/* linear.c - the adapter in the forward pass is two thin products: u = s drop(x) A^T, y += u B^T. With du = dy B (so that dL/d(drop(x) A^T) = s du):
 *
 *   dW += dy^T x    db += sum_rows dy    dB += dy^T u    dA += (s du)^T drop(x)    dx = dy W + drop'(s du A)
 *
 * drop(x) is not kept: its mask is recomputed from where it is (dropout.h). */
#include "ops/linear.h"

#include "ops/gemm.h"
#include "ops/rows.h"
#include "ops/split.h"

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

static bool drops(const stv_lora *lora, const stv_dropout *drop) { return drop && lora->dropout > 0; }

/* y = s in; y may be in. */
static void scaled(stv_exec *x, real *y, const real *in, int64_t n, real scale)
{
    if (stv_measuring(x)) return;
    for (int64_t i = 0; i < n; i++) y[i] = in[i] * scale;
}

void stv_linear_forward(stv_exec *x, real *y, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    const stv_lora *lora = &lin->lora;
    if (lin->bias.data) bias_forward(x, y, lin->bias, rows, lin->n_out);
    stv_matmul_nt_stored(x, y, in, lin->weight, rows, lin->n_out, lin->n_in, lin->bias.data != NULL);
    stv_linear_forward_u(x, u, in, lin, rows, drop);
    if (lora->rank > 0) stv_matmul_nt_stored(x, y, u, lora->b, rows, lin->n_out, lora->rank, true);
}

void stv_linear_forward_u(stv_exec *x, real *u, const real *in, const stv_linear *lin, int64_t rows, const stv_dropout *drop)
{
    const stv_lora *lora = &lin->lora;
    if (lora->rank == 0) return;
    size_t mark = stv_arena_mark(x->arena);
    const real *dropped = in;
    if (drops(lora, drop)) {
        real *scratch = stv_reals(x, rows, lin->n_in);
        stv_dropout_apply(x, scratch, in, rows, lin->n_in, lora->dropout, lora->module_id, drop);
        dropped = scratch;
    }
    stv_matmul_nt_stored(x, u, dropped, lora->a, rows, lora->rank, lin->n_in, false);
    scaled(x, u, u, rows * lora->rank, lora->scale);
    stv_arena_release(x->arena, mark);
}

static void lora_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                          const stv_dropout *drop)
{
    const stv_lora *lora = &lin->lora;
    if (lora->db) stv_matmul_tn(x, lora->db, dy, u, lin->n_out, lora->rank, rows, true);
    if (!lora->da && !din) return;

    size_t mark = stv_arena_mark(x->arena);
    real *du = stv_reals(x, rows, lora->rank);
    real *scratch = drops(lora, drop) ? stv_reals(x, rows, lin->n_in) : NULL;
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
    if (lin->dbias) bias_backward(x, lin->dbias, dy, rows, lin->n_out);
    if (lin->dweight) stv_matmul_tn(x, lin->dweight, dy, in, lin->n_out, lin->n_in, rows, true);
    if (lin->lora.rank > 0) lora_backward(x, din, dy, in, u, lin, rows, drop);
}

void stv_linear_backward(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                         const stv_dropout *drop)
{
    if (din) stv_matmul_nn_stored(x, din, dy, lin->weight, rows, lin->n_in, lin->n_out, false);
    backward_after_din(x, din, dy, in, u, lin, rows, drop);
}

void stv_linear_backward_add(stv_exec *x, real *din, const real *dy, const real *in, const real *u, const stv_linear *lin, int64_t rows,
                             const stv_dropout *drop)
{
    if (din) stv_matmul_nn_stored(x, din, dy, lin->weight, rows, lin->n_in, lin->n_out, true);
    backward_after_din(x, din, dy, in, u, lin, rows, drop);
}

void stv_linear_merge(stv_exec *x, real *merged, const stv_linear *lin)
{
    const stv_lora *lora = &lin->lora;
    if (!stv_measuring(x) && merged != lin->weight.data) stv_widen(merged, lin->weight, lin->n_out * lin->n_in);
    if (lora->rank == 0) return;
    size_t mark = stv_arena_mark(x->arena);
    real *scaled_b = stv_reals(x, lin->n_out, lora->rank);
    scaled(x, scaled_b, stv_widened(x, lora->b, lin->n_out * lora->rank), lin->n_out * lora->rank, lora->scale);
    stv_matmul_nn_stored(x, merged, scaled_b, lora->a, lin->n_out, lin->n_in, lora->rank, true);
    stv_arena_release(x->arena, mark);
}
