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
#include "ops/plan.h"
#include "tensor/real.h"

#define stv_attention_forward STV_TYPED(stv_attention_forward)
#define stv_attention_backward STV_TYPED(stv_attention_backward)

/* out (q rows, n_heads, head_dim), lse (q rows, n_heads) = log sum exp of the scaled scores, saved for backward.
 * q (q rows, n_heads, head_dim); k, v (key rows, n_kv_heads, head_dim). */
void stv_attention_forward(stv_exec *x, real *out, real *lse, const real *q, const real *k, const real *v, const stv_attn_plan *plan,
                           stv_attn_shape shape);

typedef struct stv_attn_saved {
    const real *q, *k, *v, *out, *lse;
} stv_attn_saved;

/* dq overwritten on the plan's query rows; dk, dv (all `n_key_rows` rows) overwritten: sums over every segment that saw the key. */
void stv_attention_backward(stv_exec *x, real *dq, real *dk, real *dv, const real *dout, const stv_attn_saved *saved, const stv_attn_plan *plan,
                            stv_attn_shape shape, int64_t n_key_rows);

#endif
