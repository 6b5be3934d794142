/* check_exec.h - runs operators the way the core does: once on a measuring arena, then for real on an arena of exactly that size.
 * The second run must end where it began (scratch released) unless the body saves activations on purpose. */
#ifndef STV_TESTS_CHECK_EXEC_H
#define STV_TESTS_CHECK_EXEC_H

#include "base/exec.h"
#include "check.h"

typedef void check_body(stv_exec *x, void *context);

static inline void check_exec(int n_threads, check_body *body, void *context)
{
    stv_pool *pool = NULL;
    stv_arena measuring, arena;
    if (!CHECK(stv_pool_create(&pool, n_threads) == STV_OK)) return;
    stv_arena_init_measuring(&measuring);
    stv_exec x = {pool, &measuring};
    body(&x, context);
    if (CHECK(stv_arena_create(&arena, measuring.peak) == STV_OK)) {
        x.arena = &arena;
        body(&x, context);
        CHECK_INT(arena.peak, measuring.peak);
        CHECK_INT(arena.used, measuring.used);
        stv_arena_free(&arena);
    }
    stv_pool_free(pool);
}

#endif
