/* check.h - the whole C test harness: cases, expectations, guarded buffers, central differences.
 *
 *     static void zero_rows(void) { ... CHECK(n == 0); ... }
 *     static const check_case cases[] = {{"zero rows", zero_rows}, ...};
 *     int main(int argc, char **argv) { return CHECK_RUN(cases); }
 *
 * A failed check prints and counts, the case goes on; the exit code is 1 if anything failed. `test_x NAME` runs the cases whose name contains
 * NAME. Buffers from check_new are poisoned (NaN), fenced by sentinels, aligned to one double only (as borrowed buffers are), and checked and
 * freed when the case ends. `got` and `want` may be float or double arrays, in any mixture. */
#ifndef STV_TESTS_CHECK_H
#define STV_TESTS_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct check_case {
    const char *name;
    void (*run)(void);
} check_case;

typedef struct check_buffer {
    unsigned char *block;
    size_t size_bytes;
    struct check_buffer *next;
} check_buffer;

#define CHECK_FENCE 64
#define CHECK_FENCE_BYTE 0xB7

static const char *check_case_name = "";
static long check_n_checks, check_n_failed;
static check_buffer *check_buffers;

/* ---- expectations -------------------------------------------------------------------------------------------------------- */

#define CHECK(condition) check_true((condition), #condition, __FILE__, __LINE__)
#define CHECK_INT(got, want) check_int((int64_t)(got), (int64_t)(want), #got, __FILE__, __LINE__)
#define CHECK_STR(got, want) check_str((got), (want), #got, __FILE__, __LINE__)
/* max |got - want| <= tolerance * max |want|; NaN fails. `what` names the comparison (shape, seed, ...). */
#define CHECK_MREL(what, got, want, n, tolerance) \
    check_mrel((what), (got), CHECK_SIZE(got), (want), CHECK_SIZE(want), (n), (tolerance), __FILE__, __LINE__)
#define CHECK_SAME_BITS(what, a, b, size_bytes) check_same_bits((what), (a), (b), (size_bytes), __FILE__, __LINE__)

#define CHECK_SIZE(p) \
    _Generic((p), float * : sizeof(float), const float * : sizeof(float), double * : sizeof(double), const double * : sizeof(double))

static inline bool check_report(bool ok, const char *file, int line)
{
    check_n_checks++;
    if (ok) return true;
    check_n_failed++;
    printf("  FAILED [%s] %s:%d: ", check_case_name, file, line);
    return false;
}

static inline bool check_true(bool ok, const char *text, const char *file, int line)
{
    if (!check_report(ok, file, line)) printf("%s\n", text);
    return ok;
}

static inline bool check_int(int64_t got, int64_t want, const char *text, const char *file, int line)
{
    bool ok = check_report(got == want, file, line);
    if (!ok) printf("%s is %lld, want %lld\n", text, (long long)got, (long long)want);
    return ok;
}

static inline bool check_str(const char *got, const char *want, const char *text, const char *file, int line)
{
    bool ok = check_report(got && strcmp(got, want) == 0, file, line);
    if (!ok) printf("%s is \"%s\", want \"%s\"\n", text, got ? got : "(null)", want);
    return ok;
}

static inline double check_at(const void *p, size_t size, int64_t i) { return size == 4 ? ((const float *)p)[i] : ((const double *)p)[i]; }

static inline bool check_mrel(const char *what, const void *got, size_t got_size, const void *want, size_t want_size, int64_t n, double tolerance,
                              const char *file, int line)
{
    double scale = 0, worst = 0;
    int64_t i_worst = -1;
    for (int64_t i = 0; i < n; i++) scale = fmax(scale, fabs(check_at(want, want_size, i)));
    for (int64_t i = 0; i < n; i++) {
        double error = fabs(check_at(got, got_size, i) - check_at(want, want_size, i));
        if (!(error <= worst)) {
            worst = error;
            i_worst = i;
            if (isnan(error)) break;
        }
    }
    bool ok = check_report(worst <= tolerance * scale, file, line);
    if (!ok)
        printf("%s: element %lld of %lld is %.17g, want %.17g; m-rel error %.3g > %.3g\n", what, (long long)i_worst, (long long)n,
               check_at(got, got_size, i_worst), check_at(want, want_size, i_worst), worst / scale, tolerance);
    return ok;
}

static inline bool check_same_bits(const char *what, const void *a, const void *b, size_t size_bytes, const char *file, int line)
{
    bool ok = check_report(memcmp(a, b, size_bytes) == 0, file, line);
    if (!ok) {
        size_t i = 0;
        while (((const unsigned char *)a)[i] == ((const unsigned char *)b)[i]) i++;
        printf("%s: bits differ, first at byte %zu of %zu\n", what, i, size_bytes);
    }
    return ok;
}

/* Says why a case cannot run here; call it instead of the case's body. */
static inline void check_skip(const char *reason) { printf("skip   %s: %s\n", check_case_name, reason); }

/* ---- buffers ------------------------------------------------------------------------------------------------------------- */

/* Every byte 0xFF (a NaN in both precisions, -1 in integers), so that an element nobody wrote is seen. */
static inline void *check_new(size_t size_bytes)
{
    check_buffer *buffer = malloc(sizeof *buffer);
    size_t total = CHECK_FENCE + 8 + size_bytes + CHECK_FENCE;
    unsigned char *block = aligned_alloc(64, (total + 63) & ~(size_t)63);
    if (!buffer || !block) {
        printf("out of memory in the test harness\n");
        exit(2);
    }
    memset(block, CHECK_FENCE_BYTE, total);
    memset(block + CHECK_FENCE + 8, 0xFF, size_bytes);
    *buffer = (check_buffer){block, size_bytes, check_buffers};
    check_buffers = buffer;
    return block + CHECK_FENCE + 8;
}

static inline void check_release_buffers(void)
{
    while (check_buffers) {
        check_buffer *buffer = check_buffers;
        bool intact = true;
        for (size_t i = 0; i < CHECK_FENCE + 8; i++) intact &= buffer->block[i] == CHECK_FENCE_BYTE;
        for (size_t i = 0; i < CHECK_FENCE; i++) intact &= buffer->block[CHECK_FENCE + 8 + buffer->size_bytes + i] == CHECK_FENCE_BYTE;
        if (!check_report(intact, __FILE__, __LINE__)) printf("a write outside a buffer of %zu bytes\n", buffer->size_bytes);
        check_buffers = buffer->next;
        free(buffer->block);
        free(buffer);
    }
}

/* Uniform in [-1,1), 53 bits: sums of products of shorter numbers would be exact in f64 and hide the order of summation. */
static inline double check_random(uint64_t seed, uint64_t i)
{
    uint64_t z = (seed * 0x9E3779B97F4A7C15u) ^ (i + 1) * 0xD1B54A32D192ED03u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1p-52 - 1.0;
}

static inline void check_fill_f32(float *p, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) p[i] = (float)check_random(seed, (uint64_t)i);
}

static inline void check_fill_f64(double *p, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) p[i] = check_random(seed, (uint64_t)i);
}

#define check_fill(p, n, seed) _Generic((p), float * : check_fill_f32, double * : check_fill_f64)((p), (n), (seed))

/* ---- gradients ----------------------------------------------------------------------------------------------------------- */

/* loss(context) reads `parameter`; its central differences are compared with `gradient`, m-rel. The step 1e-5 leaves about 1e-10 of truncation
 * and 1e-11 of rounding for values near one, so 1e-6 is an honest tolerance in f64 (and nothing is in f32: gradient cases are f64 only). */
static inline void check_gradient(const char *what, double (*loss)(void *context), void *context, double *parameter, const double *gradient,
                                  int64_t n, double tolerance)
{
    double *numeric = malloc((size_t)(n > 0 ? n : 1) * sizeof *numeric);
    if (!numeric) exit(2);
    for (int64_t i = 0; i < n; i++) {
        double kept = parameter[i], step = 1e-5;
        parameter[i] = kept + step;
        double up = loss(context);
        parameter[i] = kept - step;
        double down = loss(context);
        parameter[i] = kept;
        numeric[i] = (up - down) / (2 * step);
    }
    CHECK_MREL(what, gradient, numeric, n, tolerance);
    free(numeric);
}

/* A test of running out of memory wants NULL, not a sanitizer report. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "allocator_may_return_null=1"; }

/* ---- main ---------------------------------------------------------------------------------------------------------------- */

#define CHECK_RUN(cases) check_run_cases((cases), sizeof(cases) / sizeof *(cases), argc > 1 ? argv[1] : "")

static inline int check_run_cases(const check_case *cases, size_t n_cases, const char *only)
{
    size_t n_run = 0;
    for (size_t i = 0; i < n_cases; i++) {
        if (!strstr(cases[i].name, only)) continue;
        long failed_before = check_n_failed;
        check_case_name = cases[i].name;
        cases[i].run();
        check_release_buffers();
        printf("%s %s\n", check_n_failed == failed_before ? "ok    " : "FAILED", check_case_name);
        fflush(stdout);
        n_run++;
    }
    printf("%zu cases, %ld checks, %ld failed\n", n_run, check_n_checks, check_n_failed);
    return check_n_failed || !check_n_checks;
}

#endif
