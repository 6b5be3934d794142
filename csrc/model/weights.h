/* weights.h - how one pass sees the model: tensor numbers become pointers to values and to gradients.
 *
 * The values of trainable tensors come from one flat buffer, the model's own or a snapshot of it (the reference policy); frozen ones as they were bound.
 * Adapters may be off.
 * A gradient pointer is NULL when the tensor is frozen or nobody will ask, and then no operator works for it.
 * The norms of DoRA modules are of the values a pass begins with. Its owner keeps them: recomputed layers, backward and, in generation, all the steps
 * behind a prompt read the same ones, where finding them for one row would cost rank times the step. */
#ifndef STV_MODEL_WEIGHTS_H
#define STV_MODEL_WEIGHTS_H

#include "model/params.h"
#include "ops/layernorm.h"
#include "ops/linear.h"
#include "ops/rows.h"

#define stv_weights_init STV_TYPED(stv_weights_init)
#define stv_weight STV_TYPED(stv_weight)
#define stv_weight_grad STV_TYPED(stv_weight_grad)
#define stv_weights_linear STV_TYPED(stv_weights_linear)
#define stv_weights_affine STV_TYPED(stv_weights_affine)
#define stv_weights_norm STV_TYPED(stv_weights_norm)
#define stv_weights_find_norms STV_TYPED(stv_weights_find_norms)

typedef struct stv_weights {
    const stv_model *model;
    const real *theta;
    bool adapters, grads;
    real *norms; /* (model->n_norms), the pass's owner's */
} stv_weights;

stv_weights stv_weights_init(const stv_model *model, const stv_forward_options *options);

stv_stored stv_weight(const stv_weights *weights, int tensor);
real *stv_weight_grad(const stv_weights *weights, int tensor);
stv_linear stv_weights_linear(const stv_weights *weights, int number);
stv_linear stv_weights_affine(const stv_weights *weights, stv_affine affine); /* a linear layer that carries no adapter */
stv_norm stv_weights_norm(const stv_weights *weights, stv_affine affine, double eps);
/* Fills the norms of a part's DoRA modules, where anything comes of them or `all`. Before the part's first layer. */
void stv_weights_find_norms(stv_exec *x, const stv_weights *weights, stv_part part, bool all);

static inline bool stv_linear_trains(const stv_linear *lin)
{
    return lin->dweight || lin->dbias || lin->lora.da || lin->lora.db || lin->lora.dmagnitude;
}

static inline bool stv_norm_trains(const stv_norm *norm) { return norm->dweight || norm->dbias; }

/* What an adapter keeps for backward. */
static inline real *stv_lora_reals(stv_exec *x, int64_t rows, const stv_linear *lin)
{
    return lin->lora.rank ? stv_reals(x, rows, stv_linear_u_width(lin)) : NULL;
}

#endif
