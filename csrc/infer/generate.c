#include "infer/generate.h"

#include "base/rng.h"
#include "base/watch.h"
#include "infer/kv_cache.h"
#include "infer/sampler.h"
#include "model/llava.h"
#include "ops/gemm.h"
#include "ops/rows.h"

#include <math.h>
#include <string.h>

/* ---- one step ------------------------------------------------------------------------------------------------------------ */

static void list_active(stv_generator *g)
{
    g->n_active = 0;
    for (int64_t i = 0; i < g->n; i++)
        if (!g->finished[i]) g->active[g->n_active++] = i;
}

/* Logits (n,V) of a stream (n,D), in the arena. */
static real *logits_of(stv_exec *x, const stv_generator *g, const real *stream, int64_t n)
{
    const stv_decoder_config *c = &g->model->config.decoder;
    stv_decoder_head head = {.n = n};
    stv_decoder_head_forward(x, &head, &g->pass->weights, stream);
    real *logits = stv_reals(x, n, c->vocab_size);
    stv_matmul_nt_stored(x, logits, head.h, stv_weight(&g->pass->weights, g->model->decoder.head), n, c->vocab_size, c->hidden_size, false);
    return logits;
}

/* All active continuations, one row each, through the same layers as any other pass. */
static void decode(stv_exec *x, void *context)
{
    stv_generator *g = context;
    const stv_decoder_config *c = &g->model->config.decoder;
    stv_decoder_pass *pass = &g->pass->decoder;
    int64_t n = g->n_active, V = c->vocab_size;
    pass->n_rows = n;
    pass->position = g->cache->position;
    pass->plan = &g->cache->plan;
    pass->out_row = NULL;
    real *in = stv_reals(x, n, c->hidden_size);
    stv_splice_forward(x, in, stv_weight(pass->weights, g->model->decoder.embed), NULL, g->next_token, NULL, n, c->hidden_size);
    const real *stream = stv_decoder_forward(x, pass, in);
    const real *logits = logits_of(x, g, stream, n);
    if (stv_measuring(x) || stv_stopped()) return; /* then the logits before stay, and the step can be taken again */
    for (int64_t i = 0; i < n; i++) memcpy((real *)g->logits + g->active[i] * V, logits + i * V, (size_t)V * sizeof(real));
}

static void penalise(const stv_generator *g, double *logits, const real *from, stv_span rows)
{
    for (int64_t row = rows.row; row < rows.row + rows.count; row++) {
        int32_t token = g->cache->token[row];
        if (token < 0) continue;
        double logit = (double)from[token]; /* not of `logits`: once, however often the token was there */
        logits[token] = logit < 0 ? logit * g->repetition_penalty : logit / g->repetition_penalty;
    }
}

/* What depends on the tokens before, in transformers' order; see its RepetitionPenaltyLogitsProcessor and MinNewTokensLengthLogitsProcessor. */
static void adjust(const stv_generator *g, int64_t i, double *logits, const real *from)
{
    const stv_kv_cache *cache = g->cache;
    stv_attn_segment path = cache->path[i / cache->n_per_sequence];
    if (g->repetition_penalty != 1) {
        for (int64_t s = 0; s < path.n_spans; s++) penalise(g, logits, from, cache->path_spans[path.i_span + s]);
        penalise(g, logits, from, (stv_span){cache->n_prompt_rows + i * cache->max_new, cache->length[i]});
    }
    for (int64_t e = 0; e < g->n_eos && g->n_steps < g->min_new_tokens; e++)
        if (g->eos_ids[e] >= 0 && g->eos_ids[e] < g->model->config.decoder.vocab_size) logits[g->eos_ids[e]] = -(double)INFINITY;
}

typedef struct draw_args {
    stv_generator *g;
    double *logits, *probabilities; /* (workers,V) */
    int32_t *order;                 /* (workers,V) */
} draw_args;

static void draw(void *arg, int64_t i_task, int i_worker)
{
    draw_args *a = arg;
    stv_generator *g = a->g;
    int64_t V = g->model->config.decoder.vocab_size, i = g->active[i_task];
    const real *from = (const real *)g->logits + i * V;
    double *logits = a->logits + i_worker * V, *probabilities = a->probabilities + i_worker * V, sum = 0;
    int64_t best = 0;
    for (int64_t v = 0; v < V; v++) {
        logits[v] = (double)from[v];
        if (logits[v] > logits[best]) best = v;
    }
    for (int64_t v = 0; v < V; v++) sum += exp(logits[v] - logits[best]);
    double lse = logits[best] + log(sum);
    int32_t token = (int32_t)best;
    bool adjusts = g->repetition_penalty != 1 || g->n_steps < g->min_new_tokens;
    if ((g->sampling.temperature > 0 || adjusts) && isfinite(sum)) {
        adjust(g, i, logits, from);
        stv_sampling_filter(probabilities, a->order + i_worker * V, logits, V, &g->sampling);
        token = stv_sample_token(probabilities, V, stv_rng_uniform(g->seeds[i], STV_RNG_SAMPLE, (uint64_t)g->n_steps, 0));
    }
    g->draw_token[i_task] = token;
    g->draw_logp[i_task] = (double)from[token] - lse;
}

static void draw_all(stv_exec *x, void *context)
{
    stv_generator *g = context;
    size_t n = (size_t)stv_pool_n_threads(x->pool) * (size_t)g->model->config.decoder.vocab_size;
    draw_args args = {g, stv_arena_alloc(x->arena, n * sizeof(double)), stv_arena_alloc(x->arena, n * sizeof(double)),
                      stv_arena_alloc(x->arena, n * sizeof(int32_t))};
    if (!stv_measuring(x)) stv_pool_run(x->pool, g->n_active, draw, &args);
}

static stv_status in_arena(stv_generator *g, stv_exec_body *body) { return stv_exec_run(g->model->context->pool, &g->arena, body, g, "generator"); }

static bool ends(const stv_generator *g, int32_t token)
{
    for (int64_t e = 0; e < g->n_eos; e++)
        if (g->eos_ids[e] == token) return true;
    return false;
}

/* Stopped, or without memory to decode (there are more threads than before, each with scratch of its own), nothing was drawn: the next step
 * draws the same. */
static stv_status undo_draw(stv_generator *g, const int32_t *tokens, stv_status status)
{
    g->n_steps--;
    for (int64_t i = 0; i < g->n; i++)
        if (tokens[i] >= 0) g->finished[i] = false;
    list_active(g);
    return status;
}

stv_status STV_TYPED(stv_generator_step)(stv_generator *g, int32_t *tokens, double *logp)
{
    if (g->layout != g->model->layout) return stv_fail(STV_ERR_STATE, "generator: what trains or is merged has changed since its creation");
    STV_TRY(in_arena(g, draw_all));
    for (int64_t i = 0; i < g->n_active; i++)
        if (!isfinite(g->draw_logp[i]))
            return stv_fail(STV_ERR_NUMERIC, "generator: the logits of continuation %lld, token %lld hold NaN or Inf", (long long)g->active[i],
                            (long long)g->n_steps);
    for (int64_t i = 0; i < g->n; i++) tokens[i] = -1;
    for (int64_t i = 0; logp && i < g->n; i++) logp[i] = 0;
    g->n_steps++;
    for (int64_t i = 0; i < g->n_active; i++) {
        int64_t number = g->active[i];
        tokens[number] = g->draw_token[i];
        if (logp) logp[number] = g->draw_logp[i];
        g->finished[number] = ends(g, g->draw_token[i]) || g->n_steps == g->max_new_tokens;
    }
    list_active(g);
    for (int64_t i = 0; i < g->n_active; i++) g->next_token[i] = tokens[g->active[i]];
    if (g->n_active == 0) return STV_OK;
    stv_kv_cache_plan(g->cache, g->active, g->n_active);
    stv_status status = in_arena(g, decode);
    if (status != STV_OK) return undo_draw(g, tokens, status);
    for (int64_t i = 0; i < g->n_active; i++) {
        g->cache->token[g->cache->row[i]] = (int32_t)g->next_token[i];
        g->cache->length[g->active[i]]++;
    }
    return STV_OK;
}

stv_status STV_TYPED(stv_generator_finish)(stv_generator *g, int64_t i)
{
    if (i < 0 || i >= g->n) return stv_fail(STV_ERR_ARGUMENT, "generator: continuation %lld, want 0..%lld", (long long)i, (long long)g->n - 1);
    g->finished[i] = true;
    list_active(g);
    return STV_OK;
}

/* ---- creation ------------------------------------------------------------------------------------------------------------ */

static stv_status check(const stv_model *model, const stv_batch *batch, const stv_forward_options *forward, const stv_generate_options *o)
{
    STV_TRY(stv_inputs_check(model, batch, forward));
    STV_TRY(stv_sampling_check(&o->sampling));
    if (o->n_per_sequence < 1 || o->n_per_sequence > 1 << 20)
        return stv_fail(STV_ERR_ARGUMENT, "generator: n_per_sequence is %lld, want 1..%d", (long long)o->n_per_sequence, 1 << 20);
    if (o->max_new_tokens < 1 || o->max_new_tokens > 1 << 24)
        return stv_fail(STV_ERR_ARGUMENT, "generator: max_new_tokens is %lld, want 1..%d", (long long)o->max_new_tokens, 1 << 24);
    if (o->min_new_tokens < 0) return stv_fail(STV_ERR_ARGUMENT, "generator: min_new_tokens is %lld, want at least 0", (long long)o->min_new_tokens);
    if (!(o->repetition_penalty > 0) || !isfinite(o->repetition_penalty))
        return stv_fail(STV_ERR_ARGUMENT, "generator: repetition_penalty is %g, want a finite number > 0 (1: off)", o->repetition_penalty);
    if (o->n_eos < 0 || (o->n_eos > 0 && !o->eos_ids))
        return stv_fail(STV_ERR_ARGUMENT, "generator: %lld eos ids, but none given", (long long)o->n_eos);
    for (int64_t q = 0; q < batch->view.n_sequences; q++)
        if (batch->sequence_last_row[q] < 0) return stv_fail(STV_ERR_ARGUMENT, "generator: sequence %lld has no tokens to continue", (long long)q);
    return STV_OK;
}

static bool allocate(stv_generator *g)
{
    size_t n = (size_t)g->n, size;
    if (!stv_size_mul(&size, n * sizeof(real), (size_t)g->model->config.decoder.vocab_size)) return false;
    g->seeds = stv_alloc(n * sizeof *g->seeds);
    g->finished = stv_alloc_zero(n * sizeof *g->finished);
    g->active = stv_alloc(n * sizeof *g->active);
    g->next_token = stv_alloc_zero(n * sizeof *g->next_token);
    g->draw_logp = stv_alloc(n * sizeof *g->draw_logp);
    g->draw_token = stv_alloc(n * sizeof *g->draw_token);
    g->logits = stv_alloc(size);
    if (g->forward.theta) {
        size_t theta_bytes = (size_t)g->model->n_trainable * sizeof(real);
        g->theta = stv_alloc(theta_bytes);
        if (!g->theta) return false;
        g->forward.theta = memcpy(g->theta, g->forward.theta, theta_bytes);
    }
    g->cache = stv_alloc_zero(sizeof *g->cache);
    return g->seeds && g->finished && g->active && g->next_token && g->draw_logp && g->draw_token && g->logits && g->cache;
}

static void prefill(stv_exec *x, void *context)
{
    stv_generator *g = context;
    const stv_batch *batch = g->pass->batch;
    int64_t V = g->model->config.decoder.vocab_size, n_sequences = batch->view.n_sequences;
    g->pass->decoder.out_row = batch->sequence_last_row;
    g->pass->decoder.n_out = n_sequences;
    stv_llava_rows(x, g->pass);
    const real *logits = logits_of(x, g, g->pass->stream, n_sequences);
    if (stv_measuring(x)) return;
    for (int64_t i = 0; i < g->n; i++) memcpy((real *)g->logits + i * V, logits + i / g->cache->n_per_sequence * V, (size_t)V * sizeof(real));
}

/* Takes over what an answer is drawn with. Errors: memory (nothing has changed). */
static stv_status set_options(stv_generator *g, const stv_generate_options *o)
{
    int32_t *eos_ids = stv_alloc((size_t)o->n_eos * sizeof *eos_ids);
    if (!eos_ids) return stv_fail(STV_ERR_MEMORY, "generator: no memory for %lld eos ids", (long long)o->n_eos);
    if (o->n_eos > 0) memcpy(eos_ids, o->eos_ids, (size_t)o->n_eos * sizeof *eos_ids);
    stv_free(g->eos_ids);
    g->eos_ids = eos_ids;
    g->n_eos = o->n_eos;
    for (int64_t i = 0; i < g->n; i++) g->seeds[i] = o->seeds ? o->seeds[i] : (uint64_t)i;
    g->sampling = o->sampling;
    g->repetition_penalty = o->repetition_penalty;
    g->max_new_tokens = o->max_new_tokens;
    g->min_new_tokens = o->min_new_tokens;
    g->n_steps = 0;
    return STV_OK;
}

/* The arena at its largest: every continuation alive, at its last token. */
static stv_status reserve_steps(stv_generator *g)
{
    stv_arena measuring;
    stv_arena_init_measuring(&measuring);
    stv_exec x = {g->model->context->pool, &measuring};
    for (int64_t i = 0; i < g->n; i++) g->cache->length[i] = g->max_new_tokens - 1;
    stv_kv_cache_plan(g->cache, g->active, g->n);
    decode(&x, g);
    stv_arena_release(&measuring, 0);
    draw_all(&x, g);
    for (int64_t i = 0; i < g->n; i++) g->cache->length[i] = 0;
    stv_arena_free(&g->arena); /* the prompts' activations */
    return stv_arena_reserve(&g->arena, measuring.peak);
}

static stv_status start(stv_generator *g, const stv_batch *batch, const stv_generate_options *o)
{
    if (!allocate(g)) return stv_fail(STV_ERR_MEMORY, "generator: no memory for %lld continuations", (long long)g->n);
    STV_TRY(set_options(g, o));
    list_active(g);
    STV_TRY(stv_kv_cache_create(g->cache, g->model, batch, o->n_per_sequence, o->max_new_tokens));
    STV_TRY(stv_llava_create(&g->pass, g->model));
    STV_TRY(stv_llava_init(g->pass, batch, &g->forward));
    g->pass->decoder.cache = &g->cache->rows;
    STV_TRY(in_arena(g, prefill));
    return reserve_steps(g);
}

stv_status STV_TYPED(stv_generator_create)(stv_generator **out, stv_model *model, const stv_batch *batch, const stv_forward_options *forward,
                                           const stv_generate_options *options)
{
    *out = NULL;
    stv_forward_options only = {.pixels = forward->pixels,
                                .features = forward->features,
                                .n_images = forward->n_images,
                                .theta = forward->theta,
                                .adapters = forward->adapters};
    STV_TRY(check(model, batch, &only, options));
    stv_generator *g = stv_alloc_zero(sizeof *g);
    if (!g) return stv_fail(STV_ERR_MEMORY, "no memory for a generator");
    model->n_users++;
    g->model = model;
    g->layout = model->layout;
    g->forward = only;
    g->n = batch->view.n_sequences * options->n_per_sequence;
    stv_status status = start(g, batch, options);
    if (status == STV_OK) *out = g;
    else STV_TYPED(stv_generator_free)(g);
    return status;
}

/* ---- more rows ------------------------------------------------------------------------------------------------------------ */

int64_t STV_TYPED(stv_generator_n_rows)(const stv_generator *g)
{
    int64_t n = g->cache->n_prompt_rows;
    for (int64_t i = 0; i < g->n; i++) n += g->cache->length[i];
    return n;
}

static void prefill_more(stv_exec *x, void *context)
{
    stv_generator *g = context;
    stv_decoder_pass *pass = &g->pass->decoder;
    int64_t n = g->pass->batch->view.n_rows;
    int64_t *row = stv_arena_alloc(x->arena, (size_t)n * sizeof *row);
    int32_t *position = stv_arena_alloc(x->arena, (size_t)n * sizeof *position);
    for (int64_t i = 0; i < n && !stv_measuring(x); i++) {
        row[i] = g->cache->n_prompt_rows + i;
        position[i] = (int32_t)row[i];
    }
    g->cache->rows.row = row;
    pass->position = position;
    pass->plan = &g->cache->plan;
    prefill(x, g);
}

static stv_status check_more(const stv_generator *g, int64_t n_keep, const stv_batch *batch, const stv_forward_options *forward,
                             const stv_generate_options *o)
{
    if (g->layout != g->model->layout) return stv_fail(STV_ERR_STATE, "generator: what trains or is merged has changed since its creation");
    STV_TRY(check(g->model, batch, forward, o));
    if (g->n != 1 || batch->view.n_sequences != 1 || o->n_per_sequence != 1)
        return stv_fail(STV_ERR_ARGUMENT, "generator: to extend, want 1 continuation, 1 sequence and n_per_sequence 1, got %lld, %lld and %lld",
                        (long long)g->n, (long long)batch->view.n_sequences, (long long)o->n_per_sequence);
    int64_t n_rows = STV_TYPED(stv_generator_n_rows)(g);
    if (n_keep < 0 || n_keep > n_rows)
        return stv_fail(STV_ERR_ARGUMENT, "generator: n_keep is %lld, want 0..%lld, the rows there are", (long long)n_keep, (long long)n_rows);
    return STV_OK;
}

stv_status STV_TYPED(stv_generator_extend)(stv_generator *g, int64_t n_keep, const stv_batch *batch, const stv_forward_options *forward,
                                           const stv_generate_options *options)
{
    const stv_batch_view *view = &batch->view;
    stv_forward_options whole = g->forward; /* theta and adapters */
    whole.pixels = forward->pixels;
    whole.features = forward->features;
    whole.n_images = forward->n_images;
    STV_TRY(check_more(g, n_keep, batch, &whole, options));
    STV_TRY(stv_kv_cache_grow(g->cache, g->model, n_keep + view->n_rows + options->max_new_tokens, n_keep));
    stv_kv_cache_reset(g->cache, n_keep);
    g->finished[0] = true;
    list_active(g);
    STV_TRY(set_options(g, options));
    STV_TRY(stv_llava_init(g->pass, batch, &whole));
    g->pass->decoder.cache = &g->cache->rows;
    g->cache->max_new = options->max_new_tokens;
    stv_kv_cache_plan_more(g->cache, view->n_rows);
    STV_TRY(in_arena(g, prefill_more));
    memcpy(g->cache->token + n_keep, view->row_token, (size_t)view->n_rows * sizeof *view->row_token);
    stv_kv_cache_reset(g->cache, n_keep + view->n_rows);
    g->finished[0] = false;
    list_active(g);
    stv_status status = reserve_steps(g);
    if (status == STV_OK) return STV_OK;
    stv_kv_cache_reset(g->cache, n_keep);
    g->finished[0] = true;
    list_active(g);
    return status;
}

void STV_TYPED(stv_generator_free)(stv_generator *g)
{
    g->model->n_users--;
    if (g->cache) stv_kv_cache_free(g->cache);
    stv_llava_free(g->pass);
    stv_arena_free(&g->arena);
    stv_free(g->cache);
    stv_free(g->eos_ids);
    stv_free(g->seeds);
    stv_free(g->finished);
    stv_free(g->active);
    stv_free(g->next_token);
    stv_free(g->draw_logp);
    stv_free(g->draw_token);
    stv_free(g->logits);
    stv_free(g->theta);
    stv_free(g);
}
