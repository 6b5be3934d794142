/* Every allocation of every operation fails once, and fails with all after it. Then: the status is STV_ERR_MEMORY with a message, what a failed
 * call must not touch is as it was, the same call repeated gives the bits of a call that never failed, and nothing is lost (LeakSanitizer and the
 * count of live blocks).
 *
 * An operation is opened in a world of its own, called with the n-th allocation failing, and called again; n grows until the first call succeeds. */
#include "base/alloc.h"
#include "check_model.h"

enum { N_STEPS = 3, N_PAIRS = 2, PICTURE = 5 };

typedef struct world {
    tiny t; /* of the operations that need a model; a zeroed one can be closed */
    stv_context *context;
    stv_model *model;
    stv_batch *batch;
    stv_run *run;
    stv_generator *generator;
    void *out; /* what the call fills */
    size_t out_bytes;
    double *m, *v;
    int n_steps; /* done */
} world;

typedef struct operation {
    const char *name;
    void (*open)(world *w);
    stv_status (*call)(world *w);
    uint64_t (*result)(world *w); /* NULL: the bytes of `out` */
    bool changes_nothing;         /* when it fails: not one block, and a forward before it still has its backward */
} operation;

/* FNV-1a; begins with 0. */
static uint64_t mix(uint64_t digest, const void *data, size_t size_bytes)
{
    for (size_t i = 0; i < size_bytes; i++) digest = ((digest ^ ((const uint8_t *)data)[i]) + 1) * 0x100000001B3u;
    return digest;
}

static uint64_t digest_of_reals(const void *reals, int64_t n) { return mix(0, reals, (size_t)n * sizeof(real)); }

static void close_world(world *w)
{
    stv_generator_free(w->generator);
    stv_run_free(w->run);
    stv_batch_free(w->batch);
    stv_model_free(w->model);
    stv_context_free(w->context);
    tiny_close(&w->t);
    check_release_buffers();
}

static void want_out(world *w, size_t size_bytes)
{
    w->out = check_new(size_bytes);
    w->out_bytes = size_bytes;
}

/* ---- worlds --------------------------------------------------------------------------------------------------------------- */

static void open_nothing(world *w) { (void)w; }

static void open_context(world *w) { CHECK_OK(stv_context_create(&w->context, 1)); }

static void open_bare_model(world *w)
{
    stv_model_config config = tiny_config();
    open_context(w);
    CHECK_OK(stv_model_create(&w->model, w->context, &config, STV_REAL_DTYPE));
}

static void open_tiny(world *w)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    w->t = tiny_open(&config, &spec, 1, 0.1);
    w->t.options.dropout = w->t.options.mean_logit = true;
    want_out(w, (size_t)(w->t.n_targets + 4 * TINY_VOCAB * TINY_D) * sizeof(double));
}

static void open_after_forward(world *w)
{
    open_tiny(w);
    tiny_forward(&w->t);
}

static void open_after_small_forward(world *w)
{
    open_tiny(w);
    stv_batch_spec spec = {
        .n_segments = 1, .parent = (int32_t[]){-1}, .begin = (int64_t[]){0, 2}, .ids = (int32_t[]){1, 2}, .labels = (int32_t[]){N, 2}};
    stv_forward_options options = {.adapters = true};
    CHECK_OK(stv_batch_create(&w->batch, w->t.model, &spec));
    CHECK_OK(stv_run_forward(w->t.run, w->batch, &options));
}

static void open_training(world *w)
{
    open_tiny(w);
    w->m = check_new((size_t)stv_model_n_trainable(w->t.model) * sizeof(real));
    w->v = check_new((size_t)stv_model_n_trainable(w->t.model) * sizeof(real));
    memset(w->m, 0, (size_t)stv_model_n_trainable(w->t.model) * sizeof(real));
    memset(w->v, 0, (size_t)stv_model_n_trainable(w->t.model) * sizeof(real));
}

static stv_status create_generator(world *w)
{
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = N_STEPS};
    stv_forward_options forward = w->t.options;
    forward.theta = stv_model_theta(w->t.model);
    return stv_generator_create(&w->generator, w->t.model, w->t.batch, &forward, &options);
}

/* A talk of two rows, with one token drawn. */
static stv_status two_rows(world *w, int64_t n_keep)
{
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 2, .max_new_tokens = N_STEPS};
    stv_forward_options none = {.adapters = true};
    if (!w->batch) {
        stv_batch_spec spec = {.n_segments = 1, .parent = (int32_t[]){-1}, .begin = (int64_t[]){0, 2}, .ids = (int32_t[]){1, 2}};
        CHECK_OK(stv_batch_create(&w->batch, w->t.model, &spec));
    }
    return w->generator ? stv_generator_extend(w->generator, n_keep, w->batch, &none, &options)
                        : stv_generator_create(&w->generator, w->t.model, w->batch, &none, &options);
}

static void open_talk(world *w)
{
    int32_t token;
    open_tiny(w);
    memset(w->out, 0, w->out_bytes);
    CHECK_OK(two_rows(w, 0));
    CHECK_OK(stv_generator_step(w->generator, &token, NULL));
}

static stv_status extend_talk(world *w) { return two_rows(w, 2); }

/* Scratch is per thread: with more threads than at its creation, every step allocates. */
static void open_generator_for_more_threads(world *w)
{
    open_tiny(w);
    CHECK_OK(create_generator(w));
    CHECK_OK(stv_context_set_n_threads(w->t.context, 16));
}

/* ---- calls and their results ---------------------------------------------------------------------------------------------- */

static stv_status create_context(world *w) { return stv_context_create(&w->context, 3); }

static uint64_t number_of_threads(world *w) { return (uint64_t)stv_context_n_threads(w->context ? w->context : w->t.context); }

static stv_status resize_pool(world *w) { return stv_context_set_n_threads(w->t.context, 5); }

static stv_status create_model(world *w)
{
    stv_model_config config = tiny_config();
    return stv_model_create(&w->model, w->context, &config, STV_REAL_DTYPE);
}

/* Names, places and values of all tensors. */
static uint64_t table(world *w)
{
    const stv_model *model = w->model ? w->model : w->t.model;
    uint64_t digest = 0;
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        stv_tensor_info info = stv_model_tensor(model, i);
        digest = mix(digest, info.name, strlen(info.name));
        digest = mix(digest, &info.offset, sizeof info.offset);
        if (info.data) digest = mix(digest, info.data, (size_t)info.size * sizeof(real));
    }
    return digest;
}

/* Called again, it goes on with the module that failed: each has all of its tensors or none. */
static stv_status add_every_adapter(world *w)
{
    for (int64_t i = 0; i < stv_model_n_linear(w->model); i++) {
        char name[256];
        snprintf(name, sizeof name, "%s.lora_A.weight", stv_model_linear_name(w->model, i));
        if (stv_model_find(w->model, name) < 0) STV_TRY(stv_model_add_lora(w->model, stv_model_linear_name(w->model, i), 2, 1, 0, i % 2));
    }
    return STV_OK;
}

/* From all to some: what stops needs memory of its own. */
static stv_status train_some(world *w)
{
    return stv_model_set_trainable(w->t.model, (const char *[]){"model.norm.weight", "model.embed_tokens.weight", "model.mm_projector.c.weight"}, 3);
}

static stv_status train_none(world *w) { return stv_model_set_trainable(w->t.model, NULL, 0); }

static stv_status merge(world *w) { return stv_model_merge_lora(w->t.model); }

static stv_status effective_weight(world *w) { return stv_model_effective_weight(w->t.model, "model.layers.1.mlp.up_proj", w->out); }

static uint64_t effective_weights(world *w)
{
    CHECK_OK(effective_weight(w));
    return mix(0, w->out, w->out_bytes);
}

static stv_status create_batch(world *w)
{
    stv_batch_spec spec = flat_spec();
    return stv_batch_create(&w->batch, w->t.model, &spec);
}

static uint64_t batch_rows(world *w)
{
    stv_batch_view view = stv_batch_get(w->batch);
    return mix(mix(0, view.row_token, (size_t)view.n_rows * sizeof(int32_t)), view.target_row, (size_t)view.n_targets * sizeof(int64_t));
}

static stv_status create_run(world *w) { return stv_run_create(&w->run, w->t.model); }

static uint64_t logp_of(stv_run *run, world *w)
{
    CHECK_OK(stv_run_forward(run, w->t.batch, &w->t.options));
    return mix(0, stv_run_logp(run), (size_t)w->t.n_targets * sizeof(double));
}

static uint64_t new_run_logp(world *w) { return logp_of(w->run, w); }

static stv_status forward(world *w) { return stv_run_forward(w->t.run, w->t.batch, &w->t.options); }

static uint64_t gradient(world *w)
{
    CHECK_OK(stv_model_zero_grad(w->t.model));
    CHECK_OK(stv_run_backward(w->t.run, w->t.weight));
    return digest_of_reals(stv_model_grad(w->t.model), stv_model_n_trainable(w->t.model));
}

static stv_status logits(world *w) { return stv_run_logits(w->t.run, (int64_t[]){3, 0, 5}, 3, w->out); }

static stv_status estimate(world *w) { return stv_run_estimate(w->t.run, w->t.batch, &w->t.options, w->out); }

static stv_status encode(world *w) { return stv_run_encode(w->t.run, &w->t.options, w->out); }

static stv_status vision(world *w) { return stv_run_vision_forward(w->t.run, &w->t.options, true); }

static uint64_t vision_gradient(world *w)
{
    real *dfeatures = check_random_reals(2 * TINY_T * TINY_E, 8);
    CHECK_OK(stv_run_vision_backward(w->t.run, dfeatures));
    return digest_of_reals(stv_model_grad(w->t.model), stv_model_n_trainable(w->t.model));
}

static stv_status projector(world *w) { return stv_run_projector_forward(w->t.run, check_random_reals(3 * 7 * TINY_E, 9), 3, 7, &w->t.options); }

static uint64_t projector_gradient(world *w)
{
    real *dout = check_random_reals(3 * 7 * TINY_D, 10), *din = check_reals(3 * 7 * TINY_E);
    CHECK_OK(stv_run_projector_backward(w->t.run, dout, din));
    return digest_of_reals(din, 3 * 7 * TINY_E);
}

static stv_status update(world *w)
{
    stv_adamw_range all = {0, stv_model_n_trainable(w->t.model), 1e-2, 1e-2};
    stv_adamw_config config = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .step = 1, .grad_scale = 1};
    double norm;
    STV_TRY(stv_run_backward(w->t.run, w->t.weight));
    STV_TRY(stv_grad_norm(w->t.model, &all, 1, &norm));
    return stv_adamw_step(w->t.model, w->m, w->v, &all, 1, &config);
}

static stv_status sft_step(world *w)
{
    STV_TRY(forward(w));
    return update(w);
}

static stv_status loss_of_pairs(world *w, const double *policy, const double *reference)
{
    stv_preference_config config = {
        .n_losses = 2, .types = (stv_loss_type[]){STV_LOSS_SIGMOID, STV_LOSS_AOT}, .weights = (double[]){1, 0.5}, .beta = 0.1, .discopop_tau = 0.05};
    stv_preference_input input = {N_PAIRS, policy, policy + N_PAIRS, reference, reference + N_PAIRS, (double[]){3, 4}, (double[]){2, 5}};
    double *out = w->out;
    return stv_preference_loss(out, out + 1, w->t.weight, w->t.weight + N_PAIRS, &config, &input);
}

static stv_status preference_loss(world *w) { return loss_of_pairs(w, (double[]){-1, -2, -3, -4}, (double[]){-2, -2, -3, -3}); }

/* The reference is the model without its adapters, on the same run. */
static stv_status dpo_step(world *w)
{
    double reference[2 * N_PAIRS];
    stv_forward_options options = w->t.options;
    options.adapters = options.train = options.dropout = false;
    STV_TRY(stv_run_forward(w->t.run, w->t.batch, &options));
    memcpy(reference, stv_run_logp(w->t.run), sizeof reference);
    STV_TRY(forward(w));
    STV_TRY(loss_of_pairs(w, stv_run_logp(w->t.run), reference));
    return update(w);
}

static uint64_t theta(world *w) { return digest_of_reals(stv_model_theta(w->t.model), stv_model_n_trainable(w->t.model)); }

/* Called again, it goes on with the step that failed. */
static stv_status generate(world *w)
{
    for (; stv_generator_n_active(w->generator) > 0; w->n_steps++)
        STV_TRY(stv_generator_step(w->generator, (int32_t *)w->out + w->n_steps * stv_generator_n(w->generator), NULL));
    return STV_OK;
}

static uint64_t generated(world *w)
{
    CHECK_OK(generate(w));
    CHECK_INT(w->n_steps, N_STEPS);
    return mix(0, w->out, w->out_bytes);
}

static stv_status sampling(world *w)
{
    return stv_sampling_probabilities(w->out, (double[]){1, 3, 2, 0}, 4, &(stv_sampling){.temperature = 1, .top_k = 3, .top_p = 0.9});
}

static const uint8_t picture[PICTURE * 3 * 3] = {1, 200, 30, 4, 90, 60, 7, 8, 255};
static const stv_image_options square = {.size_px = 4, .pad = true, .std = {1, 1, 1}};

static stv_status resize_crop(world *w) { return stv_image_resize_crop(w->out, picture, PICTURE, 3, &square); }

static stv_status preprocess(world *w) { return stv_image_preprocess(w->out, picture, PICTURE, 3, &square); }

static void open_out(world *w) { want_out(w, 4 * 4 * 3 * sizeof(float)); }

/* ---- the test ------------------------------------------------------------------------------------------------------------- */

static const operation operations[] = {
    {"context", open_nothing, create_context, number_of_threads, true},
    {"model", open_context, create_model, table, true},
    {"add_lora", open_bare_model, add_every_adapter, table, false},
    {"set_trainable", open_after_forward, train_some, table, true},
    {"set_trainable to none", open_after_forward, train_none, table, true},
    {"merge_lora", open_after_forward, merge, effective_weights, true},
    {"effective_weight", open_after_forward, effective_weight, NULL, true},
    {"set_n_threads", open_after_forward, resize_pool, number_of_threads, true},
    {"batch", open_after_forward, create_batch, batch_rows, true},
    {"run", open_after_forward, create_run, new_run_logp, true},
    {"forward", open_tiny, forward, gradient, false},
    {"forward that needs more", open_after_small_forward, forward, gradient, false},
    {"logits", open_after_forward, logits, NULL, true},
    {"estimate", open_after_small_forward, estimate, NULL, false},
    {"encode", open_tiny, encode, NULL, false},
    {"vision_forward", open_tiny, vision, vision_gradient, false},
    {"projector_forward", open_after_small_forward, projector, projector_gradient, false},
    {"SFT step", open_training, sft_step, theta, false},
    {"DPO step", open_training, dpo_step, theta, false},
    {"preference loss", open_tiny, preference_loss, NULL, false},
    {"generator", open_after_forward, create_generator, generated, true},
    {"generator extend", open_talk, extend_talk, generated, false},
    {"generator step", open_generator_for_more_threads, generate, generated, false},
    {"sampling", open_out, sampling, NULL, true},
    {"image_resize_crop", open_out, resize_crop, NULL, true},
    {"image_preprocess", open_out, preprocess, NULL, true},
};

static uint64_t result_of(const operation *op, world *w) { return op->result ? op->result(w) : mix(0, w->out, w->out_bytes); }

static uint64_t without_failure(const operation *op)
{
    world w = {0};
    op->open(&w);
    CHECK_OK(op->call(&w));
    uint64_t result = result_of(op, &w);
    close_world(&w);
    return result;
}

static uint64_t gradient_without_it(const operation *op)
{
    world w = {0};
    op->open(&w);
    uint64_t result = gradient(&w);
    close_world(&w);
    return result;
}

/* False when the n-th allocation is beyond the last. */
static bool fail_at(const operation *op, uint64_t n, bool forever, uint64_t want, uint64_t want_gradient)
{
    world w = {0};
    op->open(&w);
    uint64_t live = stv_alloc_live();
    stv_alloc_fail_at(n, forever);
    stv_status status = op->call(&w);
    stv_alloc_fail_at(0, false);
    if (status != STV_OK) {
        CHECK_ERROR(status, STV_ERR_MEMORY, "no memory for ");
        if (op->changes_nothing) CHECK_INT(stv_alloc_live(), live);
        if (want_gradient) CHECK(gradient(&w) == want_gradient);
        CHECK_OK(op->call(&w));
    }
    CHECK(result_of(op, &w) == want);
    close_world(&w);
    return status != STV_OK;
}

static void every_allocation_may_fail(void)
{
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
        const operation *op = &operations[i];
        check_case_name = op->name;
        uint64_t live = stv_alloc_live(), want = without_failure(op);
        uint64_t want_gradient = op->open == open_after_forward ? gradient_without_it(op) : 0;
        for (int forever = 0; forever < 2; forever++) {
            uint64_t n = 1;
            while (fail_at(op, n, forever, want, want_gradient)) n++;
            CHECK(n > 1);
        }
        CHECK_INT(stv_alloc_live(), live);
    }
}

static const check_case cases[] = {{"every allocation may fail", every_allocation_may_fail}};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
