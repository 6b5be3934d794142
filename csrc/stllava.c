/* stllava.c - the public door: contexts, what was built, and the choice of the precision. Doors that do not compute live where their objects do
 * (model/params.c, model/batch.c, train/preference.c, image/). */
#include "stllava.h"

#include "ops/gemm_blas.h"

#include "base/alloc.h"
#include "base/cpu.h"
#include "base/rng.h"
#include "infer/generate.h"
#include "model/params.h"
#include "model/run.h"
#include "train/step.h"

#ifndef STV_VERSION
#define STV_VERSION "unversioned" /* the C tests build without the package */
#endif

/* name_f32(...) or name_f64(...) */
#define BY_DTYPE(model, name, ...) ((model)->dtype == STV_DTYPE_F64 ? name##_f64(__VA_ARGS__) : name##_f32(__VA_ARGS__))

/* ---- context ------------------------------------------------------------------------------------------------------------- */

stv_status stv_context_create(stv_context **out, int n_threads)
{
    *out = NULL;
    stv_context *context = stv_alloc_zero(sizeof *context);
    if (!context) return stv_fail(STV_ERR_MEMORY, "no memory for a context");
    stv_status status = stv_pool_create(&context->pool, n_threads);
    if (status == STV_OK) *out = context;
    else stv_free(context);
    return status;
}

void stv_context_free(stv_context *context)
{
    if (!context) return;
    stv_pool_free(context->pool);
    stv_free(context);
}

int stv_context_n_threads(const stv_context *context) { return stv_pool_n_threads(context->pool); }

stv_status stv_context_set_n_threads(stv_context *context, int n_threads) { return stv_pool_resize(context->pool, n_threads); }

stv_build_info stv_get_build_info(void)
{
    stv_build_info info = {.version = STV_VERSION, .blas = stv_gemm_blas_name(), .cpu_level = stv_cpu_level_name(stv_cpu())};
#ifdef STV_HAVE_STB
    info.stb_image = true;
#endif
#ifdef STV_DEBUG
    info.debug = true;
#endif
#ifdef STV_SANITIZERS
    info.sanitizers = true;
#endif
    return info;
}

uint64_t stv_allocations(void) { return stv_alloc_count(); }

uint64_t stv_allocations_live(void) { return stv_alloc_live(); }

void stv_allocations_fail_at(uint64_t n, bool forever) { stv_alloc_fail_at(n, forever); }

/* ---- model --------------------------------------------------------------------------------------------------------------- */

stv_status stv_model_merge_lora(stv_model *model) { return BY_DTYPE(model, stv_model_merge_lora, model); }

stv_status stv_model_effective_weight(stv_model *model, const char *module, void *fills)
{
    return BY_DTYPE(model, stv_model_effective_weight, model, module, fills);
}

/* ---- run ----------------------------------------------------------------------------------------------------------------- */

stv_status stv_run_create(stv_run **out, stv_model *model) { return BY_DTYPE(model, stv_run_create, out, model); }

void stv_run_free(stv_run *run)
{
    if (run) BY_DTYPE(run->model, stv_run_free, run);
}

stv_status stv_run_set_recompute(stv_run *run, int64_t n_vision_layers, int64_t n_decoder_layers)
{
    if (n_vision_layers < 0 || n_decoder_layers < 0)
        return stv_fail(STV_ERR_ARGUMENT, "set_recompute: %lld and %lld layers, want 0 or more", (long long)n_vision_layers,
                        (long long)n_decoder_layers);
    run->n_vision_recompute = n_vision_layers;
    run->n_decoder_recompute = n_decoder_layers;
    return STV_OK;
}

stv_status stv_run_forward(stv_run *run, const stv_batch *batch, const stv_forward_options *options)
{
    return BY_DTYPE(run->model, stv_run_forward, run, batch, options);
}

const double *stv_run_logp(const stv_run *run) { return run->logp; }

const double *stv_run_mean_logit(const stv_run *run) { return run->mean_logit; }

const void *stv_run_features(const stv_run *run) { return run->features; }

const void *stv_run_embeddings(const stv_run *run) { return run->embeddings; }

stv_status stv_run_logits(stv_run *run, const int64_t *rows, int64_t n, void *out) { return BY_DTYPE(run->model, stv_run_logits, run, rows, n, out); }

stv_status stv_run_backward(stv_run *run, const double *dlogp) { return BY_DTYPE(run->model, stv_run_backward, run, dlogp); }

stv_status stv_run_estimate(stv_run *run, const stv_batch *batch, const stv_forward_options *options, size_t *bytes)
{
    return BY_DTYPE(run->model, stv_run_estimate, run, batch, options, bytes);
}

size_t stv_run_arena_bytes(const stv_run *run) { return run->arena.capacity; }

stv_status stv_run_vision_forward(stv_run *run, const stv_forward_options *options, bool all_layers)
{
    return BY_DTYPE(run->model, stv_run_vision_forward, run, options, all_layers);
}

const void *stv_run_vision_features(const stv_run *run) { return run->vision_features; }

const void *stv_run_vision_hidden(const stv_run *run, int64_t i) { return BY_DTYPE(run->model, stv_run_vision_hidden, run, i); }

const void *stv_run_vision_pooled(const stv_run *run) { return run->vision_pooled; }

stv_status stv_run_vision_backward(stv_run *run, const void *dfeatures) { return BY_DTYPE(run->model, stv_run_vision_backward, run, dfeatures); }

stv_status stv_run_projector_forward(stv_run *run, const void *in, int64_t n_images, int64_t n_tokens, const stv_forward_options *options)
{
    return BY_DTYPE(run->model, stv_run_projector_forward, run, in, n_images, n_tokens, options);
}

const void *stv_run_projector_output(const stv_run *run) { return run->projector_output; }

const int32_t *stv_run_cluster_assignment(const stv_run *run) { return run->cluster_assignment; }

const double *stv_run_cluster_margin(const stv_run *run) { return run->cluster_margin; }

stv_status stv_run_projector_backward(stv_run *run, const void *dout, void *din)
{
    return BY_DTYPE(run->model, stv_run_projector_backward, run, dout, din);
}

stv_status stv_run_encode(stv_run *run, const stv_forward_options *options, void *features)
{
    return BY_DTYPE(run->model, stv_run_encode, run, options, features);
}

/* ---- training ------------------------------------------------------------------------------------------------------------ */

stv_status stv_adamw_step(stv_model *model, void *m, void *v, const stv_adamw_range *ranges, int64_t n_ranges, const stv_adamw_config *config)
{
    return BY_DTYPE(model, stv_adamw_step, model, m, v, ranges, n_ranges, config);
}

stv_status stv_grad_norm(stv_model *model, const stv_adamw_range *ranges, int64_t n_ranges, double *norm)
{
    return BY_DTYPE(model, stv_grad_norm, model, ranges, n_ranges, norm);
}

/* ---- generation ---------------------------------------------------------------------------------------------------------- */

stv_status stv_generator_create(stv_generator **out, stv_model *model, const stv_batch *batch, const stv_forward_options *forward,
                                const stv_generate_options *options)
{
    return BY_DTYPE(model, stv_generator_create, out, model, batch, forward, options);
}

void stv_generator_free(stv_generator *generator)
{
    if (generator) BY_DTYPE(generator->model, stv_generator_free, generator);
}

int64_t stv_generator_n(const stv_generator *generator) { return generator->n; }

int64_t stv_generator_n_active(const stv_generator *generator) { return generator->n_active; }

const void *stv_generator_logits(const stv_generator *generator) { return generator->logits; }

stv_status stv_generator_step(stv_generator *generator, int32_t *tokens, double *logp)
{
    return BY_DTYPE(generator->model, stv_generator_step, generator, tokens, logp);
}

int64_t stv_generator_n_rows(const stv_generator *generator) { return BY_DTYPE(generator->model, stv_generator_n_rows, generator); }

stv_status stv_generator_extend(stv_generator *generator, int64_t n_keep, const stv_batch *batch, const stv_forward_options *forward,
                                const stv_generate_options *options)
{
    return BY_DTYPE(generator->model, stv_generator_extend, generator, n_keep, batch, forward, options);
}

stv_status stv_generator_finish(stv_generator *generator, int64_t i) { return BY_DTYPE(generator->model, stv_generator_finish, generator, i); }

/* ---- randomness ---------------------------------------------------------------------------------------------------------- */

void stv_fill_uniform(void *out, int64_t n, stv_dtype dtype, double low, double high, uint64_t seed, uint64_t stream)
{
    if (dtype == STV_DTYPE_F64) stv_rng_fill_uniform_f64(out, n, low, high, seed, stream);
    else stv_rng_fill_uniform_f32(out, n, low, high, seed, stream);
}
