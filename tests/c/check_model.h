/* check_model.h - a LLaVA of a few thousand random weights, its batch of trees, and a forward with its weighted sum of log-probs as loss. */
#ifndef STV_TESTS_CHECK_MODEL_H
#define STV_TESTS_CHECK_MODEL_H

#include "check_real.h"
#include "stllava.h"

#define CHECK_OK(expr) check_ok((expr), #expr, __FILE__, __LINE__)
/* A call that must fail with this code and say all of `part`. */
#define CHECK_ERROR(expr, code, part) check_error((expr), (code), (part), #expr, __FILE__, __LINE__)

static inline bool check_ok(stv_status status, const char *text, const char *file, int line)
{
    bool ok = check_report(status == STV_OK, file, line);
    if (!ok) printf("%s: %d, %s\n", text, (int)status, stv_last_error());
    return ok;
}

static inline bool check_error(stv_status status, stv_status code, const char *part, const char *text, const char *file, int line)
{
    bool ok = check_report(status == code && strstr(stv_last_error(), part) != NULL, file, line);
    if (!ok) printf("%s: %d \"%s\", want %d \"%s\"\n", text, (int)status, status ? stv_last_error() : "", (int)code, part);
    return ok;
}

enum { TINY_IMAGE = 8, TINY_VOCAB = 31, TINY_T = 4, TINY_D = 12, TINY_E = 8 };

/* Grouped-query heads wider than the model, a sliding window, a tied head, three layers of tower of which two count, bins that overlap. */
static inline stv_model_config tiny_config(void)
{
    return (stv_model_config){
        .has_vision = true,
        .has_projector = true,
        .has_decoder = true,
        .vision = {.image_size = TINY_IMAGE,
                   .patch_size = 4,
                   .hidden_size = TINY_E,
                   .n_layers = 3,
                   .n_heads = 2,
                   .intermediate_size = 12,
                   .activation = 1,
                   .layer_norm_eps = 1e-5,
                   .select_layer = -2},
        .projector = {.kind = STV_PROJECTOR_CLUSTER, .in_size = TINY_E, .out_size = TINY_D, .n_centers = 3, .n_rounds = 2},
        .decoder = {.vocab_size = TINY_VOCAB,
                    .hidden_size = TINY_D,
                    .n_layers = 2,
                    .n_heads = 4,
                    .n_kv_heads = 2,
                    .head_dim = 4,
                    .intermediate_size = 20,
                    .rms_norm_eps = 1e-5,
                    .rope_theta = 100,
                    .sliding_window = 7,
                    .tie_word_embeddings = true},
    };
}

/* Norm weights and magnitudes around one, all else of the size that keeps activations near one. */
static inline real *tiny_values(const stv_tensor_info *info, uint64_t seed)
{
    real *values = check_random_reals(info->size, seed);
    bool is_norm = (strstr(info->name, "norm") && strstr(info->name, ".weight")) || strstr(info->name, "magnitude");
    double scale = info->ndim > 1 && info->shape[1] > 1 ? 1.7 / sqrt((double)info->size / (double)info->shape[0]) : 0.3;
    for (int64_t i = 0; i < info->size; i++) values[i] = (real)((is_norm ? 1 : 0) + scale * (double)values[i]);
    if (strstr(info->name, "sim_alpha")) values[0] = (real)1.3;
    return values;
}

static inline void tiny_bind_all(stv_model *model)
{
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        stv_tensor_info info = stv_model_tensor(model, i);
        if (!info.data) CHECK_OK(stv_model_bind(model, info.name, stv_stored_reals(tiny_values(&info, 1000 + (uint64_t)i)), info.size));
    }
}

/* Every third is DoRA. */
static inline void tiny_add_lora(stv_model *model, double dropout)
{
    for (int64_t i = 0; i < stv_model_n_linear(model); i++)
        CHECK_OK(stv_model_add_lora(model, stv_model_linear_name(model, i), 2 + i % 2, 0.7, dropout, i % 3 == 0));
}

/* Everything that `wanted` accepts trains; NULL: every tensor. */
static inline void tiny_train(stv_model *model, bool (*wanted)(const stv_tensor_info *))
{
    const char *names[512];
    int64_t n = 0;
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        stv_tensor_info info = stv_model_tensor(model, i);
        if (!wanted || wanted(&info)) names[n++] = info.name;
    }
    CHECK_OK(stv_model_set_trainable(model, names, n));
}

static inline stv_model *tiny_model(stv_context *context, const stv_model_config *config, double dropout)
{
    stv_model *model = NULL;
    CHECK_OK(stv_model_create(&model, context, config, STV_REAL_DTYPE));
    tiny_add_lora(model, dropout);
    tiny_bind_all(model);
    return model;
}

/* ---- batches ------------------------------------------------------------------------------------------------------------- */

enum { I = STV_IMAGE_TOKEN, N = STV_IGNORE_INDEX };

/*   0: 5 <0> 7 --+-- 1: 3 9 --+-- 2: 4 11 2          5: 1 2 3 4 (text only)        6: <1> 3 <0> 2 30 (two images)
 *                |            +-- 3: 6
 *                +-- 4: <1> 8 1                      a label in segment 1 counts for both of its sequences */
static const int32_t tree_parent[] = {-1, 0, 1, 1, 0, -1, -1};
static const int64_t tree_begin[] = {0, 3, 5, 8, 9, 12, 16, 21};
static const int32_t tree_ids[] = {5, I, 7, 3, 9, 4, 11, 2, 6, I, 8, 1, 1, 2, 3, 4, I, 3, I, 2, 30};
static const int32_t tree_labels[] = {N, N, 7, N, 9, 4, 11, 2, 6, N, 8, N, N, 2, 3, 4, N, 3, N, N, 30};
static const uint64_t tree_sample[] = {40, 40, 40, 40, 40, 41, 42};
static const int32_t tree_image[] = {0, 1, 1, 0};

static inline stv_batch_spec tree_spec(void)
{
    return (stv_batch_spec){.n_segments = 7,
                            .parent = tree_parent,
                            .begin = tree_begin,
                            .ids = tree_ids,
                            .labels = tree_labels,
                            .sample = tree_sample,
                            .n_image_refs = 4,
                            .image = tree_image,
                            .n_images = 2};
}

/* The same sequences, one tree each. */
static inline stv_batch_spec flat_spec(void)
{
    static const int32_t parent[] = {-1, -1, -1, -1, -1};
    static const int64_t begin[] = {0, 8, 14, 20, 24, 29};
    static const int32_t ids[] = {5, I, 7, 3, 9, 4, 11, 2, 5, I, 7, 3, 9, 6, 5, I, 7, I, 8, 1, 1, 2, 3, 4, I, 3, I, 2, 30};
    static const int32_t labels[] = {N, N, 7, N, 9, 4, 11, 2, N, N, 7, N, 9, 6, N, N, 7, N, 8, N, N, 2, 3, 4, N, 3, N, N, 30};
    static const uint64_t sample[] = {40, 40, 40, 41, 42};
    static const int32_t image[] = {0, 0, 0, 1, 1, 0};
    return (stv_batch_spec){.n_segments = 5,
                            .parent = parent,
                            .begin = begin,
                            .ids = ids,
                            .labels = labels,
                            .sample = sample,
                            .n_image_refs = 6,
                            .image = image,
                            .n_images = 2};
}

static inline real *tiny_pixels(int64_t n_images) { return check_random_reals(n_images * 3 * TINY_IMAGE * TINY_IMAGE, 77); }

/* ---- stopping ------------------------------------------------------------------------------------------------------------ */

/* A poll that stops at asking number *(int64_t *)arg. */
static inline bool tiny_count_down(void *arg) { return --*(int64_t *)arg < 0; }

/* Which askings of a long pass to stop at: the first ones, then every 13th. */
static inline int64_t tiny_next_stop(int64_t n) { return n + (n < 20 ? 1 : 13); }

/* ---- a model, a batch and a run together --------------------------------------------------------------------------------- */

typedef struct tiny {
    stv_context *context;
    stv_model *model;
    stv_batch *batch;
    stv_run *run;
    stv_forward_options options;
    int64_t n_targets;
    double *weight; /* (n_targets): loss = sum of weight * logp */
} tiny;

static inline tiny tiny_open(const stv_model_config *config, const stv_batch_spec *spec, int n_threads, double dropout)
{
    tiny t = {0};
    CHECK_OK(stv_context_create(&t.context, n_threads));
    t.model = tiny_model(t.context, config, dropout);
    tiny_train(t.model, NULL);
    CHECK_OK(stv_batch_create(&t.batch, t.model, spec));
    CHECK_OK(stv_run_create(&t.run, t.model));
    t.options = (stv_forward_options){.pixels = spec->n_images ? tiny_pixels(spec->n_images) : NULL,
                                      .n_images = spec->n_images,
                                      .adapters = true,
                                      .train = true,
                                      .vision_grad = true};
    t.n_targets = stv_batch_get(t.batch).n_targets;
    t.weight = check_new((size_t)t.n_targets * sizeof(double));
    check_fill(t.weight, t.n_targets, 5);
    return t;
}

static inline void tiny_close(tiny *t)
{
    stv_run_free(t->run);
    stv_batch_free(t->batch);
    stv_model_free(t->model);
    stv_context_free(t->context);
}

static inline const double *tiny_forward(tiny *t) { return CHECK_OK(stv_run_forward(t->run, t->batch, &t->options)) ? stv_run_logp(t->run) : NULL; }

static inline double tiny_loss(void *context)
{
    tiny *t = context;
    const double *logp = tiny_forward(t);
    double sum = 0;
    for (int64_t i = 0; logp && i < t->n_targets; i++) sum += t->weight[i] * logp[i];
    return sum;
}

/* One forward and backward; the gradient is copied out, (n_trainable). */
static inline real *tiny_gradient(tiny *t)
{
    CHECK_OK(stv_model_zero_grad(t->model));
    tiny_forward(t);
    CHECK_OK(stv_run_backward(t->run, t->weight));
    return check_copy_reals(stv_model_grad(t->model), stv_model_n_trainable(t->model));
}

#endif
