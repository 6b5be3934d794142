/* threads.c - one run at a time, tasks handed out by an atomic counter.
 *
 *   caller   open the run, wake, take tasks ............ none left: close the run, wait for those inside, return
 *   worker   asleep -> run open? go inside, take tasks ... none left: leave
 *
 * A worker that wakes after the run was closed goes back to sleep, so a run never waits for a thread that the system has not scheduled.
 * Workers start at the first run that wants them. Before it sleeps, a worker looks for the next run for 15 to 50 microseconds, because a model
 * step is a chain of short runs; not when there are more threads than cores.
 *
 * Fork: a counter of forks (pthread_atfork) tells a pool that it is in a child, where its workers do not exist and its locks may be held by
 * threads that do not exist either. They are then made anew. */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "base/threads.h"

#include "base/alloc.h"
#include "base/watch.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#define N_LOOKS 1000        /* of a worker before it sleeps; a pause takes 40 to 140 cycles */
#define N_LOOKS_CALLER 5000 /* there is work being done for it */
#define WAIT_NS 50000000    /* the caller's, at a time */

typedef struct worker {
    pthread_t thread;
    stv_pool *pool;
    int index;
} worker;

struct stv_pool {
    pthread_mutex_t owner; /* held by the caller whose run this is */
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t wake, left;
    atomic_uint_least64_t n_runs; /* written under the mutex, looked at without */
    atomic_int n_inside;          /* same */
    bool open, stop;

    stv_task *task; /* of the open run */
    void *arg;
    stv_watch *watch; /* the caller's */
    int64_t n_tasks;
    _Atomic int64_t next_task;

    worker *workers; /* (n_threads-1), the first n_started alive */
    atomic_int n_threads;
    int n_started;
    atomic_int fork_count;
};

/* ---- fork ---------------------------------------------------------------------------------------------------------------- */

static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static pthread_mutex_t fork_mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int fork_count;

static void before_fork(void) { pthread_mutex_lock(&fork_mutex); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&fork_mutex); }

static void after_fork_in_child(void)
{
    atomic_fetch_add(&fork_count, 1);
    pthread_mutex_unlock(&fork_mutex);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

static void init_sync(stv_pool *pool)
{
    pthread_mutex_init(&pool->owner, NULL);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->left, NULL);
    pool->open = pool->stop = false;
    pool->n_started = 0;
    atomic_store(&pool->n_inside, 0);
}

static void revive_after_fork(stv_pool *pool)
{
    if (atomic_load(&pool->fork_count) == atomic_load(&fork_count)) return;
    pthread_mutex_lock(&fork_mutex);
    if (atomic_load(&pool->fork_count) != atomic_load(&fork_count)) {
        init_sync(pool);
        atomic_store(&pool->fork_count, atomic_load(&fork_count));
    }
    pthread_mutex_unlock(&fork_mutex);
}

/* ---- workers ------------------------------------------------------------------------------------------------------------- */

/* Now and then the core is offered to others: the thread that is waited for may be queued behind this one. */
static void look_away(int i_look)
{
    if (i_look % 32 == 31) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

static void take_tasks(stv_pool *pool, int i_worker)
{
    for (;;) {
        if (stv_stopped()) atomic_store(&pool->next_task, pool->n_tasks);
        int64_t i_task = atomic_fetch_add(&pool->next_task, 1);
        if (i_task >= pool->n_tasks) return;
        pool->task(pool->arg, i_task, i_worker);
    }
}

static void *work(void *arg)
{
    worker *me = arg;
    stv_pool *pool = me->pool;
    int n_looks = pool->n_threads <= stv_cpu_count() ? N_LOOKS : 0;
    uint64_t n_seen = 0;
    for (;;) {
        for (int i = 0; i < n_looks && atomic_load_explicit(&pool->n_runs, memory_order_relaxed) == n_seen; i++) look_away(i);
        pthread_mutex_lock(&pool->mutex);
        while (!pool->stop && atomic_load(&pool->n_runs) == n_seen) pthread_cond_wait(&pool->wake, &pool->mutex);
        n_seen = atomic_load(&pool->n_runs);
        bool stop = pool->stop, enter = pool->open && !stop;
        if (enter) atomic_fetch_add(&pool->n_inside, 1);
        pthread_mutex_unlock(&pool->mutex);
        if (stop) return NULL;
        if (!enter) continue;
        stv_watch_follow(pool->watch);
        take_tasks(pool, me->index);
        stv_watch_follow(NULL);
        pthread_mutex_lock(&pool->mutex);
        if (atomic_fetch_sub(&pool->n_inside, 1) == 1) pthread_cond_signal(&pool->left);
        pthread_mutex_unlock(&pool->mutex);
    }
}

/* A worker that cannot be started is done without. Signals stay with the threads of the host program. */
static void start_workers(stv_pool *pool)
{
    if (pool->n_started == pool->n_threads - 1) return;
    sigset_t all, kept;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &kept);
    while (pool->n_started < pool->n_threads - 1) {
        worker *w = &pool->workers[pool->n_started];
        *w = (worker){.pool = pool, .index = pool->n_started + 1};
        if (pthread_create(&w->thread, NULL, work, w) != 0) break;
        pool->n_started++;
    }
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
}

static void stop_workers(stv_pool *pool)
{
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    atomic_fetch_add(&pool->n_runs, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_started; i++) pthread_join(pool->workers[i].thread, NULL);
    pool->n_started = 0;
    pool->stop = false;
}

/* ---- pool ---------------------------------------------------------------------------------------------------------------- */

static stv_status alloc_workers(worker **out, int n_threads)
{
    *out = stv_alloc_zero((size_t)n_threads * sizeof **out);
    return *out ? STV_OK : stv_fail(STV_ERR_MEMORY, "threads: no memory for a pool of %d threads", n_threads);
}

stv_status stv_pool_create(stv_pool **out, int n_threads)
{
    *out = NULL;
    if (n_threads <= 0) n_threads = stv_cpu_count();
    worker *workers;
    STV_TRY(alloc_workers(&workers, n_threads));
    stv_pool *pool = stv_alloc_zero(sizeof *pool);
    if (!pool) {
        stv_free(workers);
        return stv_fail(STV_ERR_MEMORY, "threads: no memory for a pool");
    }
    pthread_once(&fork_once, watch_forks);
    pool->workers = workers;
    pool->n_threads = n_threads;
    init_sync(pool);
    atomic_store(&pool->fork_count, atomic_load(&fork_count));
    *out = pool;
    return STV_OK;
}

void stv_pool_free(stv_pool *pool)
{
    if (!pool) return;
    revive_after_fork(pool);
    pthread_mutex_lock(&pool->owner);
    stop_workers(pool);
    pthread_mutex_unlock(&pool->owner);
    pthread_cond_destroy(&pool->left);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->owner);
    stv_free(pool->workers);
    stv_free(pool);
}

int stv_pool_n_threads(const stv_pool *pool) { return atomic_load(&pool->n_threads); }

stv_status stv_pool_resize(stv_pool *pool, int n_threads)
{
    if (n_threads <= 0) n_threads = stv_cpu_count();
    worker *workers;
    STV_TRY(alloc_workers(&workers, n_threads));
    revive_after_fork(pool);
    pthread_mutex_lock(&pool->owner);
    stop_workers(pool);
    stv_free(pool->workers);
    pool->workers = workers;
    pool->n_threads = n_threads;
    pthread_mutex_unlock(&pool->owner);
    return STV_OK;
}

/* For a worker to leave; false: time to look after the caller's watch. */
static bool wait_a_while(stv_pool *pool)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += WAIT_NS;
    if (until.tv_nsec >= 1000000000) until = (struct timespec){until.tv_sec + 1, until.tv_nsec - 1000000000};
    return pthread_cond_timedwait(&pool->left, &pool->mutex, &until) == 0;
}

void stv_pool_run(stv_pool *pool, int64_t n_tasks, stv_task *task, void *arg)
{
    revive_after_fork(pool);
    if (n_tasks <= 1 || pool->n_threads == 1 || pthread_mutex_trylock(&pool->owner) != 0) {
        for (int64_t i = 0; i < n_tasks && !stv_stopped(); i++) task(arg, i, 0);
        return;
    }
    start_workers(pool);

    pthread_mutex_lock(&pool->mutex);
    pool->task = task;
    pool->arg = arg;
    pool->watch = stv_watch_get();
    pool->n_tasks = n_tasks;
    atomic_store(&pool->next_task, 0);
    pool->open = true;
    atomic_fetch_add(&pool->n_runs, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);

    take_tasks(pool, 0);

    for (int i = 0; i < N_LOOKS_CALLER && atomic_load_explicit(&pool->n_inside, memory_order_relaxed) > 0; i++) look_away(i);
    pthread_mutex_lock(&pool->mutex);
    pool->open = false;
    while (atomic_load(&pool->n_inside) > 0) {
        if (wait_a_while(pool)) continue;
        pthread_mutex_unlock(&pool->mutex);
        stv_stopped();
        pthread_mutex_lock(&pool->mutex);
    }
    pthread_mutex_unlock(&pool->mutex);
    pthread_mutex_unlock(&pool->owner);
}

int stv_cpu_count(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}
