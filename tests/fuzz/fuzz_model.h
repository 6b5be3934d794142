/* fuzz_model.h - what a configuration or a batch must survive once it was accepted: every call a training and an answering program makes. */
#ifndef STV_TESTS_FUZZ_MODEL_H
#define STV_TESTS_FUZZ_MODEL_H

#include "fuzz.h"

#include <math.h>
#include <string.h>

static inline void *fuzz_new(size_t n, size_t item_bytes)
{
    void *p = calloc(n ? n : 1, item_bytes);
    FUZZ_REQUIRE(p);
    return p;
}

/* Small values of both signs that depend on nothing but their place. */
static inline void fuzz_fill(float *p, int64_t n)
{
    for (int64_t i = 0; i < n; i++) p[i] = (float)((i * 37 + 11) % 41 - 20) / 64;
}

/* Forward and backward, then two tokens of two answers to every sequence. Numbers may overflow, and are then refused. */
static inline void fuzz_compute(stv_model *model, const stv_batch *batch, const stv_forward_options *options)
{
    const stv_batch_view view = stv_batch_get(batch);
    stv_run *run = NULL;
    if (!fuzz_refused(stv_run_create(&run, model)) && !fuzz_refused(stv_run_forward(run, batch, options))) {
        double *dlogp = fuzz_new((size_t)view.n_targets, sizeof *dlogp);
        for (int64_t i = 0; i < view.n_targets; i++) {
            FUZZ_REQUIRE(isfinite(stv_run_logp(run)[i]) && stv_run_logp(run)[i] <= 1e-5);
            dlogp[i] = 1.0 / (double)view.n_targets;
        }
        if (options->train) FUZZ_REQUIRE(!fuzz_refused(stv_run_backward(run, dlogp)));
        free(dlogp);
    }
    stv_run_free(run);

    stv_generator *generator = NULL;
    stv_forward_options answer = *options;
    answer.train = answer.dropout = answer.mean_logit = false;
    const stv_generate_options two = {
        .sampling = {.temperature = 0.7, .top_k = 5, .top_p = 0.9}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = 2};
    if (!fuzz_refused(stv_generator_create(&generator, model, batch, &answer, &two))) {
        const int64_t n = stv_generator_n(generator), vocab_size = stv_model_get_config(model)->decoder.vocab_size;
        int32_t *tokens = fuzz_new((size_t)n, sizeof *tokens);
        FUZZ_REQUIRE(n == 2 * view.n_sequences);
        while (stv_generator_n_active(generator) > 0 && !fuzz_refused(stv_generator_step(generator, tokens, NULL)))
            for (int64_t i = 0; i < n; i++) FUZZ_REQUIRE(tokens[i] >= 0 && tokens[i] < vocab_size);
        free(tokens);
    }
    stv_generator_free(generator);
}

#endif
