/* watch.h - how a long computation is stopped from outside.
 *
 * A thread that computes can be watched. Its pool runs then ask `poll` whether to go on: on that thread, between tasks, every interval_ns. After
 * the first true tasks are left out, on workers too, and the door that was called returns STV_ERR_INTERRUPTED: at the latest an interval and
 * the longest task later. Whatever the pass was to write then holds anything, so outside of tasks nothing that a task computes may be an address
 * unchecked. */
#ifndef STV_BASE_WATCH_H
#define STV_BASE_WATCH_H

#include "base/status.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct stv_watch {
    bool (*poll)(void *arg); /* true: stop. May call the core, on objects that are not computing; is not watched itself */
    void *arg;
    int64_t interval_ns; /* 0: ask before every task */
    atomic_bool stopped; /* poll said so */
    int64_t next_ns;     /* when to ask again; 0: not asked yet */
} stv_watch;

/* Watches what the calling thread computes from now on; NULL: nothing. Borrows until the next call. Returns the watch before. */
stv_watch *stv_watch_set(stv_watch *watch);

/* Asks when it is time to; true: leave the rest out. Also for tasks of more than 100 ms. */
bool stv_stopped(void);

/* The last line of a pass: STV_ERR_INTERRUPTED if it was stopped. */
stv_status stv_check_stopped(const char *what);

/* For the pool: this thread's watch, and a worker that follows its caller's without asking itself; NULL: none. */
stv_watch *stv_watch_get(void);
void stv_watch_follow(stv_watch *watch);

#endif
