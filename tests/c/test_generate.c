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
    stv_generate_options options = {.sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 3, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {
        .sampling = {.temperature = 1.2, .top_k = 20, .top_p = 0.95}, .n_per_sequence = 2, .max_new_tokens = MAX_NEW, .seeds = seeds};
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
    stv_generate_options options = {.sampling = sampling, .n_per_sequence = 1, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {.sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 2, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {.sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 2, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {.sampling = {.temperature = 1, .top_k = 9, .top_p = 0.9}, .n_per_sequence = 2, .max_new_tokens = 40};
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
    stv_generate_options options = {.sampling = {.temperature = 1, .top_p = 1}, .n_per_sequence = 1, .max_new_tokens = MAX_NEW};
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
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .max_new_tokens = MAX_NEW};
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

static void errors_are_named(void)
{
    tiny t = open_tiny();
    stv_generator *generator;
#define BAD(change, code, part) \
    do { \
        stv_generate_options o = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .max_new_tokens = 3}; \
        change; \
        CHECK_ERROR(stv_generator_create(&generator, t.model, t.batch, &t.options, &o), (code), (part)); \
        CHECK(generator == NULL); \
    } while (0)
    BAD(o.n_per_sequence = 0, STV_ERR_ARGUMENT, "n_per_sequence");
    BAD(o.max_new_tokens = 0, STV_ERR_ARGUMENT, "max_new_tokens");
    BAD(o.sampling.temperature = -1, STV_ERR_ARGUMENT, "temperature");
    BAD(o.n_eos = 1, STV_ERR_ARGUMENT, "eos");
    BAD(o.max_new_tokens = 1 << 24; o.n_per_sequence = 1 << 20, STV_ERR_MEMORY, "continuations");
#undef BAD
    stv_generate_options options = {.sampling = {.top_p = 1}, .n_per_sequence = 1, .max_new_tokens = 3};
    generator = open_generator(&t, &options);
    int32_t tokens[5];
    real *norm = stv_model_tensor(t.model, stv_model_find(t.model, "model.norm.weight")).data;
    norm[0] = (real)NAN;
    CHECK_OK(stv_generator_step(generator, tokens, NULL)); /* drawn before the damage */
    CHECK_ERROR(stv_generator_step(generator, tokens, NULL), STV_ERR_NUMERIC, "continuation 0, token 1");
    CHECK_OK(stv_model_set_trainable(t.model, NULL, 0));
    CHECK_ERROR(stv_generator_step(generator, tokens, NULL), STV_ERR_STATE, "changed");
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
    {"errors are named", errors_are_named},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
