/* weights.h - how one pass sees the model: tensor numbers become pointers to values and to gradients.
 *
 * The values of trainable tensors come from one flat buffer, the model's own or a snapshot of it (the reference policy); frozen ones as they were bound.
 * Adapters may be off.
 * A gradient pointer is NULL when the tensor is frozen or nobody will ask, and then no operator works for it. */
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

typedef struct stv_weights {
    const stv_model *model;
    const real *theta;
    bool adapters, grads;
} stv_weights;

stv_weights stv_weights_init(const stv_model *model, const stv_forward_options *options);

stv_stored stv_weight(const stv_weights *weights, int tensor);
real *stv_weight_grad(const stv_weights *weights, int tensor);
stv_linear stv_weights_linear(const stv_weights *weights, int number);
stv_linear stv_weights_affine(const stv_weights *weights, stv_affine affine); /* a linear layer that carries no adapter */
stv_norm stv_weights_norm(const stv_weights *weights, stv_affine affine, double eps);

static inline bool stv_linear_trains(const stv_linear *lin) { return lin->dweight || lin->dbias || lin->lora.da || lin->lora.db; }

static inline bool stv_norm_trains(const stv_norm *norm) { return norm->dweight || norm->dbias; }

/* What an adapter keeps for backward, (rows,r). */
static inline real *stv_lora_reals(stv_exec *x, int64_t rows, const stv_linear *lin)
{
    return lin->lora.rank ? stv_reals(x, rows, lin->lora.rank) : NULL;
}

#endif
