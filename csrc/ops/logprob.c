/* logprob.c - the vocabulary in strips, so that (rows, V) logits never exist.
 *
 *            strip 0        strip 1     ...                forward: logits of a strip -> running (max, sum) of every row, and the
 *   h row  | 512 logits | 512 logits | ...                          logits of the targets that lie in it
 *                                                          backward: the same logits again -> d logits in place -> dh += ., dw strip += .
 *
 * Recomputing the logits costs one more product and saves the only buffer of a training step that grows with V. A strip's logits of all rows
 * are held at once: 512 / D of the size of h. */
#include "ops/logprob.h"

#include "ops/fastmath.h"
#include "ops/gemm.h"
#include "ops/reduce.h"
#include "ops/split.h"

enum { STRIP = 512 };

static int64_t strip_width(int64_t V, int64_t v0) { return V - v0 < STRIP ? V - v0 : STRIP; }

typedef struct strip_args {
    real *logits; /* (n_rows, width); backward turns them into gradients */
    int64_t v0, width;
    const stv_targets *targets;
    double *logp, *max, *sum;  /* forward */
    const double *dlogp, *lse; /* backward */
} strip_args;

STV_CLONES static void forward_rows(const void *arg, int64_t begin, int64_t end)
{
    const strip_args *a = arg;
    const stv_targets *targets = a->targets;
    for (int64_t r = begin; r < end; r++) {
        real *logits = a->logits + r * a->width, max = stv_row_max(logits, (real)a->max[r], a->width);
        for (int64_t i = targets->row_begin[r]; i < targets->row_begin[r + 1]; i++) {
            int64_t target = targets->order[i], v = targets->token[target] - a->v0;
            if (v >= 0 && v < a->width) a->logp[target] = (double)logits[v];
        }
        for (int64_t v = 0; v < a->width; v++) logits[v] = exp_real(logits[v] - max);
        double before = a->v0 ? a->sum[r] * exp(a->max[r] - (double)max) : 0;
        a->sum[r] = before + stv_row_sum(logits, a->width);
        a->max[r] = (double)max;
    }
}

static void finish_rows(const void *arg, int64_t begin, int64_t end)
{
    const strip_args *a = arg;
    const stv_targets *targets = a->targets;
    for (int64_t r = begin; r < end; r++) {
        double lse = a->max[r] + log(a->sum[r]);
        for (int64_t i = targets->row_begin[r]; i < targets->row_begin[r + 1]; i++) a->logp[targets->order[i]] -= lse;
        a->sum[r] = lse;
    }
}

void stv_logprob_forward(stv_exec *x, double *logp, double *lse, const real *h, stv_stored w, int64_t D, int64_t V, const stv_targets *targets)
{
    size_t mark = stv_arena_mark(x->arena);
    int64_t n_rows = targets->n_rows;
    strip_args args = {.targets = targets, .logp = logp, .sum = lse};
    args.logits = stv_arena_alloc(x->arena, (size_t)(n_rows * strip_width(V, 0)) * sizeof(real));
    args.max = stv_arena_alloc(x->arena, (size_t)n_rows * sizeof(double));
    if (!stv_measuring(x))
        for (int64_t r = 0; r < n_rows; r++) args.max[r] = -INFINITY;
    for (args.v0 = 0; args.v0 < V; args.v0 += STRIP) {
        args.width = strip_width(V, args.v0);
        stv_matmul_nt_stored(x, args.logits, h, stv_stored_from(w, args.v0 * D), n_rows, args.width, D, false);
        if (!stv_measuring(x)) stv_split(x, n_rows, stv_row_grain(args.width), forward_rows, &args);
    }
    if (!stv_measuring(x)) stv_split(x, n_rows, STV_ELEMENT_GRAIN, finish_rows, &args);
    stv_arena_release(x->arena, mark);
}

STV_CLONES static void backward_rows(const void *arg, int64_t begin, int64_t end)
{
    const strip_args *a = arg;
    const stv_targets *targets = a->targets;
    for (int64_t r = begin; r < end; r++) {
        real *logits = a->logits + r * a->width;
        int64_t i_begin = targets->row_begin[r], i_end = targets->row_begin[r + 1];
        double total = 0, lse = a->lse[r];
        for (int64_t i = i_begin; i < i_end; i++) total += a->dlogp[targets->order[i]];
        real weight = (real)-total;
        for (int64_t v = 0; v < a->width; v++) logits[v] = weight * exp_real((real)((double)logits[v] - lse));
        for (int64_t i = i_begin; i < i_end; i++) {
            int64_t target = targets->order[i], v = targets->token[target] - a->v0;
            if (v >= 0 && v < a->width) logits[v] += (real)a->dlogp[target];
        }
    }
}

void stv_logprob_backward(stv_exec *x, stv_logprob_grads grads, const double *dlogp, const double *lse, const real *h, stv_stored w, int64_t D,
                          int64_t V, const stv_targets *targets)
{
    size_t mark = stv_arena_mark(x->arena);
    int64_t n_rows = targets->n_rows;
    strip_args args = {.targets = targets, .dlogp = dlogp, .lse = lse};
    args.logits = stv_arena_alloc(x->arena, (size_t)(n_rows * strip_width(V, 0)) * sizeof(real));
    for (args.v0 = 0; args.v0 < V; args.v0 += STRIP) {
        args.width = strip_width(V, args.v0);
        stv_stored w_strip = stv_stored_from(w, args.v0 * D);
        stv_matmul_nt_stored(x, args.logits, h, w_strip, n_rows, args.width, D, false);
        if (!stv_measuring(x)) stv_split(x, n_rows, stv_row_grain(args.width), backward_rows, &args);
        stv_matmul_nn_stored(x, grads.dh, args.logits, w_strip, n_rows, D, args.width, args.v0 > 0);
        if (grads.dw) stv_matmul_tn(x, grads.dw + args.v0 * D, args.logits, h, args.width, D, n_rows, true);
    }
    stv_arena_release(x->arena, mark);
}

typedef struct mean_args {
    double *mean_logit, *mean_row;
    const real *h;
    stv_stored w;
    int64_t D, V;
} mean_args;

static void mean_columns(const void *arg, int64_t begin, int64_t end)
{
    const mean_args *a = arg;
    real scratch[STV_COLUMN_GRAIN];
    for (int64_t i = begin; i < end; i++) a->mean_row[i] = 0;
    for (int64_t v = 0; v < a->V; v++) {
        const real *w = stv_read(a->w, v * a->D + begin, end - begin, scratch);
        for (int64_t i = begin; i < end; i++) a->mean_row[i] += (double)w[i - begin];
    }
    for (int64_t i = begin; i < end; i++) a->mean_row[i] /= (double)a->V;
}

static void mean_logit_rows(const void *arg, int64_t begin, int64_t end)
{
    const mean_args *a = arg;
    for (int64_t r = begin; r < end; r++) {
        double sum = 0;
        for (int64_t i = 0; i < a->D; i++) sum += (double)a->h[r * a->D + i] * a->mean_row[i];
        a->mean_logit[r] = sum;
    }
}

void stv_mean_logit(stv_exec *x, double *mean_logit, const real *h, stv_stored w, int64_t n_rows, int64_t D, int64_t V)
{
    size_t mark = stv_arena_mark(x->arena);
    mean_args args = {mean_logit, stv_arena_alloc(x->arena, (size_t)D * sizeof(double)), h, w, D, V};
    if (!stv_measuring(x)) {
        stv_split(x, D, STV_COLUMN_GRAIN, mean_columns, &args);
        stv_split(x, n_rows, stv_row_grain(D), mean_logit_rows, &args);
    }
    stv_arena_release(x->arena, mark);
}
