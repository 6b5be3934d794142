#if defined(__linux__)
#define _GNU_SOURCE /* clock_gettime */
#endif

#include "base/watch.h"

#include <time.h>

static _Thread_local stv_watch *current;
static _Thread_local bool follows; /* current is another thread's */

stv_watch *stv_watch_set(stv_watch *watch)
{
    stv_watch *before = current;
    current = watch;
    return before;
}

stv_watch *stv_watch_get(void) { return current; }

void stv_watch_follow(stv_watch *watch)
{
    current = watch;
    follows = watch != NULL;
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

bool stv_stopped(void)
{
    stv_watch *watch = current;
    if (!watch) return false;
    if (atomic_load_explicit(&watch->stopped, memory_order_relaxed)) return true;
    if (follows) return false;
    int64_t now = now_ns();
    if (watch->next_ns == 0) watch->next_ns = now + watch->interval_ns;
    if (now < watch->next_ns) return false;
    current = NULL;
    bool stop = watch->poll(watch->arg);
    current = watch;
    watch->next_ns = now_ns() + watch->interval_ns;
    atomic_store(&watch->stopped, stop);
    return stop;
}

stv_status stv_check_stopped(const char *what)
{
    return current && current->stopped ? stv_fail(STV_ERR_INTERRUPTED, "%s: stopped by the caller's poll", what) : STV_OK;
}
