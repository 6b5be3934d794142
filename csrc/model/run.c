/* run.c - the doors of stllava.h that compute. Each is the same three steps: check, measure (the same functions on an arena that counts), run. */
#include "model/run.h"

#include "base/watch.h"
#include "model/llava.h"
#include "ops/gemm.h"
#include "ops/rows.h"

#include <math.h>
#include <string.h>

stv_status STV_TYPED(stv_run_create)(stv_run **out, stv_model *model)
{
    *out = NULL;
    stv_run *run = stv_alloc_zero(sizeof *run);
    if (!run) return stv_fail(STV_ERR_MEMORY, "no memory for a run");
    run->model = model;
    model->n_users++;
    stv_status status = stv_llava_create(&run->pass, model);
    if (status == STV_OK) status = stv_llava_create(&run->plan, model);
    if (status == STV_OK) *out = run;
    else STV_TYPED(stv_run_free)(run);
    return status;
}

void STV_TYPED(stv_run_free)(stv_run *run)
{
    run->model->n_users--;
    stv_llava_free(run->pass);
    stv_llava_free(run->plan);
    stv_arena_free(&run->arena);
    stv_arena_free(&run->side);
    stv_free(run);
}

/* ---- the three steps ----------------------------------------------------------------------------------------------------- */

/* What one forward is about; batch NULL: images, or nothing (the projector alone). */
typedef struct job {
    const stv_batch *batch;
    const stv_forward_options *options;
    bool all_layers; /* of the tower */
    const real *projector_in;
    int64_t n_images, n_tokens;
} job;

typedef void pass_body(stv_exec *x, stv_llava_pass *pass);

static stv_status init(stv_run *run, stv_llava_pass *pass, const job *job)
{
    STV_TRY(stv_llava_init(pass, job->batch, job->options));
    pass->vision.n_recompute = run->n_vision_recompute;
    pass->decoder.n_recompute = run->n_decoder_recompute;
    pass->vision.all_layers = job->all_layers;
    if (job->projector_in) {
        pass->projector.n_images = job->n_images;
        pass->projector.n_tokens = job->n_tokens;
        pass->projector.in = job->projector_in;
    }
    return STV_OK;
}

static stv_status measure(size_t *bytes, stv_run *run, const job *job, pass_body *forward, pass_body *backward)
{
    stv_arena arena;
    stv_arena_init_measuring(&arena);
    stv_exec x = {run->model->context->pool, &arena};
    STV_TRY(init(run, run->plan, job));
    forward(&x, run->plan);
    if (job->options->train) backward(&x, run->plan);
    *bytes = arena.peak;
    return STV_OK;
}

static void forget(stv_run *run)
{
    run->holds = STV_RUN_NOTHING;
    run->can_backward = false;
    run->logp = run->mean_logit = run->cluster_margin = NULL;
    run->cluster_assignment = NULL;
    run->features = run->embeddings = run->vision_features = run->vision_pooled = run->projector_output = NULL;
}

static stv_status perform(stv_run *run, const job *job, pass_body *forward, pass_body *backward)
{
    size_t bytes;
    forget(run);
    STV_TRY(measure(&bytes, run, job, forward, backward));
    STV_TRY(stv_arena_reserve(&run->arena, bytes));
    STV_TRY(init(run, run->pass, job));
    stv_exec x = {run->model->context->pool, &run->arena};
    forward(&x, run->pass);
    return stv_check_stopped("forward");
}

static void hold(stv_run *run, stv_run_holds holds, bool can_backward)
{
    run->holds = holds;
    run->can_backward = can_backward;
    run->layout = run->model->layout;
    run->n_threads = stv_pool_n_threads(run->model->context->pool);
}

static stv_status check_holds(const stv_run *run, stv_run_holds holds, const char *what, const char *needs)
{
    if (run->holds != holds) return stv_fail(STV_ERR_STATE, "%s: no %s before it", what, needs);
    if (run->layout != run->model->layout) return stv_fail(STV_ERR_STATE, "%s: what trains or is merged has changed since the forward", what);
    return STV_OK;
}

/* Each forward with train has one backward. */
static stv_status begin_backward(stv_run *run, stv_run_holds holds, const char *what, const char *needs)
{
    STV_TRY(check_holds(run, holds, what, needs));
    if (!run->can_backward) return stv_fail(STV_ERR_STATE, "%s: the forward kept nothing for it (train was false), or it has run already", what);
    if (run->n_threads != stv_pool_n_threads(run->model->context->pool))
        return stv_fail(STV_ERR_STATE, "%s: the number of threads has changed since the forward", what);
    run->can_backward = false;
    return STV_OK;
}

/* ---- a batch ------------------------------------------------------------------------------------------------------------- */

static void batch_backward(stv_exec *x, stv_llava_pass *pass) { stv_llava_backward(x, pass, NULL); }

static stv_status check_finite(const stv_batch_view *view, const double *logp)
{
    for (int64_t q = 0; q < view->n_sequences; q++)
        for (int64_t t = view->sequence_begin[q]; t < view->sequence_begin[q + 1]; t++)
            if (!isfinite(logp[t]))
                return stv_fail(STV_ERR_NUMERIC,
                                "log-probability %g of target %lld (token %d, sequence %lld, row %lld): the model or its input holds NaN or Inf",
                                logp[t], (long long)t, view->target_token[t], (long long)q, (long long)view->target_row[t]);
    return STV_OK;
}

stv_status STV_TYPED(stv_run_forward)(stv_run *run, const stv_batch *batch, const stv_forward_options *options)
{
    STV_TRY(stv_inputs_check(run->model, batch, options));
    job job = {.batch = batch, .options = options};
    STV_TRY(perform(run, &job, stv_llava_forward, batch_backward));
    STV_TRY(check_finite(&batch->view, run->pass->logp));
    hold(run, STV_RUN_BATCH, options->train);
    run->logp = run->pass->logp;
    run->mean_logit = run->pass->mean_logit;
    run->features = run->pass->features;
    run->embeddings = run->pass->embeddings;
    return STV_OK;
}

stv_status STV_TYPED(stv_run_backward)(stv_run *run, const double *dlogp)
{
    STV_TRY(begin_backward(run, STV_RUN_BATCH, "backward", "forward"));
    stv_exec x = {run->model->context->pool, &run->arena};
    stv_llava_backward(&x, run->pass, dlogp);
    return stv_check_stopped("backward");
}

stv_status STV_TYPED(stv_run_estimate)(stv_run *run, const stv_batch *batch, const stv_forward_options *options, size_t *bytes)
{
    STV_TRY(stv_inputs_check(run->model, batch, options));
    job job = {.batch = batch, .options = options};
    return measure(bytes, run, &job, stv_llava_forward, batch_backward);
}

typedef struct logits_call {
    const stv_llava_pass *pass;
    const int64_t *rows;
    int64_t n;
    real *out; /* (n,V) */
} logits_call;

static void logits_forward(stv_exec *x, void *context)
{
    const logits_call *call = context;
    const stv_llava_pass *pass = call->pass;
    const stv_decoder_config *c = &pass->model->config.decoder;
    stv_decoder_head head = {.n = call->n};
    stv_decoder_head_forward(x, &head, &pass->weights, stv_decoder_more_rows(x, &pass->decoder, call->rows, call->n));
    stv_matmul_nt_stored(x, call->out, head.h, stv_weight(&pass->weights, pass->model->decoder.head), call->n, c->vocab_size, c->hidden_size, false);
}

stv_status STV_TYPED(stv_run_logits)(stv_run *run, const int64_t *rows, int64_t n, void *out)
{
    STV_TRY(check_holds(run, STV_RUN_BATCH, "logits", "forward"));
    int64_t n_rows = run->pass->decoder.n_rows;
    for (int64_t i = 0; i < n; i++)
        if (rows[i] < 0 || rows[i] >= n_rows)
            return stv_fail(STV_ERR_ARGUMENT, "logits: rows[%lld] is %lld, want 0..%lld", (long long)i, (long long)rows[i], (long long)n_rows - 1);
    return stv_exec_run(run->model->context->pool, &run->side, logits_forward, &(logits_call){run->pass, rows, n, out}, "logits");
}

/* ---- images alone -------------------------------------------------------------------------------------------------------- */

stv_status STV_TYPED(stv_run_encode)(stv_run *run, const stv_forward_options *options, void *features)
{
    stv_forward_options only_pixels = *options;
    only_pixels.train = false;
    only_pixels.features = NULL;
    STV_TRY(stv_inputs_check_images(run->model, &only_pixels, STV_PART_VISION | STV_PART_PROJECTOR, false));
    job job = {.options = &only_pixels};
    STV_TRY(perform(run, &job, stv_llava_encode, NULL));
    int64_t n = options->n_images * stv_model_tokens_per_image(run->model), D = run->model->config.projector.out_size;
    memcpy(features, run->pass->features, (size_t)(n * D) * sizeof(real));
    return STV_OK;
}

static void vision_forward(stv_exec *x, stv_llava_pass *pass) { pass->features = stv_vision_forward(x, &pass->vision); }

static void vision_backward(stv_exec *x, stv_llava_pass *pass) { stv_vision_backward(x, &pass->vision, NULL); }

stv_status STV_TYPED(stv_run_vision_forward)(stv_run *run, const stv_forward_options *options, bool all_layers)
{
    stv_forward_options with_grad = *options;
    with_grad.vision_grad = true;
    STV_TRY(stv_inputs_check_images(run->model, &with_grad, STV_PART_VISION, all_layers));
    job job = {.options = &with_grad, .all_layers = all_layers};
    STV_TRY(perform(run, &job, vision_forward, vision_backward));
    hold(run, STV_RUN_VISION, options->train);
    run->vision_features = run->pass->features;
    run->vision_pooled = all_layers ? run->pass->vision.pooled : NULL;
    return STV_OK;
}

const void *STV_TYPED(stv_run_vision_hidden)(const stv_run *run, int64_t i)
{
    bool kept = run->holds == STV_RUN_VISION && run->pass->vision.all_layers && i >= 0 && i <= run->model->config.vision.n_layers;
    return kept ? run->pass->vision.hidden[i] : NULL;
}

stv_status STV_TYPED(stv_run_vision_backward)(stv_run *run, const void *dfeatures)
{
    STV_TRY(begin_backward(run, STV_RUN_VISION, "vision_backward", "vision_forward"));
    stv_exec x = {run->model->context->pool, &run->arena};
    stv_vision_backward(&x, &run->pass->vision, dfeatures);
    return stv_check_stopped("vision_backward");
}

/* ---- the projector alone ------------------------------------------------------------------------------------------------- */

/* On a copy of the input, which backward reads when the caller's is gone. */
static void projector_forward(stv_exec *x, stv_llava_pass *pass)
{
    int64_t n = pass->projector.n_images * pass->projector.n_tokens * pass->model->config.projector.in_size;
    real *in = stv_reals(x, n, 1);
    stv_copy(x, in, pass->projector.in, n);
    pass->projector.in = in;
    pass->features = stv_projector_forward(x, &pass->projector);
}

static void projector_backward(stv_exec *x, stv_llava_pass *pass)
{
    real *din = stv_reals(x, 0, 0); /* the caller may want one; measured, nobody writes */
    stv_projector_backward(x, din, NULL, &pass->projector);
}

stv_status STV_TYPED(stv_run_projector_forward)(stv_run *run, const void *in, int64_t n_images, int64_t n_tokens, const stv_forward_options *options)
{
    const stv_model_config *c = &run->model->config;
    if (!c->has_projector) return stv_fail(STV_ERR_ARGUMENT, "projector_forward: the model has no projector");
    if (!in || n_images < 1 || n_images > 1 << 20 || n_tokens < 1 || n_tokens > 1 << 24)
        return stv_fail(STV_ERR_ARGUMENT, "projector_forward: %lld images of %lld tokens", (long long)n_images, (long long)n_tokens);
    STV_TRY(stv_params_check_bound(run->model, STV_PART_PROJECTOR, false, false));
    stv_forward_options alone = {.theta = options->theta, .train = options->train};
    job job = {.options = &alone, .projector_in = in, .n_images = n_images, .n_tokens = n_tokens};
    STV_TRY(perform(run, &job, projector_forward, projector_backward));
    hold(run, STV_RUN_PROJECTOR, options->train);
    run->projector_output = run->pass->features;
    if (c->projector.kind == STV_PROJECTOR_CLUSTER) {
        run->cluster_assignment = run->pass->projector.cluster.assigned;
        run->cluster_margin = run->pass->projector.cluster.margin;
    }
    return STV_OK;
}

stv_status STV_TYPED(stv_run_projector_backward)(stv_run *run, const void *dout, void *din)
{
    STV_TRY(begin_backward(run, STV_RUN_PROJECTOR, "projector_backward", "projector_forward"));
    stv_exec x = {run->model->context->pool, &run->arena};
    stv_projector_backward(&x, din, dout, &run->pass->projector);
    return stv_check_stopped("projector_backward");
}
