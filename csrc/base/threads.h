/* threads.h - the core's own worker pool.
 *
 * Work is cut into numbered tasks that write disjoint outputs; no sum is ever split between
 * tasks, so results have the same bits at any thread count. The calling thread works too.
 * A second caller that finds the pool busy runs its tasks alone, in order, with the same result.
 * After fork the child starts with fresh workers on first use. */
#ifndef STV_BASE_THREADS_H
#define STV_BASE_THREADS_H

#include "base/status.h"

#include <stdint.h>

typedef struct stv_pool stv_pool;

/* task(arg, i_task, i_worker): i_worker in [0, n_threads) names per-worker scratch. */
typedef void stv_task(void *arg, int64_t i_task, int i_worker);

/* n_threads <= 0: one per core this process may use. Errors: memory. */
stv_status stv_pool_create(stv_pool **out, int n_threads);
void stv_pool_free(stv_pool *pool); /* takes NULL */
int stv_pool_n_threads(const stv_pool *pool);
/* Errors: memory. Not while a run is in flight on another thread (it waits). */
stv_status stv_pool_resize(stv_pool *pool, int n_threads);

/* Runs task for i_task = 0 .. n_tasks-1 and returns when all are done; those not begun when the caller's watch stops it are left out (watch.h). */
void stv_pool_run(stv_pool *pool, int64_t n_tasks, stv_task *task, void *arg);

int stv_cpu_count(void); /* cores this process may use, >= 1 */

#endif
