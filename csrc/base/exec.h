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

#endif
