#include "train/step.h"

#include "model/params.h"
#include "train/adamw.h"

#include <math.h>

static stv_status check_ranges(const stv_model *model, const char *what, const stv_adamw_range *ranges, int64_t n_ranges)
{
    for (int64_t i = 0; i < n_ranges; i++) {
        if (!isfinite(ranges[i].lr) || !isfinite(ranges[i].weight_decay))
            return stv_fail(STV_ERR_ARGUMENT, "%s: range %lld has lr %g and weight_decay %g, want finite numbers", what, (long long)i, ranges[i].lr,
                            ranges[i].weight_decay);
        if (ranges[i].begin < 0 || ranges[i].end < ranges[i].begin || ranges[i].end > model->n_trainable)
            return stv_fail(STV_ERR_ARGUMENT, "%s: range %lld is [%lld, %lld), want it inside [0, %lld)", what, (long long)i,
                            (long long)ranges[i].begin, (long long)ranges[i].end, (long long)model->n_trainable);
        if (i > 0 && ranges[i].begin < ranges[i - 1].end)
            return stv_fail(STV_ERR_ARGUMENT, "%s: ranges %lld [%lld, %lld) and %lld [%lld, %lld): want them ascending and without overlap", what,
                            (long long)i - 1, (long long)ranges[i - 1].begin, (long long)ranges[i - 1].end, (long long)i, (long long)ranges[i].begin,
                            (long long)ranges[i].end);
    }
    return STV_OK;
}

stv_status STV_TYPED(stv_adamw_step)(stv_model *model, void *m, void *v, const stv_adamw_range *ranges, int64_t n_ranges,
                                     const stv_adamw_config *config)
{
    if (model->n_trainable == 0) return stv_fail(STV_ERR_STATE, "adamw_step: nothing trains");
    STV_TRY(stv_params_check_unmerged(model, "adamw_step"));
    STV_TRY(check_ranges(model, "adamw_step", ranges, n_ranges));
    if (config->step < 1) return stv_fail(STV_ERR_ARGUMENT, "adamw_step: step is %lld, want 1 for the first update", (long long)config->step);
    if (!(config->beta1 >= 0 && config->beta1 < 1 && config->beta2 >= 0 && config->beta2 < 1 && config->eps >= 0))
        return stv_fail(STV_ERR_ARGUMENT, "adamw_step: beta1 %g, beta2 %g, eps %g; want betas in [0,1) and eps >= 0", config->beta1, config->beta2,
                        config->eps);
    if (!isfinite(config->grad_scale)) return stv_fail(STV_ERR_ARGUMENT, "adamw_step: grad_scale is %g, want a finite number", config->grad_scale);
    if (m == v) return stv_fail(STV_ERR_ARGUMENT, "adamw_step: m and v are the same buffer");
    for (int64_t i = 0; i < n_ranges; i++) stv_adamw_update(model->context->pool, model->theta, m, v, model->grad, &ranges[i], config);
    return STV_OK;
}

stv_status STV_TYPED(stv_grad_norm)(stv_model *model, const stv_adamw_range *ranges, int64_t n_ranges, double *norm)
{
    STV_TRY(check_ranges(model, "grad_norm", ranges, n_ranges));
    double sum = 0;
    for (int64_t i = 0; i < n_ranges; i++) sum += stv_sum_of_squares(model->grad, ranges[i].begin, ranges[i].end);
    *norm = sqrt(sum);
    return STV_OK;
}
