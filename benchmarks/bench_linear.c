/* bench_linear.c ROWS OUT IN - y = x W^T with W in bf16 as it lies, a worker of harness.py on one thread; the value is the root mean square of the first
 * rows of y. */
#define _POSIX_C_SOURCE 199309L
#define STV_REAL_BITS 32
#include "ops/gemm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Uniform in [-0.5, 0.5), as far as bf16 goes; page-aligned as large arrays are. */
static float *operand(size_t n, unsigned seed)
{
    float *data = aligned_alloc(4096, (n * sizeof *data + 4095) / 4096 * 4096);
    if (!data) exit(1);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = (float)(int)(seed >> 24) / 256 - 0.5f;
    }
    return data;
}

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    int64_t rows = atol(argv[1]), n_out = atol(argv[2]), n_in = atol(argv[3]);
    size_t n_w = (size_t)(n_out * n_in);
    float *x = operand((size_t)(rows * n_in), 1), *wide = operand(n_w, 2), *y = operand((size_t)(rows * n_out), 3);
    uint16_t *w = (uint16_t *)operand((n_w + 1) / 2, 2);
    stv_pool *pool;
    stv_arena arena;
    int repeat;
    for (size_t i = 0; i < n_w; i++) {
        union {
            float f;
            uint32_t bits;
        } u = {wide[i]};
        w[i] = (uint16_t)(u.bits >> 16);
    }
    free(wide);
    if (stv_pool_create(&pool, 1) || stv_arena_create(&arena, (size_t)64 << 20)) return 1;
    stv_exec exec = {pool, &arena};
    while (scanf(" run %d", &repeat) == 1) {
        double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID), sum = 0;
        for (int i = 0; i < repeat; i++) stv_matmul_nt_stored_f32(&exec, y, x, (stv_stored){w, STV_DTYPE_BF16}, rows, n_out, n_in, false);
        wall = (now(CLOCK_MONOTONIC) - wall) / repeat, cpu = (now(CLOCK_PROCESS_CPUTIME_ID) - cpu) / repeat;
        for (int64_t i = 0; i < 64 * n_out; i++) sum += (double)y[i] * (double)y[i];
        printf("{\"seconds\": %.9g, \"cpu_seconds\": %.9g, \"value\": %.9g, \"peak_bytes\": 0, \"growth_bytes\": 0}\n", wall, cpu,
               sqrt(sum / (double)(64 * n_out)));
        fflush(stdout);
    }
    stv_arena_free(&arena);
    stv_pool_free(pool);
    return 0;
}
