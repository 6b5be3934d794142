#include "model/llava.h"

#include "ops/logprob.h"
#include "ops/rows.h"

#include <string.h>

stv_status stv_llava_create(stv_llava_pass **out, const stv_model *model)
{
    const stv_model_config *c = &model->config;
    *out = NULL;
    stv_llava_pass *pass = stv_alloc_zero(sizeof *pass);
    if (!pass) return stv_fail(STV_ERR_MEMORY, "no memory for a pass");
    pass->model = model;
    size_t n_vision = c->has_vision ? (size_t)c->vision.n_layers : 0, n_decoder = c->has_decoder ? (size_t)c->decoder.n_layers : 0;
    pass->vision.layers = stv_alloc_zero(n_vision * sizeof *pass->vision.layers);
    pass->vision.hidden = stv_alloc_zero((n_vision + 1) * sizeof *pass->vision.hidden);
    pass->decoder.layers = stv_alloc_zero(n_decoder * sizeof *pass->decoder.layers);
    pass->norms = stv_alloc_zero((size_t)model->n_norms * sizeof *pass->norms);
    if (!pass->vision.layers || !pass->vision.hidden || !pass->decoder.layers || !pass->norms) {
        stv_llava_free(pass);
        return stv_fail(STV_ERR_MEMORY, "no memory for a pass over %zu layers", n_vision + n_decoder);
    }
    *out = pass;
    return STV_OK;
}

void stv_llava_free(stv_llava_pass *pass)
{
    if (!pass) return;
    stv_image_rows_free(&pass->image_rows);
    stv_free(pass->vision.layers);
    stv_free(pass->vision.hidden);
    stv_free(pass->decoder.layers);
    stv_free(pass->norms);
    stv_free(pass);
}

stv_status stv_llava_init(stv_llava_pass *pass, const stv_batch *batch, const stv_forward_options *options)
{
    const stv_model *model = pass->model;
    int64_t n_images = batch ? batch->view.n_images : options->n_images;
    if (model->config.has_vision) STV_TRY(stv_image_rows_set(&pass->image_rows, &model->config.vision, n_images, batch ? batch->image_sample : NULL));
    pass->batch = batch;
    pass->options = *options;
    pass->options.n_images = n_images;
    pass->weights = stv_weights_init(model, options);
    pass->weights.norms = pass->norms;
    pass->vision_weights = pass->weights;
    pass->vision_weights.grads = options->train && options->vision_grad;
    pass->tower_grad = pass->features_grad = false;
    pass->features = pass->embeddings = NULL;
    pass->stream = NULL;
    pass->logp = pass->lse = pass->mean_logit = NULL;

    const stv_image_rows *rows = &pass->image_rows;
    pass->image_dropout = (stv_dropout){options->seed, options->step, rows->row_sample, rows->row_position};
    pass->vision.weights = &pass->vision_weights;
    pass->vision.rows = rows;
    pass->vision.pixels = options->pixels;
    pass->vision.dropout = options->dropout ? &pass->image_dropout : NULL;
    pass->vision.all_layers = false;
    pass->projector.weights = &pass->weights;
    pass->projector.n_images = n_images;
    pass->projector.n_tokens = stv_config_tokens_per_image(&model->config);
    if (batch) {
        pass->row_dropout = (stv_dropout){options->seed, options->step, batch->view.row_sample, batch->view.row_position};
        pass->decoder.weights = &pass->weights;
        pass->decoder.n_rows = batch->view.n_rows;
        pass->decoder.position = batch->view.row_position;
        pass->decoder.plan = &batch->plan;
        pass->decoder.dropout = options->dropout ? &pass->row_dropout : NULL;
        pass->decoder.cache = NULL;
        pass->decoder.out_row = batch->head_row;
        pass->decoder.n_out = batch->n_head_rows;
    }
    return STV_OK;
}

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

void stv_llava_encode(stv_exec *x, stv_llava_pass *pass)
{
    if (pass->options.features) {
        int64_t n = pass->options.n_images * pass->projector.n_tokens, D = pass->model->config.decoder.hidden_size;
        pass->features = stv_reals(x, n, D);
        stv_copy(x, pass->features, pass->options.features, n * D);
        return;
    }
    pass->projector.in = stv_vision_forward(x, &pass->vision);
    pass->features = stv_projector_forward(x, &pass->projector);
    pass->tower_grad = pass->vision.lowest < stv_config_n_layers_used(&pass->model->config.vision);
    pass->features_grad = pass->tower_grad || stv_projector_trains(&pass->weights);
}

void stv_llava_rows(stv_exec *x, stv_llava_pass *pass)
{
    const stv_batch_view *rows = &pass->batch->view;
    int64_t D = pass->model->config.decoder.hidden_size;
    int table = pass->model->decoder.embed;
    if (pass->options.n_images > 0) stv_llava_encode(x, pass);
    pass->embeddings = stv_reals(x, rows->n_rows, D);
    stv_splice_forward(x, pass->embeddings, stv_weight(&pass->weights, table), pass->features, rows->row_token, rows->row_feature, rows->n_rows, D);
    pass->decoder.input_grad = pass->features_grad || stv_weight_grad(&pass->weights, table);
    stv_weights_find_norms(x, &pass->weights, STV_PART_DECODER, false);
    pass->stream = stv_decoder_forward(x, &pass->decoder, pass->embeddings);
}

static void mean_logit_forward(stv_exec *x, stv_llava_pass *pass)
{
    const stv_decoder_config *c = &pass->model->config.decoder;
    stv_decoder_head labels = {.row = pass->batch->label, .n = pass->batch->view.n_targets};
    pass->mean_logit = stv_arena_alloc(x->arena, (size_t)labels.n * sizeof(double));
    size_t mark = stv_arena_mark(x->arena);
    stv_decoder_head_forward(x, &labels, &pass->weights, pass->stream);
    stv_mean_logit(x, pass->mean_logit, labels.h, stv_weight(&pass->weights, pass->model->decoder.head), labels.n, c->hidden_size, c->vocab_size);
    stv_arena_release(x->arena, mark);
}

void stv_llava_forward(stv_exec *x, stv_llava_pass *pass)
{
    const stv_decoder_config *c = &pass->model->config.decoder;
    const stv_targets *targets = &pass->batch->targets;
    stv_llava_rows(x, pass);
    pass->targets = (stv_decoder_head){.row = pass->batch->predicting, .n = targets->n_rows};
    pass->logp = stv_arena_alloc(x->arena, (size_t)targets->n_targets * sizeof(double));
    pass->lse = stv_arena_alloc(x->arena, (size_t)targets->n_rows * sizeof(double));
    stv_decoder_head_forward(x, &pass->targets, &pass->weights, pass->stream);
    stv_logprob_forward(x, pass->logp, pass->lse, pass->targets.h, stv_weight(&pass->weights, pass->model->decoder.head), c->hidden_size,
                        c->vocab_size, targets);
    if (pass->options.mean_logit) mean_logit_forward(x, pass);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

void stv_llava_backward(stv_exec *x, const stv_llava_pass *pass, const double *dlogp)
{
    const stv_decoder_config *c = &pass->model->config.decoder;
    const stv_batch_view *rows = &pass->batch->view;
    const stv_weights *weights = &pass->weights;
    int64_t R = rows->n_rows, D = c->hidden_size, n_features = pass->options.n_images * pass->projector.n_tokens;
    int table = pass->model->decoder.embed, head = pass->model->decoder.head;
    size_t mark = stv_arena_mark(x->arena);

    real *d = stv_reals(x, R, D), *dstream = stv_reals(x, pass->decoder.n_out, D);
    size_t head_mark = stv_arena_mark(x->arena);
    stv_logprob_grads head_grads = {stv_reals(x, pass->targets.n, D), stv_weight_grad(weights, head)};
    stv_logprob_backward(x, head_grads, dlogp, pass->lse, pass->targets.h, stv_weight(weights, head), D, c->vocab_size, &pass->batch->targets);
    stv_zero(x, dstream, pass->decoder.n_out * D);
    stv_decoder_head_backward(x, dstream, head_grads.dh, &pass->targets, weights);
    stv_arena_release(x->arena, head_mark);

    stv_decoder_backward(x, &pass->decoder, d, dstream);
    if (pass->decoder.input_grad) {
        real *dfeatures = pass->features_grad ? stv_reals(x, n_features, D) : NULL;
        if (dfeatures) stv_zero(x, dfeatures, n_features * D);
        stv_splice_backward(x, stv_weight_grad(weights, table), dfeatures, d, rows->row_token, rows->row_feature, R, D);
        real *dtower = pass->tower_grad ? stv_reals(x, n_features, pass->model->config.projector.in_size) : NULL;
        if (dfeatures) stv_projector_backward(x, dtower, dfeatures, &pass->projector);
        if (dtower) stv_vision_backward(x, &pass->vision, dtower);
    }
    stv_arena_release(x->arena, mark);
}
