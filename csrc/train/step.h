/* step.h - the optimiser's doors of stllava.h, declared for both precisions; stllava.c picks one by the model's dtype. */
#ifndef STV_TRAIN_STEP_H
#define STV_TRAIN_STEP_H

#include "model/door.h"

STV_DECLARE(stv_status, stv_adamw_step, stv_model *model, void *m, void *v, const stv_adamw_range *ranges, int64_t n_ranges,
            const stv_adamw_config *config);
STV_DECLARE(stv_status, stv_grad_norm, stv_model *model, const stv_adamw_range *ranges, int64_t n_ranges, double *norm);

#endif
