#define _POSIX_C_SOURCE 200809L /* setenv */
#include "ops/gemm.h"

#include "base/alloc.h"
#include "check_cpu.h"
#include "check_exec.h"
#include "ops/gemm_kernel.h"

typedef enum product_kind { NT, NN, TN } product_kind;

typedef struct product {
    product_kind kind;
    real *y;
    const real *a, *b;
    int64_t M, N, K;
    bool add;
} product;

static void multiply(stv_exec *x, void *context)
{
    product *p = context;
    if (p->kind == NT) stv_matmul_nt(x, p->y, p->a, p->b, p->M, p->N, p->K, p->add);
    if (p->kind == NN) stv_matmul_nn(x, p->y, p->a, p->b, p->M, p->N, p->K, p->add);
    if (p->kind == TN) stv_matmul_tn(x, p->y, p->a, p->b, p->M, p->N, p->K, p->add);
}

static real *new_reals(int64_t n, uint64_t seed)
{
    real *p = check_new((size_t)n * sizeof *p);
    if (seed) check_fill(p, n, seed);
    return p;
}

static double at_a(const product *p, int64_t i, int64_t k) { return p->kind == TN ? p->a[k * p->M + i] : p->a[i * p->K + k]; }

static double at_b(const product *p, int64_t k, int64_t j) { return p->kind == NT ? p->b[j * p->K + k] : p->b[k * p->N + j]; }

/* The order that gemm_kernel.h promises, one output at a time: with it, independence of M, tile, block and thread is proven bit by bit. */
static real promised(const product *p, int64_t i, int64_t j, real old)
{
    real sum = 0;
    for (int64_t k0 = 0; k0 < p->K; k0 += STV_GEMM_K_BLOCK) {
        real chain = 0;
        for (int64_t k = k0; k < p->K && k < k0 + STV_GEMM_K_BLOCK; k++) {
            real a = (real)at_a(p, i, k), b = (real)at_b(p, k, j);
            if (stv_cpu() == STV_CPU_PORTABLE) chain += a * b;
            else chain = STV_REAL_BITS == 32 ? fmaf((float)a, (float)b, (float)chain) : fma(a, b, chain);
        }
        sum = k0 > 0 ? sum + chain : p->add ? old + chain : chain;
    }
    return sum;
}

static const char *const kind_names[] = {"nt", "nn", "tn"};

static const int64_t shapes[][3] = {
    {1, 1, 1},      {1, 7, 3},      {2, 3, 257},  {5, 16, 8},   {6, 17, 13},  {13, 31, 29},   {14, 32, 256},
    {15, 33, 64},   {28, 64, 512},  {29, 65, 1},  {31, 8, 300}, {64, 96, 96}, {101, 300, 37}, {113, 41, 523},
    {9, 1100, 260}, {2100, 30, 20}, {50, 8, 300}, {1, 53, 299}, {1, 24, 16},  {1, 9, 37},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* Sums in double of at most 523 products below 1: an f32 chain drifts by about sqrt(K) 2^-24, seen 9e-7 m-rel at most, f64 2e-15. */
static const double value_tolerance = STV_REAL_BITS == 32 ? 2e-6 : 4e-15;

static void values_and_order(void)
{
    for (int i_shape = 0; i_shape < N_SHAPES; i_shape++) {
        for (int variant = 0; variant < 6; variant++) {
            product p = {
                .kind = (product_kind)(variant / 2), .add = variant % 2, .M = shapes[i_shape][0], .N = shapes[i_shape][1], .K = shapes[i_shape][2]};
            int64_t n = p.M * p.N;
            p.a = new_reals(p.M * p.K, 1), p.b = new_reals(p.N * p.K, 2), p.y = new_reals(n, p.add ? 3 : 0);
            real *old = new_reals(n, 3), *ordered = new_reals(n, 0);
            double *exact = check_new((size_t)n * sizeof *exact);
            for (int64_t i = 0; i < n; i++) {
                exact[i] = p.add ? old[i] : 0;
                for (int64_t k = 0; k < p.K; k++) exact[i] += at_a(&p, i / p.N, k) * at_b(&p, k, i % p.N);
                ordered[i] = promised(&p, i / p.N, i % p.N, old[i]);
            }
            char what[100];
            snprintf(what, sizeof what, "%s M %d N %d K %d add %d", kind_names[p.kind], (int)p.M, (int)p.N, (int)p.K, p.add);
            check_exec(1, multiply, &p);
            CHECK_MREL(what, p.y, exact, n, value_tolerance);
            CHECK_SAME_BITS(what, p.y, ordered, (size_t)n * sizeof(real));
            check_release_buffers();
        }
    }
}

/* ---- a right side stored narrower ------------------------------------------------------------------------------------------ */

typedef struct stored_product {
    product p; /* b: widened */
    stv_stored stored;
} stored_product;

static void multiply_stored(stv_exec *x, void *context)
{
    const stored_product *s = context;
    const product *p = &s->p;
    if (p->kind == NT) stv_matmul_nt_stored(x, p->y, p->a, s->stored, p->M, p->N, p->K, p->add);
    else stv_matmul_nn_stored(x, p->y, p->a, s->stored, p->M, p->N, p->K, p->add);
}

/* Values (n) of a narrower type: of halves, the bit patterns that are numbers, subnormals among them. */
static stv_stored narrow_values(stv_dtype dtype, int64_t n)
{
    void *data = check_new((size_t)n * stv_dtype_size(dtype));
    if (dtype == STV_DTYPE_F32)
        for (int64_t i = 0; i < n; i++) ((float *)data)[i] = (float)(i * 7919 % 1009) / 1009 - 0.5F;
    else
        for (int64_t i = 0; i < n; i++) {
            uint16_t bits = (uint16_t)(i * 40503 + 12345);
            if (dtype == STV_DTYPE_F16) ((uint16_t *)data)[i] = (bits & 0x7C00) == 0x7C00 ? 0 : bits;
            else ((uint16_t *)data)[i] = bits & 0xBFFF; /* below 2: no sum is infinite */
        }
    return (stv_stored){data, dtype};
}

/* Widening while packing is widening before, for any type, shape, place in memory and number of threads. */
static void stored_products_are_products_of_widened(void)
{
    static const stv_dtype dtypes[] = {STV_DTYPE_F16, STV_DTYPE_BF16, STV_DTYPE_F32};
    for (int i_shape = 0; i_shape < N_SHAPES; i_shape++)
        for (int variant = 0; variant < 4 * (STV_REAL_BITS == 32 ? 2 : 3); variant++) {
            int64_t M = shapes[i_shape][0], N = shapes[i_shape][1], K = shapes[i_shape][2];
            stv_dtype dtype = dtypes[variant / 4];
            stored_product s = {.stored = stv_stored_from(narrow_values(dtype, N * K + 1), 1)};
            real *widened = new_reals(N * K, 0), *want = new_reals(M * N, variant % 2 ? 15 : 0);
            stv_widen(widened, s.stored, N * K);
            s.p = (product){
                .kind = (product_kind)(variant / 2 % 2), new_reals(M * N, variant % 2 ? 15 : 0), new_reals(M * K, 13), widened, M, N, K, variant % 2};
            char what[100];
            snprintf(what, sizeof what, "%s of %s M %d N %d K %d", kind_names[s.p.kind], stv_dtype_name(dtype), (int)M, (int)N, (int)K);
            check_exec(1 + i_shape % 3, multiply_stored, &s);
            product wide = s.p;
            wide.y = want;
            check_exec(1, multiply, &wide);
            CHECK_SAME_BITS(what, s.p.y, want, (size_t)(M * N) * sizeof *want);
            check_release_buffers();
        }
}

static void stored_nan_stays_in_its_row(void)
{
    enum { M = 17, N = 35, K = 20 };
    for (int bf16 = 0; bf16 < 2; bf16++) {
        stv_stored w = narrow_values(bf16 ? STV_DTYPE_BF16 : STV_DTYPE_F16, N * K);
        ((uint16_t *)(void *)w.data)[34 * K + 2] = 0x7FC0;
        stored_product s = {{NT, new_reals(M * N, 0), new_reals(M * K, 9), NULL, M, N, K, false}, w};
        check_exec(1, multiply_stored, &s);
        for (int64_t i = 0; i < M * N; i++) CHECK(isnan(s.p.y[i]) == (i % N == 34));
    }
}

static void same_bits_for_any_row_count(void)
{
    enum { M = 64, N = 150, K = 530 };
    real *a = new_reals(M * K, 4), *w = new_reals(N * K, 5), *all = new_reals(M * N, 0), *few = new_reals(M * N, 0);
    check_exec(1, multiply, &(product){NT, all, a, w, M, N, K, false});
    for (int64_t rows = 1; rows <= M; rows++) {
        char what[40];
        snprintf(what, sizeof what, "M %d", (int)rows);
        memset(few, 0xFF, M * N * sizeof *few);
        check_exec((int)(rows % 3) + 1, multiply, &(product){NT, few, a + (M - rows) * K, w, rows, N, K, false});
        CHECK_SAME_BITS(what, few, all + (M - rows) * N, (size_t)(rows * N) * sizeof *few);
    }
}

static void same_bits_for_any_thread_count(void)
{
    static const int64_t sizes[][3] = {{1, 1000, 300}, {301, 130, 270}, {64, 520, 64}, {700, 8, 100}};
    for (int i = 0; i < 4; i++) {
        int64_t M = sizes[i][0], N = sizes[i][1], K = sizes[i][2];
        for (int kind = 0; kind < 3; kind++) {
            real *a = new_reals(M * K, 6), *b = new_reals(N * K, 7), *one = new_reals(M * N, 0);
            check_exec(1, multiply, &(product){(product_kind)kind, one, a, b, M, N, K, false});
            static const int n_threads[] = {2, 3, 4, 7};
            for (int t = 0; t < 4; t++) {
                real *y = new_reals(M * N, 0);
                check_exec(n_threads[t], multiply, &(product){(product_kind)kind, y, a, b, M, N, K, false});
                CHECK_SAME_BITS(kind_names[kind], y, one, (size_t)(M * N) * sizeof *y);
            }
            check_release_buffers();
        }
    }
}

static void nothing_to_sum(void)
{
    real *y = new_reals(6, 8), *kept = new_reals(6, 8);
    check_exec(1, multiply, &(product){NT, y, y, y, 2, 3, 0, true});
    CHECK_SAME_BITS("K 0, add", y, kept, 6 * sizeof *y);
    check_exec(1, multiply, &(product){NT, y, y, y, 0, 3, 5, false});
    check_exec(1, multiply, &(product){TN, y, y, y, 2, 0, 5, false});
    CHECK_SAME_BITS("no outputs", y, kept, 6 * sizeof *y);
    check_exec(1, multiply, &(product){NT, y, y, y, 2, 3, 0, false});
    for (int i = 0; i < 6; i++) CHECK(y[i] == 0);
}

/* A row or column of NaN reaches its own outputs and no other: padding multiplies nothing that is stored. */
static void nan_stays_in_its_row(void)
{
    enum { M = 17, N = 35, K = 20 };
    real *a = new_reals(M * K, 9), *w = new_reals(N * K, 10), *y = new_reals(M * N, 0);
    a[3 * K + 1] = w[34 * K + 2] = (real)NAN;
    check_exec(1, multiply, &(product){NT, y, a, w, M, N, K, false});
    for (int64_t i = 0; i < M * N; i++) CHECK(!isnan(y[i]) == (i / N != 3 && i % N != 34));
}

static void steady_call_allocates_nothing(void)
{
    enum { M = 100, N = 200, K = 300 };
    real *a = new_reals(M * K, 11), *w = new_reals(N * K, 12), *y = new_reals(M * N, 0);
    product p = {NT, y, a, w, M, N, K, false};
    stv_pool *pool;
    stv_arena arena;
    if (!CHECK(stv_pool_create(&pool, 2) == STV_OK)) return;
    stv_arena_init_measuring(&arena);
    stv_exec x = {pool, &arena};
    multiply(&x, &p);
    if (!CHECK(stv_arena_create(&arena, arena.peak) == STV_OK)) return;
    uint64_t before = stv_alloc_count();
    for (int i = 0; i < 3; i++) multiply(&x, &p);
    CHECK_INT(stv_alloc_count(), before);
    stv_arena_free(&arena);
    stv_pool_free(pool);
}

static void lower_cpu_levels(void) { check_lower_cpu_levels(); }

static const check_case cases[] = {
    {"values and order", values_and_order},
    {"stored products are products of widened", stored_products_are_products_of_widened},
    {"stored nan stays in its row", stored_nan_stays_in_its_row},
    {"same bits for any row count", same_bits_for_any_row_count},
    {"same bits for any thread count", same_bits_for_any_thread_count},
    {"nothing to sum", nothing_to_sum},
    {"nan stays in its row", nan_stays_in_its_row},
    {"steady call allocates nothing", steady_call_allocates_nothing},
    {"lower cpu levels", lower_cpu_levels},
};

int main(int argc, char **argv)
{
    check_program = argv[0];
    return CHECK_RUN(cases);
}
