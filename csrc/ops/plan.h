/* plan.h - what a planner tells the operators: which keys a run of queries sees, which rows predict which tokens. No element type. */
#ifndef STV_OPS_PLAN_H
#define STV_OPS_PLAN_H

#include <stdbool.h>
#include <stdint.h>

typedef struct stv_span {
    int64_t row, count; /* keys and values of rows [row, row+count) */
} stv_span;

typedef struct stv_attn_segment {
    int64_t q_row, q_count;  /* query (and output) rows */
    int64_t i_span, n_spans; /* its spans in stv_attn_plan.spans; causal: the last q_count keys are the segment's own */
} stv_attn_segment;

typedef struct stv_attn_plan {
    const stv_attn_segment *segments; /* borrowed */
    const stv_span *spans;            /* borrowed */
    const int64_t *group_begin;       /* (n_groups+1) segment ranges; segments of different groups share no key rows */
    int64_t n_segments, n_groups;
    bool causal;
    int64_t window; /* keys with position <= query position - window are not seen; 0: no window */
} stv_attn_plan;

typedef struct stv_attn_shape {
    int64_t n_heads, n_kv_heads, head_dim; /* query head h reads kv head h / (n_heads / n_kv_heads) */
} stv_attn_shape;

/* Targets grouped by hidden row: row i carries targets order[row_begin[i] .. row_begin[i+1]). Borrowed. */
typedef struct stv_targets {
    int64_t n_rows, n_targets;
    const int64_t *row_begin; /* (n_rows+1) */
    const int64_t *order;     /* (n_targets) target numbers, grouped by row */
    const int32_t *token;     /* (n_targets) by target number */
} stv_targets;

#endif
