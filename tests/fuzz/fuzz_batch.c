/* fuzz_batch.c - any description of prefix trees for one small model: refused, or every promise of the view holds and it can be computed.
 *
 * Arrays have the lengths that the interface asks for; their contents are the input's. */
#include "fuzz_model.h"

enum { MAX_SEGMENTS = 12, MAX_TOKENS = 40, MAX_IMAGES = 4, MAX_ROWS = 400, IMAGE_SIZE = 8, VOCAB = 23 };

static stv_model *new_model(stv_context *context, float *weights, int64_t n_weights)
{
    const stv_model_config config = {
        .has_vision = true,
        .has_projector = true,
        .has_decoder = true,
        .vision = {.image_size = IMAGE_SIZE,
                   .patch_size = 4,
                   .hidden_size = 4,
                   .n_layers = 1,
                   .n_heads = 2,
                   .intermediate_size = 4,
                   .layer_norm_eps = 1e-5,
                   .select_layer = -1},
        .projector = {.kind = STV_PROJECTOR_CLUSTER, .in_size = 4, .out_size = 4, .n_centers = 2, .n_rounds = 2},
        .decoder = {.vocab_size = VOCAB,
                    .hidden_size = 4,
                    .n_layers = 1,
                    .n_heads = 2,
                    .n_kv_heads = 1,
                    .head_dim = 2,
                    .intermediate_size = 4,
                    .rms_norm_eps = 1e-5,
                    .rope_theta = 100,
                    .sliding_window = 9},
    };
    stv_model *model = NULL;
    FUZZ_REQUIRE(!fuzz_refused(stv_model_create(&model, context, &config, STV_DTYPE_F32)));
    fuzz_fill(weights, n_weights);
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        const stv_tensor_info info = stv_model_tensor(model, i);
        FUZZ_REQUIRE(info.size <= n_weights && !fuzz_refused(stv_model_bind(model, info.name, (stv_stored){weights, STV_DTYPE_F32}, info.size)));
        weights += info.size;
        n_weights -= info.size;
    }
    FUZZ_REQUIRE(!fuzz_refused(stv_model_set_trainable(model, (const char *[]){"model.embed_tokens.weight"}, 1)));
    return model;
}

typedef struct trees {
    int32_t parent[MAX_SEGMENTS], ids[MAX_TOKENS], labels[MAX_TOKENS], image[MAX_TOKENS];
    int64_t begin[MAX_SEGMENTS + 1];
    uint64_t sample[MAX_SEGMENTS];
    stv_batch_spec spec;
} trees;

/* Near what is right: a random id is seldom one. The last values of the byte are far off. */
static int32_t near_id(fuzz_input *in, int32_t special)
{
    const int byte = fuzz_byte(in);
    return byte < 180 ? byte % VOCAB : byte < 240 ? special : (int32_t)fuzz_bits(in, 4);
}

static void read_trees(trees *t, fuzz_input *in)
{
    const int64_t n_segments = fuzz_byte(in) % (MAX_SEGMENTS + 1);
    const int flags = fuzz_byte(in);
    int64_t n = 0, n_refs = 0;
    for (int64_t s = 0; s < n_segments; s++) {
        const int byte = fuzz_byte(in);
        t->parent[s] = byte < 60 || !s ? -1 : byte < 240 ? (int32_t)(byte % s) : (int32_t)fuzz_bits(in, 4);
        t->sample[s] = fuzz_bits(in, 1);
        t->begin[s] = n;
        for (int k = fuzz_byte(in) % 8; k > 0 && n < MAX_TOKENS; k--, n++) {
            t->ids[n] = near_id(in, STV_IMAGE_TOKEN);
            t->labels[n] = t->ids[n] == STV_IMAGE_TOKEN && !(flags & 8) ? STV_IGNORE_INDEX : near_id(in, STV_IGNORE_INDEX);
            if (t->ids[n] == STV_IMAGE_TOKEN) t->image[n_refs++] = (int32_t)(int8_t)fuzz_bits(in, 1) % (MAX_IMAGES + 1);
        }
    }
    t->begin[n_segments] = n;
    const int64_t last = t->begin[n_segments];
    if (flags & 1) t->begin[fuzz_byte(in) % (n_segments + 1)] = fuzz_number(in) % (MAX_TOKENS + 1); /* may run backwards */
    for (int64_t s = 0; s <= n_segments; s++)
        if (t->begin[s] > last) t->begin[s] = last; /* but not beyond the arrays, which C cannot check */
    t->spec = (stv_batch_spec){.n_segments = n_segments,
                               .parent = t->parent,
                               .begin = t->begin,
                               .ids = t->ids,
                               .labels = flags & 4 ? NULL : t->labels,
                               .sample = flags & 16 ? NULL : t->sample,
                               .n_image_refs = flags & 32 ? fuzz_byte(in) % (n_refs + 1) : n_refs,
                               .image = t->image,
                               .n_images = fuzz_byte(in) % (MAX_IMAGES + 1)};
}

static void check_view(const trees *t, const stv_batch_view *v)
{
    const stv_batch_spec *spec = &t->spec;
    FUZZ_REQUIRE(v->n_segments == spec->n_segments && v->n_images == spec->n_images && v->n_rows >= spec->begin[spec->n_segments]);
    for (int64_t row = 0; row < v->n_rows; row++) {
        const bool is_image = v->row_token[row] == -1;
        FUZZ_REQUIRE(is_image ? v->row_feature[row] >= 0 && v->row_feature[row] < v->n_images * 4
                              : v->row_token[row] < VOCAB && v->row_feature[row] == -1);
        FUZZ_REQUIRE(v->row_position[row] >= 0 && v->row_position[row] < v->n_rows);
    }
    FUZZ_REQUIRE(v->segment_row[0] == 0 && v->segment_row[v->n_segments] == v->n_rows && v->sequence_begin[v->n_sequences] == v->n_targets);
    for (int64_t i = 0; i < v->n_targets; i++) {
        FUZZ_REQUIRE(v->target_row[i] >= 0 && v->target_row[i] < v->label_row[i] && v->label_row[i] < v->n_rows);
        FUZZ_REQUIRE(v->target_token[i] >= 0 && v->target_token[i] < VOCAB);
        FUZZ_REQUIRE(v->row_position[v->label_row[i]] == v->row_position[v->target_row[i]] + 1); /* the row before it on the path */
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static float weights[4096], pixels[MAX_IMAGES * 3 * IMAGE_SIZE * IMAGE_SIZE];
    static stv_context *context;
    static stv_model *model;
    if (!model) {
        FUZZ_REQUIRE(!fuzz_refused(stv_context_create(&context, 2)));
        model = new_model(context, weights, sizeof weights / sizeof *weights);
        fuzz_fill(pixels, sizeof pixels / sizeof *pixels);
    }
    const uint64_t live = stv_allocations_live();
    fuzz_input in = {data, n};
    trees *t = fuzz_new(1, sizeof *t);
    read_trees(t, &in);
    stv_batch *batch = NULL;
    if (!fuzz_refused(stv_batch_create(&batch, model, &t->spec))) {
        const stv_batch_view view = stv_batch_get(batch);
        check_view(t, &view);
        const stv_forward_options options = {
            .pixels = view.n_images ? pixels : NULL, .n_images = view.n_images, .adapters = true, .train = true, .mean_logit = true};
        if (view.n_rows <= MAX_ROWS) fuzz_compute(model, batch, &options);
    }
    stv_batch_free(batch);
    free(t);
    FUZZ_REQUIRE(stv_allocations_live() == live);
    return 0;
}
