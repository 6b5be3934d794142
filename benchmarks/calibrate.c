/* calibrate.c - what one core can do, as JSON: f32 FMAs that never leave the registers, and reading memory far beyond the caches. The best of a few
 * repetitions, on the thread's own clock: a limit is not a median, and not what other processes leave over. Compile with
 * -march=native -ffp-contract=fast. */
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { CHAINS = 12, FMA_ROUNDS = 20000000, BYTES = 256 << 20, REPEAT = 5 };

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint64_t words __attribute__((vector_size(64)));

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Enough independent chains to cover the latency of an FMA on two units; the asm keeps the compiler from solving them. */
static double flop_per_second(void)
{
    vec a[CHAINS], factor, start;
    for (int i = 0; i < LANES; i++) factor[i] = 0.5f, start[i] = 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; i++) a[i] = start;
    double begin = now();
    for (int round = 0; round < FMA_ROUNDS; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) {
            a[i] = a[i] * factor + start;
            __asm__ volatile("" : "+x"(a[i]));
        }
    }
    return 2.0 * LANES * CHAINS * FMA_ROUNDS / (now() - begin);
}

static double bytes_per_second(const words *data)
{
    words sum[4] = {{0}};
    double begin = now();
    for (size_t i = 0; i < BYTES / sizeof *data; i += 4)
        for (size_t j = 0; j < 4; j++) sum[j] += data[i + j];
    double seconds = now() - begin;
    volatile uint64_t keep = sum[0][0] + sum[1][0] + sum[2][0] + sum[3][0];
    (void)keep;
    return BYTES / seconds;
}

int main(void)
{
    words *data = aligned_alloc(64, BYTES);
    if (!data) return 1;
    memset(data, 1, BYTES);
    double flop = 0, bytes = 0;
    for (int i = 0; i < REPEAT; i++) {
        double f = flop_per_second(), b = bytes_per_second(data);
        flop = f > flop ? f : flop;
        bytes = b > bytes ? b : bytes;
    }
    printf("{\"register_peak_f32\": %.4g, \"memory_bandwidth\": %.4g}\n", flop / 1e9, bytes / 1e9);
    free(data);
    return 0;
}
