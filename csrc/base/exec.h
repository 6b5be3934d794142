/* exec.h - where an operator runs: its threads and its memory. */
#ifndef STV_BASE_EXEC_H
#define STV_BASE_EXEC_H

#include "base/arena.h"
#include "base/threads.h"

typedef struct stv_exec {
    stv_pool *pool;   /* borrowed */
    stv_arena *arena; /* borrowed */
} stv_exec;

/* True while planning: operators allocate their scratch, touch no data and return. */
static inline bool stv_measuring(const stv_exec *x) { return x->arena->measuring; }

/* A pass: operators in their order, on what context points to. */
typedef void stv_exec_body(stv_exec *x, void *context);

/* Measures the pass, empties the arena, makes it large enough and runs the pass on it. What the pass has not released stays in the arena until that
 * is used again. Errors: memory (arena holds nothing, nothing was written), interrupted (`what` names the pass). */
stv_status stv_exec_run(stv_pool *pool, stv_arena *arena, stv_exec_body *body, void *context, const char *what);

#endif
