/* The whole model: gradients of every tensor against central differences, and everything that must not change a number. */
#include "check_model.h"
#include "model/llava.h"
#include "model/run.h"

#if STV_REAL_BITS == 32
#define SAME 1e-5 /* another order of f32 sums over a few layers */
#else
#define SAME 1e-12
#endif

enum { MAX_PROBES = 10 }; /* elements of a tensor that central differences look at */

/* ---- gradients ----------------------------------------------------------------------------------------------------------- */

#if STV_REAL_BITS == 64

static void check_tensor_gradient(tiny *t, const stv_tensor_info *info, const real *gradient)
{
    double probed[MAX_PROBES], numeric[MAX_PROBES];
    int64_t n = info->size < MAX_PROBES ? info->size : MAX_PROBES;
    real *value = info->data;
    bool train = t->options.train;
    t->options.train = false;
    for (int64_t p = 0; p < n; p++) {
        int64_t i = p * info->size / n + (info->size > n ? p % (info->size / n) : 0);
        double kept = value[i], step = 1e-5;
        value[i] = kept + step;
        double up = tiny_loss(t);
        value[i] = kept - step;
        double down = tiny_loss(t);
        value[i] = kept;
        probed[p] = gradient[info->offset + i];
        numeric[p] = (up - down) / (2 * step);
    }
    t->options.train = train;
    if (strstr(info->name, "k_proj.bias")) /* softmax does not see it: mathematically zero, so compared absolutely */
        for (int64_t p = 0; p < n; p++) CHECK(fabs(probed[p]) < 1e-13 && fabs(numeric[p]) < 1e-8);
    else if (!info->influences)
        for (int64_t p = 0; p < n; p++) CHECK(probed[p] == 0 && numeric[p] == 0);
    else CHECK_MREL(info->name, probed, numeric, n, 1e-6);
}

/* Differences see a DoRA module's norms move with its weight, A and B; backward takes them for constants (tests/c/test_linear.c keeps them so). */
static bool moves_norms(const stv_model *model, int64_t tensor)
{
    for (int i = 0; i < model->n_modules; i++) {
        const stv_module *m = &model->modules[i];
        if (m->magnitude >= 0 && (tensor == m->weight || tensor == m->lora_a || tensor == m->lora_b)) return true;
    }
    return false;
}

static void check_all_gradients(tiny *t)
{
    real *gradient = tiny_gradient(t);
    for (int64_t i = 0; i < stv_model_n_tensors(t->model); i++) {
        stv_tensor_info info = stv_model_tensor(t->model, i);
        if (info.offset >= 0 && !moves_norms(t->model, i)) check_tensor_gradient(t, &info, gradient);
    }
}

static void gradients_of_every_tensor(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    check_all_gradients(&t);
    tiny_close(&t);
}

static void gradients_with_dropout(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0.3);
    t.options.dropout = true;
    t.options.seed = 3;
    check_all_gradients(&t);
    tiny_close(&t);
}

static void gradients_of_other_projectors(void)
{
    stv_batch_spec spec = tree_spec();
    stv_model_config config = tiny_config();
    config.decoder.tie_word_embeddings = false;
    config.decoder.sliding_window = 0;
    config.vision.select_class = true;
    config.vision.activation = 0;
    for (int depth = 0; depth <= 3; depth += 3) {
        config.projector.kind = depth ? STV_PROJECTOR_MLP : STV_PROJECTOR_LINEAR;
        config.projector.depth = depth;
        tiny t = tiny_open(&config, &spec, 1, 0);
        check_all_gradients(&t);
        tiny_close(&t);
    }
    config.projector = (stv_projector_config){.kind = STV_PROJECTOR_IDENTITY, .in_size = TINY_E, .out_size = TINY_E};
    config.decoder.hidden_size = TINY_E;
    tiny t = tiny_open(&config, &spec, 1, 0);
    check_all_gradients(&t);
    tiny_close(&t);
}

#endif

/* ---- what must not change a number --------------------------------------------------------------------------------------- */

static void check_shared(double dropout)
{
    stv_model_config config = tiny_config();
    stv_batch_spec shared_spec = tree_spec(), flat = flat_spec();
    tiny a = tiny_open(&config, &shared_spec, 1, dropout), b = tiny_open(&config, &flat, 1, dropout);
    a.options.dropout = b.options.dropout = dropout > 0;
    CHECK_INT(a.n_targets, b.n_targets);
    real *a_gradient = tiny_gradient(&a), *b_gradient = tiny_gradient(&b);
    CHECK_MREL("log-probs", stv_run_logp(a.run), stv_run_logp(b.run), a.n_targets, SAME);
    for (int64_t i = 0; i < stv_model_n_tensors(a.model); i++) {
        stv_tensor_info info = stv_model_tensor(a.model, i);
        if (info.influences && !strstr(info.name, "k_proj.bias"))
            CHECK_MREL(info.name, a_gradient + info.offset, b_gradient + info.offset, info.size, strstr(info.name, "sim_") ? 100 * SAME : 5 * SAME);
    }
    tiny_close(&a);
    tiny_close(&b);
}

static void shared_prefix_equals_unshared(void)
{
    check_shared(0);
    check_shared(0.4);
}

static void sample_alone_equals_sample_in_batch(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    int32_t parent = -1, image[] = {0, 1};
    int64_t begin[] = {0, 5};
    stv_batch_spec alone = {.n_segments = 1,
                            .parent = &parent,
                            .begin = begin,
                            .ids = tree_ids + 16,
                            .labels = tree_labels + 16,
                            .sample = tree_sample + 6,
                            .n_image_refs = 2,
                            .image = image,
                            .n_images = 2};
    tiny a = tiny_open(&config, &spec, 1, 0), b = tiny_open(&config, &alone, 1, 0);
    const real *pixels = a.options.pixels;
    int64_t one = 3 * TINY_IMAGE * TINY_IMAGE;
    real *swapped = check_reals(2 * one); /* alone, its first image is the batch's second */
    memcpy(swapped, pixels + one, (size_t)one * sizeof(real));
    memcpy(swapped + one, pixels, (size_t)one * sizeof(real));
    b.options.pixels = swapped;
    const double *in_batch = tiny_forward(&a), *by_itself = tiny_forward(&b);
    CHECK_INT(b.n_targets, 2);
    CHECK_SAME_BITS("log-probs", in_batch + a.n_targets - 2, by_itself, 2 * sizeof(double));
    tiny_close(&a);
    tiny_close(&b);
}

static void recompute_changes_nothing(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 2, 0.3);
    t.options.dropout = true;
    real *kept = tiny_gradient(&t);
    size_t bytes, fewer_bytes;
    CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &bytes));
    for (int64_t n = 1; n <= 3; n++) {
        CHECK_OK(stv_run_set_recompute(t.run, n, n));
        real *recomputed = tiny_gradient(&t);
        CHECK_SAME_BITS("gradient", kept, recomputed, (size_t)stv_model_n_trainable(t.model) * sizeof(real));
        CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &fewer_bytes));
        CHECK(fewer_bytes < bytes);
    }
    CHECK_ERROR(stv_run_set_recompute(t.run, -1, 0), STV_ERR_ARGUMENT, "-1");
    tiny_close(&t);
}

static void threads_change_nothing(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0.3);
    t.options.dropout = true;
    real *one = tiny_gradient(&t);
    double *logp = check_new((size_t)t.n_targets * sizeof(double));
    memcpy(logp, stv_run_logp(t.run), (size_t)t.n_targets * sizeof(double));
    for (int n = 2; n <= 4; n += 2) {
        CHECK_OK(stv_context_set_n_threads(t.context, n));
        real *more = tiny_gradient(&t);
        CHECK_SAME_BITS("gradient", one, more, (size_t)stv_model_n_trainable(t.model) * sizeof(real));
        CHECK_SAME_BITS("log-probs", logp, stv_run_logp(t.run), (size_t)t.n_targets * sizeof(double));
    }
    tiny_forward(&t);
    CHECK_OK(stv_context_set_n_threads(t.context, 1));
    CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "threads");
    tiny_close(&t);
}

/* Stopped before any of its tasks, a pass ends, leaves nothing to ask for, and the next one has the same bits. */
static void stopped_passes_leave_nothing_behind(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 2, 0.3);
    t.options.dropout = t.options.mean_logit = true;
    CHECK_OK(stv_run_set_recompute(t.run, 1, 1));
    real *whole = tiny_gradient(&t);
    stv_status forward = STV_ERR_INTERRUPTED, backward = STV_ERR_INTERRUPTED;
    int64_t n_stopped[2] = {0, 0};
    for (int64_t n = 0; forward != STV_OK || backward != STV_OK; n = tiny_next_stop(n)) {
        int64_t n_left = n;
        stv_watch watch = {.poll = tiny_count_down, .arg = &n_left};
        CHECK_OK(stv_model_zero_grad(t.model));
        stv_watch_set(&watch);
        forward = stv_run_forward(t.run, t.batch, &t.options);
        backward = forward == STV_OK ? stv_run_backward(t.run, t.weight) : STV_ERR_INTERRUPTED;
        stv_watch_set(NULL);
        if (forward != STV_OK) {
            CHECK_INT(forward, STV_ERR_INTERRUPTED);
            CHECK(stv_run_logp(t.run) == NULL);
            n_stopped[0]++;
        } else if (backward != STV_OK) {
            CHECK_INT(backward, STV_ERR_INTERRUPTED);
            n_stopped[1]++;
        }
        CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "backward");
    }
    CHECK(n_stopped[0] > 20 && n_stopped[1] > 5);
    real *again = tiny_gradient(&t);
    CHECK_SAME_BITS("gradient", whole, again, (size_t)stv_model_n_trainable(t.model) * sizeof(real));
    tiny_close(&t);
}

/* ---- what trains --------------------------------------------------------------------------------------------------------- */

static bool is_adapter(const stv_tensor_info *info) { return strstr(info->name, ".lora_") != NULL; }
static bool is_language_adapter(const stv_tensor_info *info) { return is_adapter(info) && !strstr(info->name, "vision_tower"); }
static bool is_projector(const stv_tensor_info *info) { return strstr(info->name, "mm_projector") != NULL; }
static bool is_upper_down(const stv_tensor_info *info) { return strstr(info->name, "model.layers.1.mlp.down_proj.lora_A") != NULL; }
static bool is_head_norm(const stv_tensor_info *info) { return strcmp(info->name, "model.norm.weight") == 0; }
static bool is_upper_tower(const stv_tensor_info *info)
{
    return strstr(info->name, "layers.1.") && strstr(info->name, "vision_tower") && is_adapter(info);
}

/* The gradient of a subset is the part of the whole gradient that belongs to it, however early backward stops. */
static void subsets_get_the_same_gradient(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    real *all = tiny_gradient(&t);
    int64_t *offset = check_new((size_t)stv_model_n_tensors(t.model) * sizeof(int64_t));
    for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) offset[i] = stv_model_tensor(t.model, i).offset;
    size_t all_bytes, bytes;
    CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &all_bytes));
    bool (*subsets[])(const stv_tensor_info *) = {is_adapter, is_language_adapter, is_projector, is_upper_down, is_head_norm, is_upper_tower};
    for (size_t s = 0; s < sizeof subsets / sizeof *subsets; s++) {
        tiny_train(t.model, subsets[s]);
        real *part = tiny_gradient(&t);
        for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) {
            stv_tensor_info info = stv_model_tensor(t.model, i);
            if (info.offset >= 0) CHECK_SAME_BITS(info.name, part + info.offset, all + offset[i], (size_t)info.size * sizeof(real));
        }
        CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &bytes));
        CHECK(bytes < all_bytes);
    }
    tiny_close(&t);
}

/* Layers of tower (2 count) and decoder (2) that backward enters first from below, and whether it reaches the features between them. */
static void backward_stops_where_nothing_trains_below(void)
{
    static const struct {
        bool (*wanted)(const stv_tensor_info *);
        int64_t vision_lowest, decoder_lowest;
        bool features_grad;
    } table[] = {
        {NULL, -1, 0, true},         {is_adapter, 0, 0, true},           {is_upper_tower, 1, 0, true},
        {is_projector, 2, 0, true},  {is_language_adapter, 2, 0, false}, {is_upper_down, 2, 1, false},
        {is_head_norm, 2, 2, false},
    };
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        tiny_train(t.model, table[i].wanted);
        tiny_forward(&t);
        const stv_llava_pass *pass = t.run->pass;
        CHECK_INT(pass->vision.lowest, table[i].vision_lowest);
        CHECK_INT(pass->features_grad, table[i].features_grad);
        CHECK_INT(pass->decoder.input_grad, table[i].features_grad);
        CHECK_INT(pass->decoder.lowest, table[i].decoder_lowest);
    }
    size_t frozen_bytes, bytes; /* without train, what could train costs nothing */
    t.options.train = false;
    CHECK_OK(stv_model_set_trainable(t.model, NULL, 0));
    CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &frozen_bytes));
    tiny_train(t.model, NULL);
    CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &bytes));
    CHECK_INT(bytes, frozen_bytes);
    tiny_close(&t);
}

static void vision_grad_off_stops_at_the_tower(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    real *with = tiny_gradient(&t);
    t.options.vision_grad = false;
    real *without = tiny_gradient(&t);
    double tower = 0;
    for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) {
        stv_tensor_info info = stv_model_tensor(t.model, i);
        bool in_tower = strstr(info.name, "vision_tower") != NULL;
        for (int64_t j = 0; j < info.size; j++) {
            if (in_tower) CHECK(without[info.offset + j] == 0);
            if (in_tower) tower += fabs((double)with[info.offset + j]);
        }
        if (!in_tower) CHECK_SAME_BITS(info.name, with + info.offset, without + info.offset, (size_t)info.size * sizeof(real));
    }
    CHECK(tower > 0.1);
    tiny_close(&t);
}

static void features_given_skip_the_tower(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    tiny_train(t.model, is_language_adapter);
    real *features = check_reals(2 * TINY_T * TINY_D), *from_pixels = tiny_gradient(&t);
    double *logp = check_new((size_t)t.n_targets * sizeof(double));
    memcpy(logp, stv_run_logp(t.run), (size_t)t.n_targets * sizeof(double));
    real *seen = check_copy_reals(stv_run_features(t.run), 2 * TINY_T * TINY_D);
    CHECK_OK(stv_run_encode(t.run, &t.options, features));
    CHECK_SAME_BITS("features", features, seen, 2 * TINY_T * TINY_D * sizeof(real));
    CHECK(stv_run_logp(t.run) == NULL);
    t.options.pixels = NULL;
    t.options.features = features;
    real *from_features = tiny_gradient(&t);
    CHECK_SAME_BITS("log-probs", logp, stv_run_logp(t.run), (size_t)t.n_targets * sizeof(double));
    CHECK_SAME_BITS("gradient", from_pixels, from_features, (size_t)stv_model_n_trainable(t.model) * sizeof(real));
    tiny_close(&t);
}

/* Magnitudes that leave the base as it is while B = 0. */
static void set_magnitudes_of_the_base(stv_model *model)
{
    for (int i = 0; i < model->n_modules; i++) {
        if (model->modules[i].magnitude < 0) continue;
        const stv_param *weight = &model->params[model->modules[i].weight];
        const real *w = weight->data;
        real *magnitude = model->params[model->modules[i].magnitude].data;
        int64_t K = weight->shape[1];
        for (int64_t n = 0; n < weight->shape[0]; n++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++) sum += (double)w[n * K + k] * (double)w[n * K + k];
            magnitude[n] = (real)sqrt(sum);
        }
    }
}

static void snapshot_is_the_reference(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    tiny_train(t.model, is_adapter);
    int64_t n = stv_model_n_trainable(t.model);
    double *before = check_new((size_t)t.n_targets * sizeof(double)), *bare = check_new((size_t)t.n_targets * sizeof(double));
    memcpy(before, tiny_forward(&t), (size_t)t.n_targets * sizeof(double));
    real *snapshot = check_copy_reals(stv_model_theta(t.model), n), *theta = stv_model_theta(t.model);
    for (int64_t i = 0; i < n; i++) theta[i] = 0;
    set_magnitudes_of_the_base(t.model);
    t.options.adapters = false;
    memcpy(bare, tiny_forward(&t), (size_t)t.n_targets * sizeof(double));
    t.options.adapters = true; /* adapters of zeros are no adapters */
    CHECK_MREL("zero adapters", tiny_forward(&t), bare, t.n_targets, SAME);
    t.options.theta = snapshot;
    CHECK_SAME_BITS("snapshot", tiny_forward(&t), before, (size_t)t.n_targets * sizeof(double));
    tiny_close(&t);
}

static void merged_equals_unmerged(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    const char *module = "model.layers.1.mlp.up_proj";
    real *before = check_reals(20 * 12), *merged = check_reals(20 * 12);
    double *logp = check_new((size_t)t.n_targets * sizeof(double));
    memcpy(logp, tiny_forward(&t), (size_t)t.n_targets * sizeof(double));
    CHECK_OK(stv_model_effective_weight(t.model, module, before));
    CHECK_OK(stv_model_merge_lora(t.model));
    CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "merged");
    CHECK_OK(stv_model_effective_weight(t.model, module, merged));
    CHECK_SAME_BITS("effective weight", before, merged, 20 * 12 * sizeof(real));
    CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_STATE, "merged");
    t.options.train = false;
    CHECK_MREL("merged", tiny_forward(&t), logp, t.n_targets, SAME);
    CHECK_ERROR(stv_model_merge_lora(t.model), STV_ERR_STATE, "merged");
    CHECK_ERROR(stv_model_bind(t.model, "model.norm.weight", stv_stored_reals(before), TINY_D), STV_ERR_STATE, "merged");
    CHECK_ERROR(stv_model_set_trainable(t.model, NULL, 0), STV_ERR_STATE, "merged");
    CHECK_OK(stv_model_unmerge_lora(t.model));
    CHECK_ERROR(stv_model_unmerge_lora(t.model), STV_ERR_STATE, "no adapters are merged");
    CHECK_SAME_BITS("unmerged", tiny_forward(&t), logp, (size_t)t.n_targets * sizeof(double));
    CHECK_ERROR(stv_model_effective_weight(t.model, "model.norm", merged), STV_ERR_NAME, "model.norm");
    tiny_close(&t);
}

static void set_trainable_carries_values_over(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    double *logp = check_new((size_t)t.n_targets * sizeof(double));
    memcpy(logp, tiny_forward(&t), (size_t)t.n_targets * sizeof(double));
    bool (*subsets[])(const stv_tensor_info *) = {is_adapter, is_projector, is_adapter, NULL};
    for (int s = 0; s < 4; s++) {
        tiny_train(t.model, subsets[s]);
        CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "changed");
        CHECK_SAME_BITS("log-probs", tiny_forward(&t), logp, (size_t)t.n_targets * sizeof(double));
    }
    CHECK_OK(stv_model_set_trainable(t.model, NULL, 0));
    CHECK_INT(stv_model_n_trainable(t.model), 0);
    CHECK(!stv_model_theta(t.model) && !stv_model_grad(t.model));
    CHECK_SAME_BITS("all frozen", tiny_forward(&t), logp, (size_t)t.n_targets * sizeof(double));
    CHECK_OK(stv_run_backward(t.run, t.weight));
    const char *twice[] = {"model.norm.weight", "model.norm.weight"}, *unknown[] = {"model.nrom.weight"};
    CHECK_ERROR(stv_model_set_trainable(t.model, twice, 2), STV_ERR_ARGUMENT, "twice");
    CHECK_ERROR(stv_model_set_trainable(t.model, unknown, 1), STV_ERR_NAME, "nrom");
    tiny_close(&t);
}

/* ---- memory -------------------------------------------------------------------------------------------------------------- */

static void steady_step_allocates_nothing(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 2, 0.1);
    t.options.dropout = t.options.mean_logit = true;
    int64_t n = stv_model_n_trainable(t.model), rows[] = {0, 3};
    real *m = check_reals(n), *v = check_reals(n), *logits = check_reals(2 * TINY_VOCAB);
    memset(m, 0, (size_t)n * sizeof(real));
    memset(v, 0, (size_t)n * sizeof(real));
    stv_adamw_range range = {0, n, 1e-3, 0.01};
    uint64_t allocated = 0;
    for (int step = 1; step <= 3; step++) {
        stv_adamw_config adamw = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .step = step, .grad_scale = 1};
        CHECK_OK(stv_model_zero_grad(t.model));
        tiny_forward(&t);
        CHECK_OK(stv_run_logits(t.run, rows, 2, logits));
        CHECK_OK(stv_run_backward(t.run, t.weight));
        CHECK_OK(stv_adamw_step(t.model, m, v, &range, 1, &adamw));
        if (step > 1) CHECK_INT(stv_allocations(), allocated);
        allocated = stv_allocations();
    }
    tiny_close(&t);
}

static void estimate_is_what_is_used(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 2, 0.1);
    t.options.dropout = t.options.mean_logit = true;
    for (int train = 1; train >= 0; train--) {
        size_t bytes;
        t.options.train = train;
        CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &bytes));
        tiny_forward(&t);
        CHECK_OK(stv_run_estimate(t.run, t.batch, &t.options, &bytes)); /* leaves what forward kept alone */
        if (train) CHECK_OK(stv_run_backward(t.run, t.weight));
        CHECK_INT(t.run->arena.peak, bytes);
        CHECK(stv_run_arena_bytes(t.run) >= bytes);
    }
    tiny_close(&t);
}

/* ---- doors --------------------------------------------------------------------------------------------------------------- */

static void logits_hold_the_log_probs(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    t.options.mean_logit = true;
    const double *logp = tiny_forward(&t);
    stv_batch_view view = stv_batch_get(t.batch);
    real *logits = check_reals(t.n_targets * TINY_VOCAB), *of_labels = check_reals(t.n_targets * TINY_VOCAB);
    double *want = check_new((size_t)t.n_targets * sizeof(double)), *mean = check_new((size_t)t.n_targets * sizeof(double));
    CHECK_OK(stv_run_logits(t.run, view.target_row, t.n_targets, logits));
    CHECK_OK(stv_run_logits(t.run, view.label_row, t.n_targets, of_labels));
    for (int64_t i = 0; i < t.n_targets; i++) {
        const real *row = logits + i * TINY_VOCAB;
        double sum = 0;
        mean[i] = 0;
        for (int64_t v = 0; v < TINY_VOCAB; v++) {
            sum += exp((double)row[v]);
            mean[i] += (double)of_labels[i * TINY_VOCAB + v] / TINY_VOCAB;
        }
        want[i] = (double)row[view.target_token[i]] - log(sum);
    }
    CHECK_MREL("log-probs", logp, want, t.n_targets, SAME);
    CHECK_MREL("mean logit", stv_run_mean_logit(t.run), mean, t.n_targets, SAME);
    int64_t beyond = view.n_rows;
    CHECK_ERROR(stv_run_logits(t.run, &beyond, 1, logits), STV_ERR_ARGUMENT, "rows[0]");
    tiny_close(&t);
}

/* Rows that predict nothing leave the last layer early; asked for, they have what they would have had. */
static void logits_of_any_row(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec(), bare = spec;
    bare.labels = NULL;
    tiny every = tiny_open(&config, &spec, 1, 0.3), none = tiny_open(&config, &bare, 1, 0.3);
    int64_t n = stv_batch_get(every.batch).n_rows;
    real *a = check_reals(n * TINY_VOCAB), *b = check_reals(n * TINY_VOCAB);
    int64_t *rows = check_new((size_t)n * sizeof *rows);
    for (int64_t i = 0; i < n; i++) rows[i] = n - 1 - i;
    for (int recompute = 0; recompute <= config.decoder.n_layers; recompute += (int)config.decoder.n_layers) {
        every.options.dropout = none.options.dropout = every.options.train = true;
        CHECK_OK(stv_run_set_recompute(every.run, 0, recompute));
        tiny_forward(&every);
        tiny_forward(&none);
        CHECK_OK(stv_run_logits(every.run, rows, n, a));
        CHECK_OK(stv_run_logits(none.run, rows, n, b));
        CHECK_SAME_BITS("labels or none", a, b, (size_t)(n * TINY_VOCAB) * sizeof(real));
        CHECK_OK(stv_run_backward(every.run, every.weight));
        CHECK_OK(stv_run_logits(every.run, rows, n, a));
        CHECK_SAME_BITS("after backward", a, b, (size_t)(n * TINY_VOCAB) * sizeof(real));
    }
    tiny_close(&every);
    tiny_close(&none);
}

static void embeddings_are_spliced(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    tiny_forward(&t);
    stv_batch_view view = stv_batch_get(t.batch);
    const real *table = stv_model_tensor(t.model, stv_model_find(t.model, "model.embed_tokens.weight")).data;
    const real *features = stv_run_features(t.run), *embeddings = stv_run_embeddings(t.run);
    for (int64_t r = 0; r < view.n_rows; r++) {
        const real *want = view.row_token[r] < 0 ? features + view.row_feature[r] * TINY_D : table + view.row_token[r] * TINY_D;
        CHECK_SAME_BITS("row", embeddings + r * TINY_D, want, TINY_D * sizeof(real));
    }
    tiny_close(&t);
}

static void parts_alone_are_the_parts(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    real *features = check_reals(2 * TINY_T * TINY_D);
    CHECK_OK(stv_run_encode(t.run, &t.options, features));
    CHECK_OK(stv_run_vision_forward(t.run, &t.options, true));
    real *tower = check_copy_reals(stv_run_vision_features(t.run), 2 * TINY_T * TINY_E);
    const real *selected = stv_run_vision_hidden(t.run, 2);
    for (int image = 0; image < 2; image++)
        CHECK_SAME_BITS("patches of hidden_states[-2]", tower + image * TINY_T * TINY_E, selected + (image * (TINY_T + 1) + 1) * TINY_E,
                        TINY_T * TINY_E * sizeof(real));
    CHECK(stv_run_vision_hidden(t.run, 3) && stv_run_vision_pooled(t.run) && !stv_run_vision_hidden(t.run, 4));
    CHECK_OK(stv_run_vision_forward(t.run, &t.options, false));
    CHECK_SAME_BITS("tower", tower, stv_run_vision_features(t.run), 2 * TINY_T * TINY_E * sizeof(real));
    CHECK(!stv_run_vision_hidden(t.run, 0) && !stv_run_vision_pooled(t.run));
    CHECK_OK(stv_run_projector_forward(t.run, tower, 2, TINY_T, &t.options));
    CHECK_SAME_BITS("features", features, stv_run_projector_output(t.run), 2 * TINY_T * TINY_D * sizeof(real));
    const int32_t *assignment = stv_run_cluster_assignment(t.run);
    for (int i = 0; i < 2 * TINY_T; i++) CHECK(assignment[i] >= 0 && assignment[i] < 3 && stv_run_cluster_margin(t.run)[i] > 1e-4);
    tiny_close(&t);
}

/* The gradient through the parts alone, chained by hand, is the gradient through the whole. */
static void parts_backward_chain(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    int64_t n = stv_model_n_trainable(t.model);
    real *dfeatures = check_random_reals(2 * TINY_T * TINY_D, 8), *dtower = check_reals(2 * TINY_T * TINY_E);
    CHECK_OK(stv_model_zero_grad(t.model));
    CHECK_OK(stv_run_vision_forward(t.run, &t.options, false));
    real *tower = check_copy_reals(stv_run_vision_features(t.run), 2 * TINY_T * TINY_E);
    CHECK_OK(stv_run_projector_forward(t.run, tower, 2, TINY_T, &t.options));
    CHECK_OK(stv_run_projector_backward(t.run, dfeatures, dtower));
    CHECK_ERROR(stv_run_projector_backward(t.run, dfeatures, dtower), STV_ERR_STATE, "already");
    real *projector_only = check_copy_reals(stv_model_grad(t.model), n);
    CHECK_ERROR(stv_run_vision_backward(t.run, dtower), STV_ERR_STATE, "vision_forward");
    CHECK_OK(stv_run_vision_forward(t.run, &t.options, true));
    CHECK_OK(stv_run_vision_backward(t.run, dtower));
    const real *gradient = stv_model_grad(t.model);
    double in_tower = 0;
    for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) {
        stv_tensor_info info = stv_model_tensor(t.model, i);
        for (int64_t j = info.offset; j < info.offset + info.size; j++) {
            if (strstr(info.name, "vision_tower")) in_tower += fabs((double)gradient[j]);
            else CHECK(gradient[j] == projector_only[j]);
        }
    }
    CHECK(in_tower > 0.1);
    tiny_close(&t);
}

/* ---- errors -------------------------------------------------------------------------------------------------------------- */

static void configurations_are_checked(void)
{
    stv_context *context;
    stv_model *model;
    CHECK_OK(stv_context_create(&context, 1));
#define BAD(change, part) \
    do { \
        stv_model_config c = tiny_config(); \
        change; \
        CHECK_ERROR(stv_model_create(&model, context, &c, STV_REAL_DTYPE), STV_ERR_ARGUMENT, (part)); \
        CHECK(model == NULL); \
    } while (0)
    BAD(c.has_vision = c.has_projector = c.has_decoder = false, "no part");
    BAD(c.has_projector = false, "projector");
    BAD(c.vision.patch_size = 3, "vision.patch_size 3");
    BAD(c.vision.n_heads = 3, "vision.n_heads 3");
    BAD(c.vision.activation = 2, "vision.activation");
    BAD(c.vision.select_layer = 4, "vision.select_layer");
    BAD(c.vision.layer_norm_eps = 0, "vision.layer_norm_eps");
    BAD(c.projector.in_size = 9, "projector.in_size");
    BAD(c.projector.out_size = 9, "projector.out_size");
    BAD(c.projector.n_centers = 5, "projector.n_centers");
    BAD(c.projector.kind = STV_PROJECTOR_MLP; c.projector.depth = 17, "projector.depth");
    BAD(c.decoder.vocab_size = 0, "decoder.vocab_size");
    BAD(c.decoder.n_kv_heads = 3, "decoder.n_kv_heads");
    BAD(c.decoder.head_dim = 5, "decoder.head_dim");
    BAD(c.decoder.rope_theta = NAN, "decoder.rope_theta");
    BAD(c.decoder.sliding_window = -1, "decoder.sliding_window");
#undef BAD
    stv_model_config c = tiny_config();
    CHECK_ERROR(stv_model_create(&model, context, &c, (stv_dtype)7), STV_ERR_DTYPE, "7");
    stv_context_free(context);
}

static void models_check_names_and_sizes(void)
{
    stv_context *context;
    stv_model *model;
    stv_model_config config = tiny_config();
    real *values = check_random_reals(400, 1);
    CHECK_OK(stv_context_create(&context, 1));
    CHECK_OK(stv_model_create(&model, context, &config, STV_REAL_DTYPE));
    CHECK_ERROR(stv_model_bind(model, "model.nrom.weight", stv_stored_reals(values), 12), STV_ERR_NAME, "model.nrom.weight");
    CHECK_ERROR(stv_model_bind(model, "model.norm.weight", stv_stored_reals(values), 13), STV_ERR_SHAPE, "13 elements, want 12");
    CHECK_ERROR(stv_model_bind(model, "model.norm.weight", stv_stored_reals(NULL), 12), STV_ERR_ARGUMENT, "no data");
    CHECK_ERROR(stv_model_add_lora(model, "model.embed_tokens", 2, 1, 0, false), STV_ERR_NAME, "model.embed_tokens");
    const char *module = "model.layers.0.mlp.up_proj";
    CHECK_ERROR(stv_model_add_lora(model, module, 0, 1, 0, false), STV_ERR_ARGUMENT, "rank 0");
    CHECK_ERROR(stv_model_add_lora(model, module, 2, NAN, 0, false), STV_ERR_ARGUMENT, "scale");
    CHECK_ERROR(stv_model_add_lora(model, module, 2, 1, 1, false), STV_ERR_ARGUMENT, "dropout");
    CHECK_OK(stv_model_add_lora(model, module, 2, 1, 0, false));
    CHECK_ERROR(stv_model_add_lora(model, module, 2, 1, 0, false), STV_ERR_STATE, "already");
    CHECK_ERROR(stv_model_merge_lora(model), STV_ERR_STATE, "up_proj");
    stv_run *run;
    CHECK_OK(stv_run_create(&run, model));
    CHECK_ERROR(stv_model_add_lora(model, "model.layers.0.mlp.gate_proj", 2, 1, 0, false), STV_ERR_STATE, "runs");
    stv_run_free(run);
    CHECK_OK(stv_model_add_lora(model, "model.layers.0.mlp.gate_proj", 2, 1, 0, false));
    CHECK(stv_model_find(model, "lm_head.weight") == -1); /* tied */
    stv_tensor_info unused = stv_model_tensor(model, stv_model_find(model, "model.mm_projector.ln_1.weight"));
    CHECK(unused.optional && !unused.influences && !unused.data && unused.offset == -1);
    stv_model_free(model);
    stv_context_free(context);
}

static void forward_checks_its_inputs(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny t = tiny_open(&config, &spec, 1, 0);
    CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "no forward");
    CHECK_ERROR(stv_run_logits(t.run, NULL, 0, NULL), STV_ERR_STATE, "no forward");
    t.options.train = false;
    tiny_forward(&t);
    CHECK_ERROR(stv_run_backward(t.run, t.weight), STV_ERR_STATE, "train was false");
    stv_forward_options good = t.options;
    t.options.n_images = 1;
    CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_SHAPE, "2 images");
    t.options = good;
    t.options.pixels = NULL;
    CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_ARGUMENT, "pixels");
    CHECK_ERROR(stv_run_vision_forward(t.run, &t.options, false), STV_ERR_ARGUMENT, "pixels");
    t.options.pixels = t.options.features = good.pixels;
    CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_ARGUMENT, "both");
    t.options = good;
    stv_tensor_info norm = stv_model_tensor(t.model, stv_model_find(t.model, "model.layers.1.input_layernorm.weight"));
    ((real *)norm.data)[3] = (real)NAN;
    CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_NUMERIC, "target 0");
    CHECK(stv_run_logp(t.run) == NULL);
    CHECK_ERROR(stv_run_projector_forward(t.run, NULL, 1, 1, &t.options), STV_ERR_ARGUMENT, "projector");
    tiny other = tiny_open(&config, &spec, 1, 0);
    CHECK_ERROR(stv_run_forward(t.run, other.batch, &t.options), STV_ERR_ARGUMENT, "another model");
    tiny_close(&other);
    tiny_close(&t);
}

static void unbound_tensors_are_named(void)
{
    stv_context *context;
    stv_model *model;
    stv_model_config config = tiny_config();
    config.has_vision = config.has_projector = false;
    int32_t parent = -1, ids[] = {1, 2, 3};
    int64_t begin[] = {0, 3};
    stv_batch_spec spec = {.n_segments = 1, .parent = &parent, .begin = begin, .ids = ids, .labels = ids};
    stv_batch *batch;
    stv_run *run;
    CHECK_OK(stv_context_create(&context, 1));
    CHECK_OK(stv_model_create(&model, context, &config, STV_REAL_DTYPE));
    CHECK_OK(stv_model_add_lora(model, "model.layers.0.mlp.up_proj", 2, 1, 0, false));
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    CHECK_OK(stv_run_create(&run, model));
    stv_forward_options options = {.adapters = false};
    CHECK_ERROR(stv_run_forward(run, batch, &options), STV_ERR_STATE, "model.embed_tokens.weight");
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        stv_tensor_info info = stv_model_tensor(model, i);
        if (!is_adapter(&info)) CHECK_OK(stv_model_bind(model, info.name, stv_stored_reals(tiny_values(&info, (uint64_t)i)), info.size));
    }
    CHECK_OK(stv_run_forward(run, batch, &options)); /* without adapters nobody misses them */
    options.adapters = true;
    CHECK_ERROR(stv_run_forward(run, batch, &options), STV_ERR_STATE, "lora_A");
    stv_run_free(run);
    stv_batch_free(batch);
    stv_model_free(model);
    stv_context_free(context);
}

static const check_case cases[] = {
#if STV_REAL_BITS == 64
    {"gradients of every tensor", gradients_of_every_tensor},
    {"gradients with dropout", gradients_with_dropout},
    {"gradients of other projectors", gradients_of_other_projectors},
#endif
    {"shared prefix equals unshared", shared_prefix_equals_unshared},
    {"sample alone equals sample in batch", sample_alone_equals_sample_in_batch},
    {"recompute changes nothing", recompute_changes_nothing},
    {"threads change nothing", threads_change_nothing},
    {"stopped passes leave nothing behind", stopped_passes_leave_nothing_behind},
    {"subsets get the same gradient", subsets_get_the_same_gradient},
    {"backward stops where nothing trains below", backward_stops_where_nothing_trains_below},
    {"vision_grad off stops at the tower", vision_grad_off_stops_at_the_tower},
    {"features given skip the tower", features_given_skip_the_tower},
    {"snapshot is the reference", snapshot_is_the_reference},
    {"merged equals unmerged", merged_equals_unmerged},
    {"set_trainable carries values over", set_trainable_carries_values_over},
    {"steady step allocates nothing", steady_step_allocates_nothing},
    {"estimate is what is used", estimate_is_what_is_used},
    {"logits hold the log-probs", logits_hold_the_log_probs},
    {"logits of any row", logits_of_any_row},
    {"embeddings are spliced", embeddings_are_spliced},
    {"parts alone are the parts", parts_alone_are_the_parts},
    {"parts backward chain", parts_backward_chain},
    {"configurations are checked", configurations_are_checked},
    {"models check names and sizes", models_check_names_and_sizes},
    {"forward checks its inputs", forward_checks_its_inputs},
    {"unbound tensors are named", unbound_tensors_are_named},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
