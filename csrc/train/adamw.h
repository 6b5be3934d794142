/* adamw.h - one AdamW update over a range of the flat trainable buffer, and the gradient's norm. */
#ifndef STV_TRAIN_ADAMW_H
#define STV_TRAIN_ADAMW_H

#include "base/threads.h"
#include "stllava.h"
#include "tensor/real.h"

#define stv_adamw_update STV_TYPED(stv_adamw_update)
#define stv_sum_of_squares STV_TYPED(stv_sum_of_squares)

/* theta, m and v in place on [range->begin, range->end). torch's order: decay, moments, then
 * theta -= lr/(1-beta1^t) * m / (sqrt(v)/sqrt(1-beta2^t) + eps). */
void stv_adamw_update(stv_pool *pool, real *theta, real *m, real *v, const real *grad, const stv_adamw_range *range, const stv_adamw_config *config);
/* Sum of squares of grad[begin..end), in double, blocks of fixed size added in order: same bits at any thread count. */
double stv_sum_of_squares(const real *grad, int64_t begin, int64_t end);

#endif
