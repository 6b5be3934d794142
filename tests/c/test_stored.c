/* A model whose weights lie in f16, bf16 (and in a model of f64 also f32) against the one whose weights are those values widened: every result has
 * the same bits, whatever is asked of it, at every number of threads and cpu level; and nothing is copied. */
#define _POSIX_C_SOURCE 200809L /* setenv */
#include "check_cpu.h"
#include "check_model.h"

static const stv_dtype narrow[] = {STV_DTYPE_F16, STV_DTYPE_BF16, STV_REAL_BITS == 64 ? STV_DTYPE_F32 : STV_DTYPE_F16, STV_REAL_DTYPE};
enum { N_NARROW = 4 };

/* Towards zero: which of the neighbours it is does not matter here. Below 2^-14 a subnormal. */
static uint16_t narrowed_f16(double value)
{
    int exponent;
    double fraction = frexp(fabs(value), &exponent); /* in [0.5, 1) */
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (exponent < -13) return (uint16_t)(sign | (uint16_t)ldexp(fabs(value), 24));
    return (uint16_t)(sign | (uint16_t)((exponent + 14) << 10) | ((uint16_t)(fraction * 2048) & 1023));
}

static stv_stored narrowed(const real *values, int64_t n, stv_dtype dtype)
{
    void *data = check_new((size_t)n * stv_dtype_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        float single = (float)values[i];
        if (dtype == STV_DTYPE_F16) ((uint16_t *)data)[i] = narrowed_f16((double)values[i]);
        else if (dtype == STV_DTYPE_BF16) memcpy((uint16_t *)data + i, (const char *)&single + 2, 2);
        else if (dtype == STV_REAL_DTYPE) ((real *)data)[i] = values[i];
        else ((float *)data)[i] = single;
    }
    return (stv_stored){data, dtype};
}

/* What tensor number i is bound to. Matrices hold a subnormal, vectors are short. */
static stv_stored stored_values(const stv_tensor_info *info, int64_t i)
{
    real *values = tiny_values(info, 1000 + (uint64_t)i);
    if (info->ndim > 1 && info->size > 1) values[info->size / 2] = (real)3e-7;
    return narrowed(values, info->size, narrow[i % N_NARROW]);
}

static stv_stored widened(stv_stored values, int64_t n)
{
    real *wide = check_reals(n);
    stv_widen(wide, values, n);
    return stv_stored_reals(wide);
}

static bool is_adapter(const stv_tensor_info *info) { return strstr(info->name, ".lora_") != NULL; }
static bool trains(const stv_tensor_info *info) { return is_adapter(info) || strstr(info->name, "mm_projector"); }

static tiny open_one(const stv_model_config *config, const stv_batch_spec *spec, int n_threads, bool wide)
{
    tiny t = {.weight = NULL};
    CHECK_OK(stv_context_create(&t.context, n_threads));
    CHECK_OK(stv_model_create(&t.model, t.context, config, STV_REAL_DTYPE));
    tiny_add_lora(t.model, 0.2);
    for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) {
        stv_tensor_info info = stv_model_tensor(t.model, i);
        stv_stored values = stored_values(&info, i);
        CHECK_OK(stv_model_bind(t.model, info.name, wide ? widened(values, info.size) : values, info.size));
    }
    CHECK_OK(stv_batch_create(&t.batch, t.model, spec));
    CHECK_OK(stv_run_create(&t.run, t.model));
    t.options = (stv_forward_options){
        .pixels = tiny_pixels(2), .n_images = 2, .adapters = true, .train = true, .vision_grad = true, .dropout = true, .mean_logit = true};
    t.n_targets = stv_batch_get(t.batch).n_targets;
    t.weight = check_new((size_t)t.n_targets * sizeof(double));
    check_fill(t.weight, t.n_targets, 5);
    return t;
}

typedef struct results {
    double *logp, *mean_logit;
    real *gradient, *logits, *features, *pooled, *merged, *effective;
    double *merged_logp;
    int64_t n_trainable;
} results;

static double *copy_doubles(const double *from, int64_t n)
{
    double *copy = check_new((size_t)n * sizeof *from);
    return CHECK(from) ? memcpy(copy, from, (size_t)n * sizeof *from) : copy;
}

enum { N_LOGITS = 5, MAX_NEW = 4 };

static results compute(tiny *t)
{
    static const int64_t rows[N_LOGITS] = {0, 3, 4, 9, 17};
    static const char q_proj[] = "model.layers.1.self_attn.q_proj";
    results r = {.n_trainable = stv_model_n_trainable(t->model)};
    CHECK_OK(stv_model_zero_grad(t->model));
    r.logp = copy_doubles(tiny_forward(t), t->n_targets);
    r.mean_logit = copy_doubles(stv_run_mean_logit(t->run), t->n_targets);
    r.logits = check_reals(N_LOGITS * TINY_VOCAB);
    CHECK_OK(stv_run_logits(t->run, rows, N_LOGITS, r.logits));
    CHECK_OK(stv_run_backward(t->run, t->weight));
    r.gradient = check_copy_reals(stv_model_grad(t->model), r.n_trainable);
    CHECK_OK(stv_run_vision_forward(t->run, &t->options, true));
    r.features = check_copy_reals(stv_run_vision_features(t->run), 2 * TINY_T * TINY_E);
    r.pooled = check_copy_reals(stv_run_vision_pooled(t->run), 2 * TINY_E);
    r.effective = check_reals(16 * TINY_D);
    CHECK_OK(stv_model_effective_weight(t->model, q_proj, r.effective));
    CHECK_OK(stv_model_merge_lora(t->model));
    r.merged = check_reals(16 * TINY_D);
    CHECK_OK(stv_model_effective_weight(t->model, q_proj, r.merged));
    t->options.train = t->options.dropout = false;
    r.merged_logp = copy_doubles(tiny_forward(t), t->n_targets);
    t->options.train = t->options.dropout = true;
    CHECK_OK(stv_model_unmerge_lora(t->model));
    return r;
}

static void check_same(const char *what, const tiny *t, const results *a, const results *b)
{
    CHECK_INT(a->n_trainable, b->n_trainable);
    CHECK_SAME_BITS(what, a->logp, b->logp, (size_t)t->n_targets * sizeof(double));
    CHECK_SAME_BITS(what, a->mean_logit, b->mean_logit, (size_t)t->n_targets * sizeof(double));
    CHECK_SAME_BITS(what, a->gradient, b->gradient, (size_t)a->n_trainable * sizeof(real));
    CHECK_SAME_BITS(what, a->logits, b->logits, N_LOGITS * TINY_VOCAB * sizeof(real));
    CHECK_SAME_BITS(what, a->features, b->features, 2 * TINY_T * TINY_E * sizeof(real));
    CHECK_SAME_BITS(what, a->pooled, b->pooled, 2 * TINY_E * sizeof(real));
    CHECK_SAME_BITS(what, a->effective, b->effective, 16 * TINY_D * sizeof(real));
    CHECK_SAME_BITS(what, a->merged, a->effective, 16 * TINY_D * sizeof(real));
    CHECK_SAME_BITS(what, a->merged_logp, b->merged_logp, (size_t)t->n_targets * sizeof(double));
}

/* Adapters train, the gradient passing through frozen weights of all kinds; the projector too; everything. */
static void every_result_has_the_bits_of_widened_weights(void)
{
    static bool (*const subsets[])(const stv_tensor_info *) = {is_adapter, trains, NULL};
    static const char *const names[] = {"adapters train", "adapters and projector train", "all trains"};
    static const int n_threads[] = {1, 2, 4};
    for (int kind = STV_PROJECTOR_MLP; kind <= STV_PROJECTOR_CLUSTER; kind++)
        for (int subset = 0; subset < 3; subset++) {
            stv_model_config config = tiny_config();
            stv_batch_spec spec = tree_spec();
            config.projector.kind = (stv_projector_kind)kind;
            config.projector.depth = kind == STV_PROJECTOR_MLP ? 2 : 0;
            config.decoder.tie_word_embeddings = kind == STV_PROJECTOR_CLUSTER;
            config.vision.select_class = false;
            tiny wide = open_one(&config, &spec, 1, true);
            tiny_train(wide.model, subsets[subset]);
            results want = compute(&wide);
            for (int i = 0; i < 3; i++) {
                tiny t = open_one(&config, &spec, n_threads[i], false);
                tiny_train(t.model, subsets[subset]);
                results got = compute(&t);
                check_same(names[subset], &t, &got, &want);
                if (n_threads[i] == 1) CHECK_INT(stv_run_arena_bytes(t.run), stv_run_arena_bytes(wide.run));
                tiny_close(&t);
            }
            tiny_close(&wide);
            check_release_buffers();
        }
}

/* The rows of a sequence do not know what else is in the batch. */
static void alone_or_in_a_tree(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec tree = tree_spec(), flat = flat_spec();
    tiny wide = open_one(&config, &tree, 1, true), t = open_one(&config, &flat, 2, false);
    wide.options.dropout = t.options.dropout = false;
    CHECK_INT(t.n_targets, wide.n_targets);
    CHECK_SAME_BITS("flat and tree", tiny_forward(&t), tiny_forward(&wide), (size_t)t.n_targets * sizeof(double));
    tiny_close(&t);
    tiny_close(&wide);
}

static void generation(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    spec.labels = NULL;
    int32_t tokens[2][MAX_NEW * 10];
    double logp[2][MAX_NEW * 10];
    for (int wide = 0; wide < 2; wide++) {
        tiny t = open_one(&config, &spec, 1 + wide, wide);
        t.options.train = t.options.mean_logit = false;
        stv_generate_options options = {
            .sampling = {.temperature = 1, .top_p = 0.9}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
        stv_generator *generator = NULL;
        if (!CHECK_OK(stv_generator_create(&generator, t.model, t.batch, &t.options, &options))) return;
        CHECK_INT(stv_generator_n(generator), 10);
        for (int step = 0; step < MAX_NEW; step++) CHECK_OK(stv_generator_step(generator, tokens[wide] + step * 10, logp[wide] + step * 10));
        stv_generator_free(generator);
        tiny_close(&t);
    }
    CHECK_SAME_BITS("tokens", tokens[0], tokens[1], sizeof tokens[0]);
    CHECK_SAME_BITS("log-probs", logp[0], logp[1], sizeof logp[0]);
}

/* ---- memory -------------------------------------------------------------------------------------------------------------- */

static void bound_as_they_lie(void)
{
    stv_model_config config = tiny_config();
    stv_context *context;
    stv_model *model;
    CHECK_OK(stv_context_create(&context, 1));
    CHECK_OK(stv_model_create(&model, context, &config, STV_REAL_DTYPE));
    uint64_t before = stv_allocations();
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        stv_tensor_info info = stv_model_tensor(model, i);
        CHECK(info.dtype == STV_REAL_DTYPE && !info.data);
        stv_stored values = stored_values(&info, i);
        CHECK_OK(stv_model_bind(model, info.name, values, info.size));
        info = stv_model_tensor(model, i);
        CHECK(info.data == values.data && info.dtype == narrow[i % N_NARROW]);
    }
    CHECK_INT(stv_allocations(), before);

    /* What trains becomes real, keeps its values, and stays real when it trains no longer. */
    static const char *const norm = "model.norm.weight";
    stv_tensor_info info = stv_model_tensor(model, stv_model_find(model, norm));
    stv_stored values = narrowed(tiny_values(&info, 3), info.size, STV_DTYPE_BF16), wide = widened(values, info.size);
    CHECK_OK(stv_model_bind(model, norm, values, info.size));
    CHECK_OK(stv_model_set_trainable(model, &norm, 1));
    for (int frozen = 0; frozen < 2; frozen++) {
        info = stv_model_tensor(model, stv_model_find(model, norm));
        CHECK_INT(info.dtype, STV_REAL_DTYPE);
        CHECK_SAME_BITS("norm", info.data, wide.data, TINY_D * sizeof(real));
        CHECK_OK(stv_model_set_trainable(model, NULL, 0));
    }
    /* A trainable tensor takes narrow values into the flat buffer. */
    CHECK_OK(stv_model_set_trainable(model, &norm, 1));
    values = narrowed(tiny_values(&info, 4), info.size, STV_DTYPE_F16);
    CHECK_OK(stv_model_bind(model, norm, values, info.size));
    CHECK_SAME_BITS("theta", stv_model_theta(model), widened(values, info.size).data, TINY_D * sizeof(real));
    stv_model_free(model);
    stv_context_free(context);
}

/* The arena of a forward is enough for the backward of the same values in another precision, and a steady step allocates nothing. */
static void bound_anew_between_forward_and_backward(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = tree_spec();
    tiny wide = open_one(&config, &spec, 1, true), t = open_one(&config, &spec, 1, true);
    tiny_train(wide.model, trains);
    tiny_train(t.model, trains);
    real *want = tiny_gradient(&wide);
    CHECK_OK(stv_model_zero_grad(t.model));
    tiny_forward(&t);
    for (int64_t i = 0; i < stv_model_n_tensors(t.model); i++) {
        stv_tensor_info info = stv_model_tensor(t.model, i);
        if (info.offset < 0) CHECK_OK(stv_model_bind(t.model, info.name, stored_values(&info, i), info.size));
    }
    uint64_t before = stv_allocations();
    CHECK_OK(stv_run_backward(t.run, t.weight));
    CHECK_SAME_BITS("gradient", stv_model_grad(t.model), want, (size_t)stv_model_n_trainable(t.model) * sizeof(real));
    tiny_forward(&t);
    CHECK_OK(stv_run_backward(t.run, t.weight));
    CHECK_INT(stv_allocations(), before);
    tiny_close(&t);
    tiny_close(&wide);
}

/* ---- bad input ----------------------------------------------------------------------------------------------------------- */

static void refused(void)
{
    stv_model_config config = tiny_config();
    stv_context *context;
    stv_model *model;
    const double values[TINY_D] = {0};
    CHECK_OK(stv_context_create(&context, 1));
    CHECK_OK(stv_model_create(&model, context, &config, STV_REAL_DTYPE));
    if (STV_REAL_BITS == 32)
        CHECK_ERROR(stv_model_bind(model, "model.norm.weight", (stv_stored){values, STV_DTYPE_F64}, TINY_D), STV_ERR_DTYPE,
                    "\"model.norm.weight\": f64 values in a model of f32, want f32, f16 or bf16");
    CHECK_ERROR(stv_model_bind(model, "model.norm.weight", (stv_stored){values, (stv_dtype)77}, TINY_D), STV_ERR_DTYPE, "unknown values");
    CHECK_ERROR(stv_model_bind(model, "model.norm.weight", (stv_stored){values, STV_DTYPE_F16}, TINY_D + 1), STV_ERR_SHAPE, "13 elements");
    stv_model *half = NULL;
    CHECK_ERROR(stv_model_create(&half, context, &config, STV_DTYPE_BF16), STV_ERR_DTYPE, "want f32 or f64");
    stv_model_free(model);
    stv_context_free(context);
}

static void nan_is_noticed(void)
{
    static const char *const names[] = {"lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight",
                                        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias"};
    stv_model_config config = tiny_config();
    config.decoder.tie_word_embeddings = false;
    stv_batch_spec spec = tree_spec();
    for (int i = 0; i < 4; i++)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            tiny t = open_one(&config, &spec, 1, false);
            t.options.train = false;
            tiny_forward(&t);
            stv_tensor_info info = stv_model_tensor(t.model, stv_model_find(t.model, names[i]));
            stv_stored values = narrowed(tiny_values(&info, 9), info.size, bf16 ? STV_DTYPE_BF16 : STV_DTYPE_F16);
            ((uint16_t *)(void *)values.data)[info.size - 1] = bf16 ? 0x7FC0 : 0x7E00;
            CHECK_OK(stv_model_bind(t.model, names[i], values, info.size));
            CHECK_ERROR(stv_run_forward(t.run, t.batch, &t.options), STV_ERR_NUMERIC, "NaN or Inf");
            tiny_close(&t);
        }
}

static void lower_cpu_levels(void) { check_lower_cpu_levels(); }

static const check_case cases[] = {
    {"every result has the bits of widened weights", every_result_has_the_bits_of_widened_weights},
    {"alone or in a tree", alone_or_in_a_tree},
    {"generation", generation},
    {"bound as they lie", bound_as_they_lie},
    {"bound anew between forward and backward", bound_anew_between_forward_and_backward},
    {"refused", refused},
    {"nan is noticed", nan_is_noticed},
    {"lower cpu levels", lower_cpu_levels},
};

int main(int argc, char **argv)
{
    check_program = argv[0];
    return CHECK_RUN(cases);
}
