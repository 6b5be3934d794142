/* attention.h - softmax(q k^T / sqrt(head_dim)) v over spans of keys.
 *
 * The operator knows nothing of trees, images or caches: a *segment* is a run of query rows, and says from which row ranges of
 * the key/value buffers its keys come, in order. Laid one after another those keys have the indices 0..n_keys-1, which are also
 * their positions; the segment's queries are the last q_count of them when it is causal. One operator therefore serves training
 * (keys = the packed batch), prefill, decoding (keys = the cache) and the vision tower (not causal).
 *
 * A row's result depends only on its own query and its keys in order, with fixed-order sums: same bits in any batch, with or
 * without a shared prefix, with or without a cache. Backward threads split (group, kv head); groups share no key. */
#ifndef STV_OPS_ATTENTION_H
#define STV_OPS_ATTENTION_H

#include "base/exec.h"
#include "tensor/real.h"

#include <stdbool.h>

#define stv_attention_forward STV_TYPED(stv_attention_forward)
#define stv_attention_backward STV_TYPED(stv_attention_backward)

typedef struct stv_span {
    int64_t row, count; /* keys and values of rows [row, row+count) */
} stv_span;

typedef struct stv_attn_segment {
    int64_t q_row, q_count;   /* query (and output) rows */
    int64_t i_span, n_spans;  /* its spans in stv_attn_plan.spans; causal: the last q_count keys are the segment's own */
} stv_attn_segment;

typedef struct stv_attn_plan {
    const stv_attn_segment *segments; /* borrowed */
    const stv_span *spans;            /* borrowed */
    const int64_t *group_begin;       /* (n_groups+1) segment ranges; segments of different groups share no key rows */
    int64_t n_segments, n_groups;
    bool causal;
    int64_t window;                   /* keys with position <= query position - window are not seen; 0: no window */
} stv_attn_plan;

typedef struct stv_attn_shape {
    int64_t n_heads, n_kv_heads, head_dim; /* query head h reads kv head h / (n_heads / n_kv_heads) */
} stv_attn_shape;

/* out (q rows, n_heads, head_dim), lse (q rows, n_heads) = log sum exp of the scaled scores, saved for backward.
 * q (q rows, n_heads, head_dim); k, v (key rows, n_kv_heads, head_dim). */
void stv_attention_forward(stv_exec *x, real *out, real *lse, const real *q, const real *k, const real *v, const stv_attn_plan *plan,
                           stv_attn_shape shape);

typedef struct stv_attn_saved {
    const real *q, *k, *v, *out, *lse;
} stv_attn_saved;

/* dq overwritten on the plan's query rows; dk, dv (all `n_key_rows` rows) overwritten: sums over every segment that saw the key. */
void stv_attention_backward(stv_exec *x, real *dq, real *dk, real *dv, const real *dout, const stv_attn_saved *saved,
                            const stv_attn_plan *plan, stv_attn_shape shape, int64_t n_key_rows);

#endif
