/* The generator against the training forward: the cache must not change a bit. Then its rules: seeds, end tokens, finishing, memory. */
#include "base/rng.h"
#include "check_model.h"
#include "infer/sampler.h"

enum { MAX_NEW = 6 };

static stv_batch_spec prompts(void)
{
    stv_batch_spec spec = tree_spec();
    spec.labels = NULL;
    return spec;
}

static tiny open_tiny(void)
{
    stv_model_config config = tiny_config();
    stv_batch_spec spec = prompts();
    tiny t = tiny_open(&config, &spec, 2, 0);
    t.options.train = false;
    return t;
}

static stv_generator *open_generator(tiny *t, const stv_generate_options *options)
{
    stv_generator *generator = NULL;
    CHECK_OK(stv_generator_create(&generator, t->model, t->batch, &t->options, options));
    return generator;
}

/* All tokens (MAX_NEW, n); -1 where finished before. Returns the number of steps. */
static int run_to_end(stv_generator *generator, int32_t *tokens)
{
    int64_t n = stv_generator_n(generator);
    int n_steps = 0;
    for (; stv_generator_n_active(generator) > 0; n_steps++) CHECK_OK(stv_generator_step(generator, tokens + n_steps * n, NULL));
    return n_steps;
}

/* Sequence q of the prompts as a tree of one, followed by `n_new` tokens. */
static stv_batch *extended(tiny *t, int64_t q, const int32_t *tokens, int64_t stride, int64_t n_new)
{
    stv_batch_view view = stv_batch_get(t->batch);
    int32_t path[8], n_path = 0, ids[64], image[8], root = -1;
    int64_t n = 0, n_image_refs = 0;
    for (int32_t s = view.sequence_leaf[q]; s >= 0; s = tree_parent[s]) path[n_path++] = s;
    while (n_path > 0) {
        int32_t s = path[--n_path];
        int64_t image_ref = 0;
        for (int64_t i = 0; i < tree_begin[s]; i++) image_ref += tree_ids[i] == I;
        for (int64_t i = tree_begin[s]; i < tree_begin[s + 1]; i++) {
            ids[n++] = tree_ids[i];
            if (tree_ids[i] == I) image[n_image_refs++] = tree_image[image_ref++];
        }
    }
    for (int64_t i = 0; i < n_new; i++) ids[n++] = tokens[i * stride];
    int64_t begin[] = {0, n};
    stv_batch_spec spec = {.n_segments = 1, .parent = &root, .begin = begin, .ids = ids, .n_image_refs = n_image_refs, .image = image, .n_images = 2};
    stv_batch *batch = NULL;
    CHECK_OK(stv_batch_create(&batch, t->model, &spec));
    return batch;
}

static void decoding_is_prefill_bit_by_bit(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 3, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    stv_generator *generator = open_generator(&t, &options);
    int64_t n = stv_generator_n(generator);
    CHECK_INT(n, 15);
    int32_t tokens[MAX_NEW * 15];
    double logp[15];
    real *row = check_reals(TINY_VOCAB);
    for (int step = 0; step < MAX_NEW; step++) {
        for (int64_t i = 0; i < n; i++) {
            stv_batch *batch = extended(&t, i / 3, tokens + i, n, step);
            int64_t last = stv_batch_get(batch).n_rows - 1;
            CHECK_OK(stv_run_forward(t.run, batch, &t.options));
            CHECK_OK(stv_run_logits(t.run, &last, 1, row));
            CHECK_SAME_BITS("logits", (const real *)stv_generator_logits(generator) + i * TINY_VOCAB, row, TINY_VOCAB * sizeof(real));
            stv_batch_free(batch);
        }
        real *before = check_copy_reals(stv_generator_logits(generator), n * TINY_VOCAB);
        CHECK_OK(stv_generator_step(generator, tokens + step * n, logp));
        for (int64_t i = 0; i < n; i++) {
            double want = (double)before[i * TINY_VOCAB + tokens[step * n + i]], sum = 0;
            for (int v = 0; v < TINY_VOCAB; v++) sum += exp((double)before[i * TINY_VOCAB + v]);
            want -= log(sum);
            CHECK_MREL("logp", &logp[i], &want, 1, 1e-13);
        }
    }
    CHECK_INT(stv_generator_n_active(generator), 0);
    stv_generator_free(generator);
    tiny_close(&t);
}

static void greedy_takes_the_first_largest(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    stv_generator *generator = open_generator(&t, &options);
    for (int step = 0; step < MAX_NEW; step++) {
        const real *logits = stv_generator_logits(generator);
        int32_t want[5] = {0}, tokens[5];
        for (int i = 0; i < 5; i++)
            for (int32_t v = 0; v < TINY_VOCAB; v++)
                if (logits[i * TINY_VOCAB + v] > logits[i * TINY_VOCAB + want[i]]) want[i] = v;
        CHECK_OK(stv_generator_step(generator, tokens, NULL));
        for (int i = 0; i < 5; i++) CHECK_INT(tokens[i], want[i]);
    }
    stv_generator_free(generator);
    tiny_close(&t);
}

/* A continuation's tokens are a function of its prompt and its seed: not of its neighbours, nor of threads. */
static void seeds_decide_alone(void)
{
    tiny t = open_tiny();
    uint64_t seeds[10], few_seeds[5];
    for (int i = 0; i < 10; i++) seeds[i] = 100 + (uint64_t)i;
    for (int i = 0; i < 5; i++) few_seeds[i] = seeds[2 * i + 1];
    stv_generate_options options = {.sampling = {.temperature = 1.2, .top_k = 20, .top_p = 0.95},
                                    .n_per_sequence = 2,
                                    .repetition_penalty = 1,
                                    .max_new_tokens = MAX_NEW,
                                    .seeds = seeds};
    int32_t many[MAX_NEW * 10], few[MAX_NEW * 5];
    stv_generator *generator = open_generator(&t, &options);
    run_to_end(generator, many);
    stv_generator_free(generator);
    CHECK_OK(stv_context_set_n_threads(t.context, 1));
    options.n_per_sequence = 1;
    options.seeds = few_seeds;
    generator = open_generator(&t, &options);
    run_to_end(generator, few);
    stv_generator_free(generator);
    int n_different = 0;
    for (int step = 0; step < MAX_NEW; step++)
        for (int i = 0; i < 5; i++) {
            CHECK_INT(few[step * 5 + i], many[step * 10 + 2 * i + 1]);
            n_different += many[step * 10 + 2 * i] != many[step * 10 + 2 * i + 1];
        }
    CHECK(n_different > 5);
    tiny_close(&t);
}

static void draws_follow_the_sampler(void)
{
    tiny t = open_tiny();
    stv_sampling sampling = {.temperature = 0.8, .top_k = 12, .top_p = 0.9};
    stv_generate_options options = {.sampling = sampling, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    stv_generator *generator = open_generator(&t, &options);
    for (int step = 0; step < MAX_NEW; step++) {
        const real *logits = stv_generator_logits(generator);
        int32_t want[5], tokens[5];
        for (int i = 0; i < 5; i++) {
            double wide[TINY_VOCAB], probabilities[TINY_VOCAB];
            for (int v = 0; v < TINY_VOCAB; v++) wide[v] = (double)logits[i * TINY_VOCAB + v];
            CHECK_OK(stv_sampling_probabilities(probabilities, wide, TINY_VOCAB, &sampling));
            want[i] = stv_sample_token(probabilities, TINY_VOCAB, stv_rng_uniform((uint64_t)i, STV_RNG_SAMPLE, (uint64_t)step, 0));
        }
        CHECK_OK(stv_generator_step(generator, tokens, NULL));
        for (int i = 0; i < 5; i++) CHECK_INT(tokens[i], want[i]);
    }
    stv_generator_free(generator);
    tiny_close(&t);
}

static void sequences_end(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    int32_t all[MAX_NEW * 10], tokens[MAX_NEW * 10];
    stv_generator *generator = open_generator(&t, &options);
    CHECK_INT(run_to_end(generator, all), MAX_NEW);
    stv_generator_free(generator);

    int32_t eos[] = {all[2 * 10 + 3], all[1 * 10 + 7]}; /* continuation 3 ends at step 2 at the latest, 7 at step 1 */
    options.eos_ids = eos;
    options.n_eos = 2;
    generator = open_generator(&t, &options);
    bool ended[10] = {false};
    for (int step = 0; step < MAX_NEW; step++) {
        double logp[10];
        if (step == 4) CHECK_OK(stv_generator_finish(generator, 0));
        int64_t n_active = 0;
        for (int i = 0; i < 10; i++) {
            ended[i] |= step == 4 && i == 0;
            n_active += !ended[i];
        }
        CHECK_INT(stv_generator_n_active(generator), n_active);
        CHECK_OK(stv_generator_step(generator, tokens, logp));
        for (int i = 0; i < 10; i++) {
            CHECK_INT(tokens[i], ended[i] ? -1 : all[step * 10 + i]); /* what others end does not move a continuation */
            CHECK(ended[i] ? logp[i] == 0 : logp[i] < 0);
            ended[i] |= tokens[i] == eos[0] || tokens[i] == eos[1];
        }
    }
    CHECK(ended[3] && ended[7]);
    CHECK_INT(stv_generator_n_active(generator), 0);
    CHECK_OK(stv_generator_step(generator, tokens, NULL));
    for (int i = 0; i < 10; i++) CHECK_INT(tokens[i], -1);
    CHECK_ERROR(stv_generator_finish(generator, 10), STV_ERR_ARGUMENT, "10");
    stv_generator_free(generator);
    tiny_close(&t);
}

/* finish() between the draw and the next step must not shift the others' tokens. */
static void finishing_leaves_the_others_alone(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    int32_t all[MAX_NEW * 10], tokens[10];
    stv_generator *generator = open_generator(&t, &options);
    run_to_end(generator, all);
    stv_generator_free(generator);
    generator = open_generator(&t, &options);
    for (int step = 0; step < MAX_NEW; step++) {
        CHECK_OK(stv_generator_step(generator, tokens, NULL));
        for (int i = 0; i < 10; i++) CHECK_INT(tokens[i], i < step ? -1 : all[step * 10 + i]);
        CHECK_OK(stv_generator_finish(generator, step));
    }
    stv_generator_free(generator);
    tiny_close(&t);
}

static void steady_step_allocates_nothing(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_k = 9, .top_p = 0.9}, .n_per_sequence = 2, .repetition_penalty = 1, .max_new_tokens = 40};
    stv_generator *generator = open_generator(&t, &options);
    int32_t tokens[10];
    uint64_t allocated = stv_allocations();
    while (stv_generator_n_active(generator)) CHECK_OK(stv_generator_step(generator, tokens, NULL));
    CHECK_INT(stv_allocations(), allocated);
    stv_generator_free(generator);
    tiny_close(&t);
}

/* A step that was stopped can be taken again, with the same tokens. */
static void stopped_steps(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    stv_generator *generator = open_generator(&t, &options);
    int64_t n = stv_generator_n(generator);
    int32_t want[MAX_NEW * 5], tokens[MAX_NEW * 5];
    for (int64_t i = 0; i < MAX_NEW * n; i += n) CHECK_OK(stv_generator_step(generator, want + i, NULL));
    stv_generator_free(generator);
    int n_stopped = 0;
    stv_status created = STV_ERR_INTERRUPTED, stepped = STV_ERR_INTERRUPTED;
    for (int64_t i_stop = 0; created != STV_OK || stepped != STV_OK; i_stop = tiny_next_stop(i_stop)) {
        int64_t n_left = i_stop;
        stv_watch watch = {.poll = tiny_count_down, .arg = &n_left};
        stv_watch_set(&watch);
        created = stv_generator_create(&generator, t.model, t.batch, &t.options, &options);
        stepped = created == STV_OK ? stv_generator_step(generator, tokens, NULL) : STV_ERR_INTERRUPTED;
        stv_watch_set(NULL);
        if (created != STV_OK) {
            CHECK(created == STV_ERR_INTERRUPTED && generator == NULL);
            continue;
        }
        if (stepped != STV_OK) {
            CHECK_INT(stepped, STV_ERR_INTERRUPTED);
            CHECK_OK(stv_generator_step(generator, tokens, NULL));
            n_stopped++;
        }
        CHECK_SAME_BITS("tokens", want, tokens, (size_t)n * sizeof *want);
        for (int64_t i = n; i < MAX_NEW * n; i += n) CHECK_OK(stv_generator_step(generator, tokens + i, NULL));
        CHECK_SAME_BITS("tokens", want, tokens, MAX_NEW * (size_t)n * sizeof *want);
        stv_generator_free(generator);
    }
    CHECK(n_stopped > 2);
    tiny_close(&t);
}

static void features_and_snapshot_reach_every_step(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = MAX_NEW};
    int32_t want[MAX_NEW * 5], tokens[MAX_NEW * 5];
    stv_generator *generator = open_generator(&t, &options);
    run_to_end(generator, want);
    stv_generator_free(generator);
    real *features = check_reals(2 * TINY_T * TINY_D), *theta = stv_model_theta(t.model);
    CHECK_OK(stv_run_encode(t.run, &t.options, features));
    real *snapshot = check_copy_reals(theta, stv_model_n_trainable(t.model));
    for (int64_t i = 0; i < stv_model_n_trainable(t.model); i++) theta[i] = 0;
    t.options.pixels = NULL;
    t.options.features = features;
    t.options.theta = snapshot;
    generator = open_generator(&t, &options);
    memset(snapshot, 0, (size_t)stv_model_n_trainable(t.model) * sizeof(real)); /* nothing is borrowed after creation */
    memset(features, 0, 2 * TINY_T * TINY_D * sizeof(real));
    CHECK_INT(run_to_end(generator, tokens), MAX_NEW);
    for (int i = 0; i < MAX_NEW * 5; i++) CHECK_INT(tokens[i], want[i]);
    stv_generator_free(generator);
    tiny_close(&t);
}

/* ---- a conversation: more rows behind those of one continuation ----------------------------------------------------------- */

/* Its rows are 5, the four of image 0, 7, 3, 9, the four of image 1, 4, 30, 2: with a window of 7 rows. */
static const int32_t talk_ids[] = {5, I, 7, 3, 9, I, 4, 30, 2};
static const int64_t talk_row[] = {0, 1, 5, 6, 7, 8, 12, 13, 14, 15}; /* where each token begins */
enum { TALK = 9, TALK_ROWS = 15 };

/* Tokens [from, to) of the talk, then `n_new` more. Images are numbered from 0 in each batch. */
static stv_batch *talk(tiny *t, int64_t from, int64_t to, const int32_t *tokens, int64_t n_new)
{
    int32_t ids[TALK + 64], image[] = {0, 1}, root = -1;
    int64_t n = 0, n_images = 0;
    for (int64_t i = from; i < to; i++) n_images += (ids[n++] = talk_ids[i]) == I;
    for (int64_t i = 0; i < n_new; i++) ids[n++] = tokens[i];
    int64_t begin[] = {0, n};
    stv_batch_spec spec = {
        .n_segments = 1, .parent = &root, .begin = begin, .ids = ids, .n_image_refs = n_images, .image = image, .n_images = n_images};
    stv_batch *batch = NULL;
    CHECK_OK(stv_batch_create(&batch, t->model, &spec));
    return batch;
}

static stv_forward_options talk_images(const tiny *t, int64_t from, int64_t to)
{
    stv_forward_options options = t->options;
    int64_t first = 0, n = 0;
    for (int64_t i = 0; i < to; i++) {
        first += i < from && talk_ids[i] == I;
        n += i >= from && talk_ids[i] == I;
    }
    options.pixels = n ? (const real *)t->options.pixels + first * 3 * TINY_IMAGE * TINY_IMAGE : NULL;
    options.n_images = n;
    return options;
}

static const stv_generate_options talk_options = {
    .sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1.7, .max_new_tokens = 3, .min_new_tokens = 1};

static stv_generator *begin_talk(tiny *t, int64_t to)
{
    stv_generator *generator = NULL;
    stv_batch *batch = talk(t, 0, to, NULL, 0);
    stv_forward_options images = talk_images(t, 0, to);
    CHECK_OK(stv_generator_create(&generator, t->model, batch, &images, &talk_options));
    stv_batch_free(batch);
    return generator;
}

static stv_status go_on(tiny *t, stv_generator *generator, int64_t n_keep, int64_t from, int64_t to)
{
    stv_batch *batch = talk(t, from, to, NULL, 0);
    stv_forward_options images = talk_images(t, from, to);
    stv_status status = stv_generator_extend(generator, n_keep, batch, &images, &talk_options);
    stv_batch_free(batch);
    return status;
}

static void same_answer(stv_generator *generator, stv_generator *want)
{
    while (stv_generator_n_active(want)) {
        int32_t token, want_token;
        double logp, want_logp;
        CHECK_INT(stv_generator_n_active(generator), 1);
        CHECK_SAME_BITS("logits", stv_generator_logits(generator), stv_generator_logits(want), TINY_VOCAB * sizeof(real));
        CHECK_OK(stv_generator_step(generator, &token, &logp));
        CHECK_OK(stv_generator_step(want, &want_token, &want_logp));
        CHECK_INT(token, want_token);
        CHECK(logp == want_logp);
    }
    CHECK_INT(stv_generator_n_active(generator), 0);
    CHECK_INT(stv_generator_n_rows(generator), stv_generator_n_rows(want));
}

/* Cut anywhere, with draws between that are dropped again, and growing beyond the room it began with. */
static void extending_is_beginning_with_the_whole(void)
{
    tiny t = open_tiny();
    stv_generator *want = begin_talk(&t, TALK);
    CHECK_INT(stv_generator_n_rows(want), TALK_ROWS);
    for (int first = 1; first < TALK; first++)
        for (int second = first + 1; second <= TALK; second++) {
            stv_generator *generator = begin_talk(&t, first);
            for (int i = 0, token; i < first % 4; i++) CHECK_OK(stv_generator_step(generator, &token, NULL));
            CHECK_INT(stv_generator_n_rows(generator), talk_row[first] + (first % 4 < 3 ? first % 4 : 2)); /* the third token has no row */
            CHECK_OK(go_on(&t, generator, talk_row[first], first, second));
            CHECK_INT(stv_generator_n_rows(generator), talk_row[second]);
            if (second < TALK) CHECK_OK(go_on(&t, generator, talk_row[second - 1], second - 1, TALK));
            same_answer(generator, want);
            stv_generator_free(want);
            want = begin_talk(&t, TALK);
            stv_generator_free(generator);
        }
    stv_generator_free(want);
    tiny_close(&t);
}

/* What was drawn is kept: the answer's rows were computed one by one. */
static void an_answer_is_part_of_the_next_prompt(void)
{
    tiny t = open_tiny();
    stv_generator *generator = begin_talk(&t, 5), *want = NULL;
    int32_t said[3];
    for (int i = 0; i < 3; i++) CHECK_OK(stv_generator_step(generator, &said[i], NULL));
    CHECK_INT(stv_generator_n_rows(generator), 8 + 2);
    stv_batch *batch = talk(&t, 0, 5, said, 3), *last = talk(&t, 0, 0, said + 2, 1);
    stv_forward_options images = talk_images(&t, 0, 5), none = talk_images(&t, 0, 0);
    CHECK_OK(stv_generator_create(&want, t.model, batch, &images, &talk_options));
    CHECK_OK(stv_generator_extend(generator, 10, last, &none, &talk_options));
    same_answer(generator, want);
    stv_generator_free(want);
    stv_generator_free(generator);
    stv_batch_free(batch);
    stv_batch_free(last);
    tiny_close(&t);
}

/* An extension that was stopped leaves the rows before it, and can be taken again. */
static void stopped_extensions(void)
{
    tiny t = open_tiny();
    int n_stopped = 0;
    stv_status status = STV_ERR_INTERRUPTED;
    for (int64_t i_stop = 0; status != STV_OK; i_stop = tiny_next_stop(i_stop)) {
        stv_generator *generator = begin_talk(&t, 4), *want = begin_talk(&t, TALK);
        int64_t n_left = i_stop;
        int32_t token;
        stv_watch watch = {.poll = tiny_count_down, .arg = &n_left};
        stv_watch_set(&watch);
        status = go_on(&t, generator, talk_row[3], 3, TALK);
        stv_watch_set(NULL);
        if (status != STV_OK) {
            n_stopped++;
            CHECK_INT(status, STV_ERR_INTERRUPTED);
            CHECK_INT(stv_generator_n_rows(generator), talk_row[3]);
            CHECK_INT(stv_generator_n_active(generator), 0);
            CHECK_OK(stv_generator_step(generator, &token, NULL));
            CHECK_INT(token, -1);
            CHECK_OK(go_on(&t, generator, talk_row[2], 2, TALK));
        }
        same_answer(generator, want);
        stv_generator_free(generator);
        stv_generator_free(want);
    }
    CHECK(n_stopped > 2);
    tiny_close(&t);
}

/* Greedy draws under a penalty, against its definition: tokens of the prompt and of the answer, not those of other answers, each once. */
static void repeated_and_early_end_tokens_are_held_back(void)
{
    tiny t = open_tiny();
    stv_generate_options options = {
        .sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 3, .max_new_tokens = MAX_NEW, .min_new_tokens = 4};
    int32_t eos[TINY_VOCAB / 2], tokens[MAX_NEW * 5];
    for (int32_t i = 0; i < TINY_VOCAB / 2; i++) eos[i] = 2 * i;
    options.eos_ids = eos;
    options.n_eos = TINY_VOCAB / 2;
    stv_generator *generator = open_generator(&t, &options);
    int n_changed = 0, n_ended = 0;
    stv_batch_view view = stv_batch_get(t.batch);
    for (int step = 0; step < MAX_NEW; step++) {
        real *logits = check_copy_reals(stv_generator_logits(generator), 5 * TINY_VOCAB);
        double logp[5];
        CHECK_OK(stv_generator_step(generator, tokens + step * 5, logp));
        for (int i = 0; i < 5; i++) {
            if (tokens[step * 5 + i] < 0) continue;
            bool seen[TINY_VOCAB] = {false};
            for (int32_t s = view.sequence_leaf[i]; s >= 0; s = tree_parent[s])
                for (int64_t k = tree_begin[s]; k < tree_begin[s + 1]; k++)
                    if (tree_ids[k] >= 0) seen[tree_ids[k]] = true;
            for (int k = 0; k < step; k++) seen[tokens[k * 5 + i]] = true;
            int32_t want = -1, plain = 0;
            double best = -INFINITY, sum = 0;
            for (int32_t v = 0; v < TINY_VOCAB; v++) {
                double plain_logit = (double)logits[i * TINY_VOCAB + v];
                double logit = !seen[v] ? plain_logit : plain_logit < 0 ? plain_logit * 3 : plain_logit / 3;
                sum += exp(plain_logit);
                if (plain_logit > (double)logits[i * TINY_VOCAB + plain]) plain = v;
                if ((step < 4 && v % 2 == 0 && v < TINY_VOCAB - 1) || logit <= best) continue;
                best = logit;
                want = v;
            }
            CHECK_INT(tokens[step * 5 + i], want);
            double want_logp = (double)logits[i * TINY_VOCAB + want] - log(sum); /* of the model, not of what was drawn from */
            CHECK_MREL("logp", &logp[i], &want_logp, 1, 1e-13);
            n_changed += want != plain;
            n_ended += step >= 4 && want % 2 == 0 && want < TINY_VOCAB - 1;
        }
    }
    CHECK(n_changed > 5 && n_ended > 0);
    stv_generator_free(generator);
    tiny_close(&t);
}

static void errors_are_named(void)
{
    tiny t = open_tiny();
    stv_generator *generator;
#define BAD(change, code, part) \
    do { \
        stv_generate_options o = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = 3}; \
        change; \
        CHECK_ERROR(stv_generator_create(&generator, t.model, t.batch, &t.options, &o), (code), (part)); \
        CHECK(generator == NULL); \
    } while (0)
    BAD(o.n_per_sequence = 0, STV_ERR_ARGUMENT, "n_per_sequence");
    BAD(o.max_new_tokens = 0, STV_ERR_ARGUMENT, "max_new_tokens");
    BAD(o.min_new_tokens = -1, STV_ERR_ARGUMENT, "min_new_tokens");
    BAD(o.repetition_penalty = 0, STV_ERR_ARGUMENT, "repetition_penalty is 0");
    BAD(o.repetition_penalty = (double)NAN, STV_ERR_ARGUMENT, "repetition_penalty");
    BAD(o.sampling.temperature = -1, STV_ERR_ARGUMENT, "temperature");
    BAD(o.n_eos = 1, STV_ERR_ARGUMENT, "eos");
    BAD(o.max_new_tokens = 1 << 24; o.n_per_sequence = 1 << 20, STV_ERR_MEMORY, "continuations");
#undef BAD
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .repetition_penalty = 1, .max_new_tokens = 3};
    generator = open_generator(&t, &options);
    int32_t tokens[5];
    stv_generator *one = begin_talk(&t, 4);
    CHECK_ERROR(stv_generator_extend(generator, 1, t.batch, &t.options, &options), STV_ERR_ARGUMENT, "got 5, 5 and 1");
    CHECK_ERROR(stv_generator_extend(one, 1, t.batch, &t.options, &options), STV_ERR_ARGUMENT, "got 1, 5 and 1");
    CHECK_ERROR(go_on(&t, one, 8, 4, TALK), STV_ERR_ARGUMENT, "n_keep is 8, want 0..7");
    CHECK_ERROR(go_on(&t, one, -1, 4, TALK), STV_ERR_ARGUMENT, "n_keep is -1");
    CHECK_INT(stv_generator_n_active(one), 1); /* nothing has changed */
    real *norm = stv_model_tensor(t.model, stv_model_find(t.model, "model.norm.weight")).data;
    norm[0] = (real)NAN;
    CHECK_OK(stv_generator_step(generator, tokens, NULL)); /* drawn before the damage */
    CHECK_ERROR(stv_generator_step(generator, tokens, NULL), STV_ERR_NUMERIC, "continuation 0, token 1");
    CHECK_OK(stv_model_set_trainable(t.model, NULL, 0));
    CHECK_ERROR(stv_generator_step(generator, tokens, NULL), STV_ERR_STATE, "changed");
    CHECK_ERROR(go_on(&t, one, 7, 4, TALK), STV_ERR_STATE, "changed");
    stv_generator_free(one);
    stv_generator_free(generator);
    tiny_close(&t);
}

static const check_case cases[] = {
    {"decoding is prefill bit by bit", decoding_is_prefill_bit_by_bit},
    {"greedy takes the first largest", greedy_takes_the_first_largest},
    {"seeds decide alone", seeds_decide_alone},
    {"draws follow the sampler", draws_follow_the_sampler},
    {"sequences end", sequences_end},
    {"finishing leaves the others alone", finishing_leaves_the_others_alone},
    {"steady step allocates nothing", steady_step_allocates_nothing},
    {"stopped steps", stopped_steps},
    {"features and snapshot reach every step", features_and_snapshot_reach_every_step},
    {"extending is beginning with the whole", extending_is_beginning_with_the_whole},
    {"an answer is part of the next prompt", an_answer_is_part_of_the_next_prompt},
    {"stopped extensions", stopped_extensions},
    {"repeated and early end tokens are held back", repeated_and_early_end_tokens_are_held_back},
    {"errors are named", errors_are_named},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
