/* bench_gemm.c - products of csrc/ops/gemm.h and OpenBLAS's sgemm, taking turns on one thread.
 *
 *   in, a line per product:   kind M N K add rounds    kind: nt, nn, tn as in gemm.h
 *   out, a line for each:     ours blas difference     median seconds of one product; largest difference over largest value
 *
 * Both sides are timed on the thread's own clock, which other processes do not disturb. */
#define _POSIX_C_SOURCE 199309L
#define STV_REAL_BITS 32
#include "ops/gemm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SAMPLE_FLOP 5e8 /* a product is repeated until a sample is about this long: milliseconds */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112, MAX_ROUNDS = 99 };

extern void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                              float beta, float *c, int ldc);

typedef struct product {
    char kind[3];
    int M, N, K, add;
} product;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void ours(stv_exec *x, const product *p, float *y, const float *a, const float *b)
{
    if (p->kind[0] == 't') stv_matmul_tn_f32(x, y, a, b, p->M, p->N, p->K, p->add);
    else if (p->kind[1] == 't') stv_matmul_nt_f32(x, y, a, b, p->M, p->N, p->K, p->add);
    else stv_matmul_nn_f32(x, y, a, b, p->M, p->N, p->K, p->add);
}

static void blas(const product *p, float *y, const float *a, const float *b)
{
    int ta = p->kind[0] == 't', tb = p->kind[1] == 't';
    scipy_cblas_sgemm(ROW_MAJOR, ta ? TRANS : NO_TRANS, tb ? TRANS : NO_TRANS, p->M, p->N, p->K, 1, a, ta ? p->M : p->K, b, tb ? p->K : p->N,
                      p->add ? 1 : 0, y, p->N);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, compare);
    return values[n / 2];
}

/* Page-aligned as large arrays are; filled with numbers in [-0.5, 0.5). */
static float *operand(size_t n, unsigned seed)
{
    float *data = aligned_alloc(4096, (n * sizeof *data + 4095) / 4096 * 4096);
    if (!data) exit(1);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = (float)(seed >> 8) / (1 << 24) - 0.5f;
    }
    return data;
}

static double difference(const float *a, const float *b, size_t n)
{
    double worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
        largest = fmax(largest, fabs((double)b[i]));
    }
    return worst / largest;
}

static void measure(stv_exec *x, const product *p, int rounds)
{
    size_t M = (size_t)p->M, N = (size_t)p->N, K = (size_t)p->K;
    float *a = operand(M * K, 1), *b = operand(N * K, 2), *y = operand(M * N, 3), *z = operand(M * N, 3);
    double flop = 2.0 * (double)M * (double)N * (double)K, t_ours[MAX_ROUNDS], t_blas[MAX_ROUNDS];
    ours(x, p, y, a, b), blas(p, z, a, b); /* uncounted, and the comparison */
    double differs = difference(y, z, M * N);
    int repeat = (int)(SAMPLE_FLOP / flop) + 1;
    for (int i = 0; i < rounds; i++) {
        double begin = now();
        for (int r = 0; r < repeat; r++) ours(x, p, y, a, b);
        double middle = now();
        for (int r = 0; r < repeat; r++) blas(p, z, a, b);
        t_ours[i] = (middle - begin) / repeat, t_blas[i] = (now() - middle) / repeat;
    }
    printf("%.6g %.6g %.3g\n", median(t_ours, rounds), median(t_blas, rounds), differs);
    fflush(stdout);
    free(a), free(b), free(y), free(z);
}

int main(void)
{
    stv_pool *pool;
    stv_arena arena;
    if (stv_pool_create(&pool, 1) || stv_arena_create(&arena, (size_t)64 << 20)) return 1;
    stv_exec x = {pool, &arena};
    product p;
    int rounds;
    while (scanf("%2s %d %d %d %d %d", p.kind, &p.M, &p.N, &p.K, &p.add, &rounds) == 6) measure(&x, &p, rounds < MAX_ROUNDS ? rounds : MAX_ROUNDS);
    stv_arena_free(&arena);
    stv_pool_free(pool);
    return 0;
}
