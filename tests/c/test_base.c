#include "base/alloc.h"
#include "base/cpu.h"
#include "base/rng.h"
#include "base/watch.h"
#include "check_exec.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- status, alloc, arena ------------------------------------------------------------------------------------------------ */

static stv_status forwards(void)
{
    STV_TRY(stv_fail(STV_ERR_SHAPE, "want %d, found %d", 3, 4));
    return STV_OK;
}

static void status_message(void)
{
    CHECK_INT(forwards(), STV_ERR_SHAPE);
    CHECK_STR(stv_last_error(), "want 3, found 4");
}

static void alloc_counts_and_aligns(void)
{
    uint64_t before = stv_alloc_count();
    char *p = stv_alloc_zero(100), *empty = stv_alloc(0);
    CHECK(p && empty && (uintptr_t)p % STV_ALIGN == 0);
    for (int i = 0; i < 100; i++) CHECK(p[i] == 0);
    stv_free(p);
    stv_free(empty);
    stv_free(NULL);
    CHECK_INT(stv_alloc_count() - before, 2);
    CHECK(stv_alloc(SIZE_MAX) == NULL);
    size_t size;
    CHECK(stv_size_mul(&size, 6, 7) && size == 42);
    CHECK(!stv_size_mul(&size, SIZE_MAX / 2, 3));
    CHECK(!stv_size_add(&size, SIZE_MAX, 1));
}

static void alloc_fails_when_told(void)
{
    uint64_t live = stv_alloc_live();
    for (int forever = 0; forever < 2; forever++) {
        void *p[4];
        stv_alloc_fail_at(3, forever);
        for (int i = 0; i < 4; i++) p[i] = stv_alloc(1);
        CHECK(p[0] && p[1] && !p[2] && (p[3] == NULL) == (forever == 1));
        CHECK_INT(stv_alloc_live() - live, forever ? 2 : 3);
        stv_alloc_fail_at(0, false);
        CHECK(!p[2] && (p[2] = stv_alloc_zero(1)));
        for (int i = 0; i < 4; i++) stv_free(p[i]);
        CHECK_INT(stv_alloc_live(), live);
    }
}

static void arena_measures_what_it_needs(void)
{
    stv_arena measuring, real;
    stv_arena_init_measuring(&measuring);
    stv_arena *arenas[] = {&measuring, &real};
    for (int i = 0; i < 2; i++) {
        if (i == 1 && !CHECK(stv_arena_create(&real, measuring.peak) == STV_OK)) return;
        char *saved = stv_arena_alloc(arenas[i], 10);
        size_t mark = stv_arena_mark(arenas[i]);
        char *scratch = stv_arena_alloc(arenas[i], 1000), *more = stv_arena_alloc(arenas[i], 1);
        CHECK(saved && scratch && more && (uintptr_t)scratch % STV_ALIGN == 0 && more >= scratch + 1000 && scratch >= saved + 10);
        if (i == 1) memset(scratch, 1, 1000);
        stv_arena_release(arenas[i], mark);
        CHECK(stv_arena_alloc(arenas[i], 64) == scratch);
    }
    CHECK_INT(real.used, measuring.used);
    CHECK_INT(real.peak, measuring.peak);
    stv_arena_free(&real);
    stv_arena_free(&real);
}

static void arena_too_large_is_refused(void)
{
    stv_arena arena;
    stv_arena_init_measuring(&arena);
    stv_arena_alloc(&arena, SIZE_MAX / 2);
    stv_arena_alloc(&arena, SIZE_MAX / 2 + 100);
    CHECK(arena.peak > SIZE_MAX - 1000);
    CHECK_INT(stv_arena_create(&arena, arena.peak), STV_ERR_MEMORY);
    CHECK(strstr(stv_last_error(), "arena"));
    stv_arena_free(&arena);
}

/* ---- cpu, rng ------------------------------------------------------------------------------------------------------------ */

static void cpu_level(void)
{
    CHECK(stv_cpu() >= STV_CPU_PORTABLE && stv_cpu() <= STV_CPU_AVX512);
    CHECK_INT(stv_cpu(), stv_cpu());
    CHECK_STR(stv_cpu_level_name(STV_CPU_AVX2), "avx2");
    const char *wish = getenv("STLLAVA_CPU");
    if (wish && strcmp(wish, "portable") == 0) CHECK_INT(stv_cpu(), STV_CPU_PORTABLE);
}

/* Known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10). */
static void philox_known_answers(void)
{
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        stv_philox(out, known[i].counter, known[i].key[0], known[i].key[1]);
        CHECK_SAME_BITS("philox", out, known[i].out, sizeof out);
    }
}

static void uniform_draws(void)
{
    enum { N = 20000 };
    double *u = check_new(N * sizeof *u), mean = 0, square = 0;
    float *narrow = check_new(N * sizeof *narrow);
    stv_rng_fill_uniform_f64(u, N, -3, 5, 11, 2);
    stv_rng_fill_uniform_f32(narrow, N, -3, 5, 11, 2);
    for (int i = 0; i < N; i++) {
        CHECK(u[i] >= -3 && u[i] < 5 && narrow[i] == (float)u[i]);
        mean += u[i] / N;
        square += u[i] * u[i] / N;
    }
    /* Uniform on 8 wide: mean 1, variance 64/12; standard error of the mean 0.016. */
    CHECK(fabs(mean - 1) < 0.08);
    CHECK(fabs(square - mean * mean - 64.0 / 12) < 0.2);
    CHECK(stv_rng_uniform(1, STV_RNG_SAMPLE, 0, 0) == stv_rng_uniform(1, STV_RNG_SAMPLE, 0, 0));
    double first = stv_rng_uniform(1, STV_RNG_SAMPLE, 0, 0);
    CHECK(first != stv_rng_uniform(2, STV_RNG_SAMPLE, 0, 0));
    CHECK(first != stv_rng_uniform(1, STV_RNG_USER, 0, 0));
    CHECK(first != stv_rng_uniform(1, STV_RNG_SAMPLE, (uint64_t)1 << 32, 0));
    CHECK(first != stv_rng_uniform(1, STV_RNG_SAMPLE, 0, (uint64_t)1 << 32));
}

/* ---- threads ------------------------------------------------------------------------------------------------------------- */

enum { N_TASKS = 1000 };

typedef struct tally {
    stv_pool *pool;
    atomic_int done[N_TASKS];
    atomic_int n_bad_worker;
    int n_threads;
    int repeat;
} tally;

static void count_task(void *arg, int64_t i_task, int i_worker)
{
    tally *t = arg;
    atomic_fetch_add(&t->done[i_task], 1);
    if (i_worker < 0 || i_worker >= t->n_threads) atomic_fetch_add(&t->n_bad_worker, 1);
}

static bool each_task_done(tally *t, int64_t n_tasks, int times)
{
    bool ok = atomic_load(&t->n_bad_worker) == 0;
    for (int64_t i = 0; i < N_TASKS; i++) ok &= atomic_load(&t->done[i]) == (i < n_tasks ? times : 0);
    return ok;
}

static void pool_runs_each_task_once(void)
{
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        static const int64_t n_tasks[] = {0, 1, 2, 7, N_TASKS};
        stv_pool *pool;
        if (!CHECK(stv_pool_create(&pool, n_threads) == STV_OK)) return;
        CHECK_INT(stv_pool_n_threads(pool), n_threads);
        for (int i = 0; i < 5; i++) {
            tally t = {.n_threads = n_threads};
            for (int repeat = 0; repeat < 50; repeat++) stv_pool_run(pool, n_tasks[i], count_task, &t);
            CHECK(each_task_done(&t, n_tasks[i], 50));
        }
        stv_pool_free(pool);
    }
    stv_pool_free(NULL);
    CHECK(stv_cpu_count() >= 1);
}

static void pool_resizes(void)
{
    stv_pool *pool;
    if (!CHECK(stv_pool_create(&pool, 0) == STV_OK)) return;
    CHECK_INT(stv_pool_n_threads(pool), stv_cpu_count());
    static const int sizes[] = {3, 1, 4, 2};
    for (int i = 0; i < 4; i++) {
        CHECK(stv_pool_resize(pool, sizes[i]) == STV_OK);
        tally t = {.n_threads = sizes[i]};
        stv_pool_run(pool, N_TASKS, count_task, &t);
        CHECK(each_task_done(&t, N_TASKS, 1));
    }
    stv_pool_free(pool);
}

static void nested_task(void *arg, int64_t i_task, int i_worker)
{
    (void)i_task, (void)i_worker;
    tally *t = arg;
    stv_pool_run(t->pool, N_TASKS, count_task, t);
}

static void *run_often(void *arg)
{
    tally *t = arg;
    for (int i = 0; i < t->repeat; i++) stv_pool_run(t->pool, N_TASKS, count_task, t);
    return NULL;
}

static void pool_busy_runs_inline(void)
{
    stv_pool *pool;
    if (!CHECK(stv_pool_create(&pool, 3) == STV_OK)) return;
    tally nested = {.pool = pool, .n_threads = 3};
    stv_pool_run(pool, 4, nested_task, &nested);
    CHECK(each_task_done(&nested, N_TASKS, 4));

    tally tallies[3];
    pthread_t callers[3];
    for (int i = 0; i < 3; i++) {
        tallies[i] = (tally){.pool = pool, .n_threads = 3, .repeat = 50};
        CHECK(pthread_create(&callers[i], NULL, run_often, &tallies[i]) == 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(callers[i], NULL);
        CHECK(each_task_done(&tallies[i], N_TASKS, 50));
    }
    stv_pool_free(pool);
}

/* Forks while another thread keeps the pool busy: the child finds held locks and no workers. */
static void pool_survives_fork(void)
{
#if defined(__SANITIZE_THREAD__)
    check_skip("ThreadSanitizer allows no new threads after a fork");
    return;
#endif
    stv_pool *pool;
    if (!CHECK(stv_pool_create(&pool, 3) == STV_OK)) return;
    static tally busy;
    busy = (tally){.pool = pool, .n_threads = 3, .repeat = 3000};
    pthread_t caller;
    CHECK(pthread_create(&caller, NULL, run_often, &busy) == 0);
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            tally t = {.pool = pool, .n_threads = 3};
            for (int repeat = 0; repeat < 10; repeat++) stv_pool_run(pool, N_TASKS, count_task, &t);
            bool ok = each_task_done(&t, N_TASKS, 10) && stv_pool_resize(pool, 2) == STV_OK;
            stv_pool_free(pool);
            _exit(ok ? 0 : 1);
        }
        int status = -1;
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        CHECK_INT(status, 0);
    }
    pthread_join(caller, NULL);
    CHECK(each_task_done(&busy, N_TASKS, 3000));
    stv_pool_free(pool);
}

/* Stops at the n-th asking. */
static bool count_down(void *arg) { return --*(int *)arg < 0; }

static void pool_stops_when_its_callers_watch_says_so(void)
{
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        stv_pool *pool;
        if (!CHECK(stv_pool_create(&pool, n_threads) == STV_OK)) return;
        int n_left = 5;
        stv_watch watch = {.poll = count_down, .arg = &n_left};
        CHECK(stv_watch_set(&watch) == NULL);
        CHECK_INT(stv_check_stopped("tally"), STV_OK);
        tally t = {.n_threads = n_threads};
        while (!watch.stopped) stv_pool_run(pool, N_TASKS, count_task, &t); /* each run asks at least once */
        CHECK(n_threads > 1 || each_task_done(&t, 5, 1));
        tally later = {.n_threads = n_threads};
        stv_pool_run(pool, N_TASKS, count_task, &later);
        stv_pool_run(pool, 1, count_task, &later);
        CHECK(each_task_done(&later, 0, 0));
        CHECK_INT(stv_check_stopped("tally"), STV_ERR_INTERRUPTED);
        CHECK(stv_watch_set(NULL) == &watch);
        CHECK_INT(stv_check_stopped("tally"), STV_OK);
        stv_pool_run(pool, N_TASKS, count_task, &later);
        CHECK(each_task_done(&later, N_TASKS, 1));
        stv_pool_free(pool);
    }
}

/* Task 0 is the caller's or a worker's; both learn of the stop inside a task, from a poll that another thread of the run answers. */
static void wait_for_stop(void *arg, int64_t i_task, int i_worker)
{
    (void)arg, (void)i_task, (void)i_worker;
    while (!stv_stopped()) sched_yield();
}

static void long_tasks_learn_of_the_stop(void)
{
    stv_pool *pool;
    if (!CHECK(stv_pool_create(&pool, 3) == STV_OK)) return;
    int n_left = 100;
    stv_watch watch = {.poll = count_down, .arg = &n_left};
    stv_watch_set(&watch);
    stv_pool_run(pool, 3, wait_for_stop, NULL);
    stv_watch_set(NULL);
    CHECK(watch.stopped);
    stv_pool_free(pool);
}

static void pool_run_allocates_nothing(void)
{
    stv_pool *pool;
    if (!CHECK(stv_pool_create(&pool, 2) == STV_OK)) return;
    tally t = {.n_threads = 2};
    uint64_t before = stv_alloc_count();
    stv_pool_run(pool, N_TASKS, count_task, &t);
    CHECK_INT(stv_alloc_count(), before);
    stv_pool_free(pool);
}

static const check_case cases[] = {
    {"status message", status_message},
    {"alloc counts and aligns", alloc_counts_and_aligns},
    {"alloc fails when told", alloc_fails_when_told},
    {"arena measures what it needs", arena_measures_what_it_needs},
    {"arena too large is refused", arena_too_large_is_refused},
    {"cpu level", cpu_level},
    {"philox known answers", philox_known_answers},
    {"uniform draws", uniform_draws},
    {"pool runs each task once", pool_runs_each_task_once},
    {"pool resizes", pool_resizes},
    {"pool busy runs inline", pool_busy_runs_inline},
    {"pool survives fork", pool_survives_fork},
    {"pool stops when its caller's watch says so", pool_stops_when_its_callers_watch_says_so},
    {"long tasks learn of the stop", long_tasks_learn_of_the_stop},
    {"pool run allocates nothing", pool_run_allocates_nothing},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
