/* split.h - private to ops: [0,n) cut into ranges of a fixed size, one task each. The cut depends on the shape alone, and short work is one
 * range, which the caller runs itself. */
#ifndef STV_OPS_SPLIT_H
#define STV_OPS_SPLIT_H

#include "base/exec.h"

typedef void stv_range_body(const void *arg, int64_t begin, int64_t end);

typedef struct stv_range {
    stv_range_body *body;
    const void *arg;
    int64_t n, grain;
} stv_range;

static inline void stv_range_task(void *arg, int64_t i_task, int i_worker)
{
    (void)i_worker;
    const stv_range *range = arg;
    int64_t begin = i_task * range->grain, end = begin + range->grain;
    range->body(range->arg, begin, end < range->n ? end : range->n);
}

static inline void stv_split(stv_exec *x, int64_t n, int64_t grain, stv_range_body *body, const void *arg)
{
    stv_range range = {body, arg, n, grain};
    stv_pool_run(x->pool, (n + grain - 1) / grain, stv_range_task, &range);
}

enum {
    STV_ELEMENT_GRAIN = 1 << 14, /* elements of cheap work worth a task: a few microseconds */
    STV_COLUMN_GRAIN = 64        /* columns of a task that sums over rows: whole cache lines in both precisions */
};

/* Rows of D elements that make one task of cheap work. */
static inline int64_t stv_row_grain(int64_t D) { return D < STV_ELEMENT_GRAIN ? STV_ELEMENT_GRAIN / (D > 0 ? D : 1) : 1; }

#endif
