/* generate.h - the generator of stllava.h, declared for both precisions; stllava.c picks one by the model's dtype.
 *
 *   create: prompts --(one pass, keys and values kept)--> logits of every continuation
 *   extend: more rows behind those of a single continuation --(the same pass)--> its logits
 *   step:   logits --draw--> one token each --(one pass of all of them)--> logits */
#ifndef STV_INFER_GENERATE_H
#define STV_INFER_GENERATE_H

#include "base/arena.h"
#include "model/door.h"

STV_DECLARE(stv_status, stv_generator_create, stv_generator **out, stv_model *model, const stv_batch *batch, const stv_forward_options *forward,
            const stv_generate_options *options);
STV_DECLARE(void, stv_generator_free, stv_generator *generator);
STV_DECLARE(stv_status, stv_generator_step, stv_generator *generator, int32_t *tokens, double *logp);
STV_DECLARE(int64_t, stv_generator_n_rows, const stv_generator *generator);
STV_DECLARE(stv_status, stv_generator_extend, stv_generator *generator, int64_t n_keep, const stv_batch *batch, const stv_forward_options *forward,
            const stv_generate_options *options);
STV_DECLARE(stv_status, stv_generator_finish, stv_generator *generator, int64_t i);

struct stv_kv_cache; /* one for each precision */
struct stv_llava_pass;

struct stv_generator {
    stv_model *model;
    uint64_t layout; /* of the model at creation */
    stv_sampling sampling;
    double repetition_penalty;
    int64_t max_new_tokens, min_new_tokens;
    stv_forward_options forward; /* theta and adapters go on in every step */
    void *theta;                 /* (n_trainable) copy of forward.theta, owned; NULL: the model's own */
    int64_t n, n_active, n_steps;
    int64_t n_eos;
    int32_t *eos_ids;    /* (n_eos), owned, like all below */
    uint64_t *seeds;     /* (n) */
    bool *finished;      /* (n) */
    int64_t *active;     /* (n) numbers of the unfinished, in order */
    int32_t *next_token; /* (n) of the active, in order */
    double *draw_logp;   /* (n); NaN: logits that are no numbers */
    int32_t *draw_token; /* (n) */
    void *logits;        /* (n,V) real */
    struct stv_kv_cache *cache;
    struct stv_llava_pass *pass;
    stv_arena arena;
};

#endif
