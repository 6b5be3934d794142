/* sampler.h - logits -> one token. Source of the order of filters: transformers 4.31's logits warpers (spec 1.4). */
#ifndef STV_INFER_SAMPLER_H
#define STV_INFER_SAMPLER_H

#include "stllava.h"

/* The filters on caller's memory: order (V) is scratch, probabilities (V) is filled. Temperature 0 puts all mass on the first largest logit. */
void stv_sampling_filter(double *probabilities, int32_t *order, const double *logits, int64_t V, const stv_sampling *sampling);
/* The token at which the cumulative probability first exceeds u in [0,1). */
int32_t stv_sample_token(const double *probabilities, int64_t V, double u);
/* Errors: argument, naming the setting. */
stv_status stv_sampling_check(const stv_sampling *sampling);

#endif
