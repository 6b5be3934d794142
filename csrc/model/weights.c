/* weights.c - besides the pointers: merging adapters, which is the one thing that computes on weights. */
#include "model/weights.h"

#include "model/door.h"

#include <string.h>

stv_weights stv_weights_init(const stv_model *model, const stv_forward_options *options)
{
    return (stv_weights){
        .model = model, .theta = options->theta ? options->theta : model->theta, .adapters = options->adapters, .grads = options->train};
}

stv_stored stv_weight(const stv_weights *weights, int tensor)
{
    const stv_param *p = &weights->model->params[tensor];
    return p->offset >= 0 ? stv_stored_reals(weights->theta + p->offset) : (stv_stored){p->data, p->dtype};
}

real *stv_weight_grad(const stv_weights *weights, int tensor)
{
    const stv_param *p = &weights->model->params[tensor];
    return weights->grads && p->offset >= 0 ? (real *)weights->model->grad + p->offset : NULL;
}

stv_linear stv_weights_affine(const stv_weights *weights, stv_affine affine)
{
    const stv_param *weight = &weights->model->params[affine.weight];
    stv_linear lin = {.weight = stv_weight(weights, affine.weight),
                      .dweight = stv_weight_grad(weights, affine.weight),
                      .n_out = weight->shape[0],
                      .n_in = weight->size / weight->shape[0]};
    if (affine.bias >= 0) {
        lin.bias = stv_weight(weights, affine.bias);
        lin.dbias = stv_weight_grad(weights, affine.bias);
    }
    return lin;
}

stv_linear stv_weights_linear(const stv_weights *weights, int number)
{
    const stv_module *module = &weights->model->modules[number];
    stv_linear lin = stv_weights_affine(weights, (stv_affine){module->weight, module->bias});
    if (!weights->adapters || module->rank == 0) return lin;
    if (module->merged) {
        lin.weight = stv_stored_reals(module->merged);
        return lin;
    }
    lin.lora = (stv_lora){
        .a = stv_weight(weights, module->lora_a),
        .b = stv_weight(weights, module->lora_b),
        .da = stv_weight_grad(weights, module->lora_a),
        .db = stv_weight_grad(weights, module->lora_b),
        .rank = module->rank,
        .scale = (real)module->scale,
        .dropout = (float)module->dropout,
        .module_id = (uint32_t)number,
    };
    if (module->magnitude < 0) return lin;
    lin.lora.magnitude = stv_weight(weights, module->magnitude);
    lin.lora.dmagnitude = stv_weight_grad(weights, module->magnitude);
    if (weights->norms) lin.lora.norm = weights->norms + module->norm;
    return lin;
}

void stv_weights_find_norms(stv_exec *x, const stv_weights *weights, stv_part part, bool all)
{
    for (int i = 0; i < weights->model->n_modules; i++) {
        const stv_module *module = &weights->model->modules[i];
        if (module->part != part || module->magnitude < 0 || !weights->adapters || module->merged || !(module->influences || all)) continue;
        stv_linear lin = stv_weights_linear(weights, i);
        stv_linear_norms(x, weights->norms + module->norm, &lin);
    }
}

stv_norm stv_weights_norm(const stv_weights *weights, stv_affine affine, double eps)
{
    return (stv_norm){.weight = stv_weight(weights, affine.weight),
                      .bias = stv_weight(weights, affine.bias),
                      .dweight = stv_weight_grad(weights, affine.weight),
                      .dbias = stv_weight_grad(weights, affine.bias),
                      .eps = eps};
}

/* ---- merging ------------------------------------------------------------------------------------------------------------- */

static const stv_forward_options as_they_are = {.adapters = true};

/* merged (N,K) = the module's weight with its adapter. */
static stv_status merge(real *merged, const stv_model *model, int module)
{
    stv_weights weights = stv_weights_init(model, &as_they_are);
    stv_linear lin = stv_weights_linear(&weights, module);
    stv_arena arena;
    stv_arena_init_measuring(&arena);
    stv_exec x = {model->context->pool, &arena};
    stv_linear_merge(&x, merged, &lin);
    if (stv_arena_create(&arena, arena.peak) != STV_OK)
        return stv_fail(STV_ERR_MEMORY, "no memory for scratch to merge the adapter of \"%s\"", model->modules[module].name);
    stv_linear_merge(&x, merged, &lin);
    stv_arena_free(&arena);
    return STV_OK;
}

stv_status STV_TYPED(stv_model_merge_lora)(stv_model *model)
{
    STV_TRY(stv_params_check_unmerged(model, "merge_lora"));
    stv_status status = STV_OK;
    for (int i = 0; i < model->n_modules && status == STV_OK; i++) {
        stv_module *module = &model->modules[i];
        if (module->rank == 0 || !module->influences) continue;
        if (!stv_params_module_bound(model, module)) {
            status = stv_fail(STV_ERR_STATE, "merge_lora: \"%s\": its weight or adapter is not bound", module->name);
            break;
        }
        real *merged = stv_alloc((size_t)model->params[module->weight].size * sizeof(real));
        if (!merged) status = stv_fail(STV_ERR_MEMORY, "merge_lora: no memory for the merged weight of \"%s\"", module->name);
        else status = merge(merged, model, i);
        if (status != STV_OK) stv_free(merged);
        else module->merged = merged;
    }
    if (status != STV_OK) {
        stv_params_free_merged(model);
        return status;
    }
    model->merged = true;
    model->layout++;
    return STV_OK;
}

stv_status STV_TYPED(stv_model_effective_weight)(stv_model *model, const char *name, void *fills)
{
    int64_t i = stv_params_find_module(model, name);
    if (i < 0) return stv_fail(STV_ERR_NAME, "no linear module \"%s\" in this model", name);
    const stv_module *module = &model->modules[i];
    if (!stv_params_module_bound(model, module)) return stv_fail(STV_ERR_STATE, "effective_weight: \"%s\": its weight or adapter is not bound", name);
    return merge(fills, model, (int)i);
}
