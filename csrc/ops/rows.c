#include "ops/rows.h"

#include "ops/split.h"

#include <string.h>

typedef struct rows_args {
    real *y, *features;
    const real *a, *b;
    stv_stored table;
    const int64_t *index;
    const int32_t *token;
    int64_t n, D;
} rows_args;

const real *stv_widened(stv_exec *x, stv_stored values, int64_t n)
{
    real *wide = stv_reals(x, n, 1);
    return stv_measuring(x) ? wide : stv_read(values, 0, n, wide);
}

static void zero_range(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    memset(args->y + begin, 0, (size_t)(end - begin) * sizeof(real));
}

static void copy_range(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    memcpy(args->y + begin, args->a + begin, (size_t)(end - begin) * sizeof(real));
}

static void add_range(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    for (int64_t i = begin; i < end; i++) args->y[i] = args->a[i] + args->b[i];
}

void stv_zero(stv_exec *x, real *y, int64_t n)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y};
    stv_split(x, n, STV_ELEMENT_GRAIN, zero_range, &args);
}

void stv_copy(stv_exec *x, real *y, const real *in, int64_t n)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y, .a = in};
    stv_split(x, n, STV_ELEMENT_GRAIN, copy_range, &args);
}

void stv_add(stv_exec *x, real *y, const real *a, const real *b, int64_t n)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y, .a = a, .b = b};
    stv_split(x, n, STV_ELEMENT_GRAIN, add_range, &args);
}

static void gather_rows(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    int64_t D = args->D;
    for (int64_t i = begin; i < end; i++) memcpy(args->y + i * D, args->a + args->index[i] * D, (size_t)D * sizeof(real));
}

void stv_gather_rows(stv_exec *x, real *y, const real *in, const int64_t *index, int64_t n, int64_t D)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y, .a = in, .index = index, .D = D};
    stv_split(x, n, stv_row_grain(D), gather_rows, &args);
}

/* Rows may repeat, so threads split columns, and every element gets its terms in the order of i. */
static void scatter_columns(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    int64_t D = args->D;
    for (int64_t i = 0; i < args->n; i++) {
        real *y = args->y + args->index[i] * D;
        const real *in = args->a + i * D;
        for (int64_t c = begin; c < end; c++) y[c] += in[c];
    }
}

void stv_scatter_add_rows(stv_exec *x, real *y, const real *in, const int64_t *index, int64_t n, int64_t D)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y, .a = in, .index = index, .n = n, .D = D};
    stv_split(x, D, STV_COLUMN_GRAIN, scatter_columns, &args);
}

typedef struct finite_args {
    const real *in;
    bool *finite; /* one answer for each range */
} finite_args;

/* x - x is 0 for a number and NaN for an infinity or a NaN, so the sum stays 0 exactly while all are numbers. */
static void finite_range(const void *arg, int64_t begin, int64_t end)
{
    const finite_args *args = arg;
    real lane[8] = {0};
    int64_t i = begin;
    for (; i + 8 <= end; i += 8)
        for (int l = 0; l < 8; l++) lane[l] += args->in[i + l] - args->in[i + l];
    for (; i < end; i++) lane[0] += args->in[i] - args->in[i];
    bool finite = true;
    for (int l = 0; l < 8; l++) finite &= lane[l] == 0;
    args->finite[begin / STV_ELEMENT_GRAIN] = finite;
}

bool stv_all_finite(stv_exec *x, const real *in, int64_t n)
{
    size_t mark = stv_arena_mark(x->arena);
    int64_t n_ranges = (n + STV_ELEMENT_GRAIN - 1) / STV_ELEMENT_GRAIN;
    finite_args args = {in, stv_arena_alloc(x->arena, (size_t)n_ranges * sizeof(bool))};
    bool finite = true;
    if (!stv_measuring(x)) {
        stv_split(x, n, STV_ELEMENT_GRAIN, finite_range, &args);
        for (int64_t i = 0; i < n_ranges; i++) finite &= args.finite[i];
    }
    stv_arena_release(x->arena, mark);
    return finite;
}

static void splice_rows(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    int64_t D = args->D;
    for (int64_t r = begin; r < end; r++) {
        int64_t feature = args->index ? args->index[r] : -1;
        if (feature >= 0) memcpy(args->y + r * D, args->a + feature * D, (size_t)D * sizeof(real));
        else stv_widen(args->y + r * D, stv_stored_from(args->table, args->token[r] * D), D);
    }
}

void stv_splice_forward(stv_exec *x, real *y, stv_stored table, const real *features, const int32_t *token, const int64_t *feature, int64_t rows,
                        int64_t D)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = y, .table = table, .a = features, .index = feature, .token = token, .D = D};
    stv_split(x, rows, stv_row_grain(D), splice_rows, &args);
}

static void unsplice_columns(const void *arg, int64_t begin, int64_t end)
{
    const rows_args *args = arg;
    int64_t D = args->D;
    for (int64_t r = 0; r < args->n; r++) {
        int64_t feature = args->index[r];
        real *table = feature >= 0 ? args->features : args->y;
        if (!table) continue;
        real *to = table + (feature >= 0 ? feature : args->token[r]) * D;
        const real *dy = args->a + r * D;
        for (int64_t c = begin; c < end; c++) to[c] += dy[c];
    }
}

void stv_splice_backward(stv_exec *x, real *dtable, real *dfeatures, const real *dy, const int32_t *token, const int64_t *feature, int64_t rows,
                         int64_t D)
{
    if (stv_measuring(x)) return;
    rows_args args = {.y = dtable, .features = dfeatures, .a = dy, .index = feature, .token = token, .n = rows, .D = D};
    stv_split(x, D, STV_COLUMN_GRAIN, unsplice_columns, &args);
}
