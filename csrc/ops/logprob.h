/* logprob.h - hidden rows -> log-probabilities of target tokens, without ever holding the full logits.
 *
 * logp[t] = h[row(t)] . W[token(t)] - log sum_v exp(h[row(t)] . W[v]). The vocabulary is walked strip by strip with a running
 * log-sum-exp; backward recomputes each strip's logits and applies
 *     dlogit[row,v] = sum_t dlogp[t] 1[v = token(t)]  -  (sum_t dlogp[t]) softmax(row)[v].
 * Source of the idea: Liger-Kernel's fused linear cross entropy; design.md 3.1 for log-probs out, d-log-probs in. */
#ifndef STV_OPS_LOGPROB_H
#define STV_OPS_LOGPROB_H

#include "base/exec.h"
#include "ops/plan.h"
#include "tensor/real.h"

#define stv_logprob_forward STV_TYPED(stv_logprob_forward)
#define stv_logprob_backward STV_TYPED(stv_logprob_backward)
#define stv_mean_logit STV_TYPED(stv_mean_logit)

/* logp (n_targets), lse (n_rows) in double; h (n_rows,D), w (V,D). */
void stv_logprob_forward(stv_exec *x, double *logp, double *lse, const real *h, stv_stored w, int64_t D, int64_t V, const stv_targets *targets);
typedef struct stv_logprob_grads {
    real *dh; /* (n_rows,D) overwritten */
    real *dw; /* (V,D) added to; NULL when frozen */
} stv_logprob_grads;
void stv_logprob_backward(stv_exec *x, stv_logprob_grads grads, const double *dlogp, const double *lse, const real *h, stv_stored w, int64_t D,
                          int64_t V, const stv_targets *targets);

/* mean_logit[i] = h[i] . mean_row(W): the mean over the vocabulary of row i's logits, for logging. */
void stv_mean_logit(stv_exec *x, double *mean_logit, const real *h, stv_stored w, int64_t n_rows, int64_t D, int64_t V);

#endif
