#include "train/adamw.h"

#include <math.h>

enum { BLOCK = 1 << 14 }; /* elements a task updates */

typedef struct update {
    real *theta, *m, *v;
    const real *grad;
    int64_t begin, end;
    real keep, beta1, beta2, scale, rate, root, eps; /* keep = 1 - lr wd, rate = lr/(1-beta1^t), root = 1/sqrt(1-beta2^t) */
    real new1, new2;                                 /* 1 - beta, subtracted in double: in f32 1 - 0.999 is 5e-5 off */
} update;

static void update_block(void *arg, int64_t i_block, int i_worker)
{
    (void)i_worker;
    const update *u = arg;
    int64_t begin = u->begin + i_block * BLOCK, end = begin + BLOCK < u->end ? begin + BLOCK : u->end;
    real *theta = u->theta, *m = u->m, *v = u->v;
    const real *grad = u->grad;
    for (int64_t i = begin; i < end; i++) {
        real g = u->scale * grad[i];
        m[i] = u->beta1 * m[i] + u->new1 * g;
        v[i] = u->beta2 * v[i] + u->new2 * g * g;
        real denominator = (real)sqrt((double)v[i]) * u->root + u->eps;
        theta[i] = u->keep * theta[i] - u->rate * m[i] / denominator;
    }
}

void stv_adamw_update(stv_pool *pool, real *theta, real *m, real *v, const real *grad, const stv_adamw_range *range, const stv_adamw_config *c)
{
    double t = (double)c->step;
    update u = {
        .theta = theta,
        .m = m,
        .v = v,
        .grad = grad,
        .begin = range->begin,
        .end = range->end,
        .keep = (real)(1 - range->lr * range->weight_decay),
        .beta1 = (real)c->beta1,
        .beta2 = (real)c->beta2,
        .scale = (real)c->grad_scale,
        .rate = (real)(range->lr / (1 - pow(c->beta1, t))),
        .root = (real)(1 / sqrt(1 - pow(c->beta2, t))),
        .eps = (real)c->eps,
        .new1 = (real)(1 - c->beta1),
        .new2 = (real)(1 - c->beta2),
    };
    int64_t n = range->end - range->begin;
    stv_pool_run(pool, (n + BLOCK - 1) / BLOCK, update_block, &u);
}

double stv_sum_of_squares(const real *grad, int64_t begin, int64_t end)
{
    double total = 0;
    for (int64_t block = begin; block < end; block += BLOCK) {
        int64_t stop = block + BLOCK < end ? block + BLOCK : end;
        double lane[8] = {0};
        int64_t i = block;
        for (; i + 8 <= stop; i += 8)
            for (int j = 0; j < 8; j++) lane[j] += (double)grad[i + j] * (double)grad[i + j];
        for (; i < stop; i++) lane[0] += (double)grad[i] * (double)grad[i];
        total += ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    return total;
}
