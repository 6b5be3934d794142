/* fuzz_config_core.c - any model configuration: refused, or measured, and computed with if it is small. */
#include "fuzz_model.h"

enum { MAX_ELEMENTS = 1 << 14, MAX_TENSORS = 64 };

static stv_model_config read_config(fuzz_input *in)
{
    stv_model_config c;
    memset(&c, 0, sizeof c);
    const int parts = fuzz_byte(in);
    c.has_vision = parts & 1;
    c.has_projector = parts & 2;
    c.has_decoder = parts & 4;
    c.vision.select_class = parts & 8;
    c.decoder.tie_word_embeddings = parts & 16;
    int64_t *vision[] = {&c.vision.image_size, &c.vision.patch_size, &c.vision.hidden_size,
                         &c.vision.n_layers,   &c.vision.n_heads,    &c.vision.intermediate_size};
    for (size_t i = 0; i < sizeof vision / sizeof *vision; i++) *vision[i] = fuzz_number(in);
    c.vision.activation = (int)fuzz_number(in);
    c.vision.layer_norm_eps = fuzz_fraction(in);
    c.vision.select_layer = (int8_t)fuzz_byte(in);
    c.projector.kind = (stv_projector_kind)fuzz_byte(in);
    int64_t *projector[] = {&c.projector.in_size, &c.projector.out_size, &c.projector.depth, &c.projector.n_centers, &c.projector.n_rounds};
    for (size_t i = 0; i < sizeof projector / sizeof *projector; i++) *projector[i] = fuzz_number(in);
    int64_t *decoder[] = {&c.decoder.vocab_size, &c.decoder.hidden_size, &c.decoder.n_layers,          &c.decoder.n_heads,
                          &c.decoder.n_kv_heads, &c.decoder.head_dim,    &c.decoder.intermediate_size, &c.decoder.sliding_window};
    for (size_t i = 0; i < sizeof decoder / sizeof *decoder; i++) *decoder[i] = fuzz_number(in);
    c.decoder.rms_norm_eps = fuzz_fraction(in);
    c.decoder.rope_theta = fuzz_fraction(in);
    return c;
}

/* Adapters on the first linear modules; returns how many numbers the model has. */
static int64_t add_adapters(stv_model *model, fuzz_input *in)
{
    for (int64_t i = 0; i < stv_model_n_linear(model) && i < 3; i++)
        (void)fuzz_refused(stv_model_add_lora(model, stv_model_linear_name(model, i), fuzz_number(in), fuzz_fraction(in), fuzz_fraction(in), i == 2));
    double n = 0;
    for (int64_t i = 0; i < stv_model_n_tensors(model); i++) {
        const stv_tensor_info info = stv_model_tensor(model, i);
        double size = 1;
        for (int k = 0; k < info.ndim; k++) size *= (double)info.shape[k];
        FUZZ_REQUIRE(info.size > 0 && (double)info.size == size && stv_model_find(model, info.name) == i);
        n += size;
    }
    return n < 1e18 ? (int64_t)n : INT64_MAX;
}

static void compute(stv_model *model, const stv_batch *batch, stv_forward_options *options, int64_t n_elements, bool merge)
{
    const char *names[MAX_TENSORS];
    float *weights = fuzz_new((size_t)n_elements, sizeof *weights), *at = weights;
    fuzz_fill(weights, n_elements);
    const int64_t n_tensors = stv_model_n_tensors(model);
    for (int64_t i = 0; i < n_tensors; i++) {
        const stv_tensor_info info = stv_model_tensor(model, i);
        names[i] = info.name;
        FUZZ_REQUIRE(!fuzz_refused(stv_model_bind(model, info.name, (stv_stored){at, STV_DTYPE_F32}, info.size)));
        at += info.size;
    }
    FUZZ_REQUIRE(!fuzz_refused(stv_model_set_trainable(model, names, n_tensors)));
    if (merge) (void)fuzz_refused(stv_model_merge_lora(model));
    options->train = !merge;
    fuzz_compute(model, batch, options);
    free(weights);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    fuzz_input in = {data, n};
    const stv_model_config config = read_config(&in);
    stv_context *context = NULL;
    stv_model *model = NULL;
    FUZZ_REQUIRE(!fuzz_refused(stv_context_create(&context, 2)));
    if (!fuzz_refused(stv_model_create(&model, context, &config, STV_DTYPE_F32))) {
        const int64_t n_elements = add_adapters(model, &in);
        const int64_t n_images = config.has_vision, n_tokens = 3 + n_images;
        const int32_t root = -1, ids[] = {0, 0, 0, STV_IMAGE_TOKEN}, labels[] = {STV_IGNORE_INDEX, 0, 0, STV_IGNORE_INDEX}, image = 0;
        const stv_batch_spec spec = {.n_segments = 1,
                                     .parent = &root,
                                     .begin = (int64_t[]){0, n_tokens},
                                     .ids = ids,
                                     .labels = labels,
                                     .n_image_refs = n_images,
                                     .image = &image,
                                     .n_images = n_images};
        stv_batch *batch = NULL;
        const bool small = n_elements <= MAX_ELEMENTS && stv_model_n_tensors(model) <= MAX_TENSORS && stv_model_tokens_per_image(model) <= 64;
        const int64_t n_pixels = small && n_images ? 3 * config.vision.image_size * config.vision.image_size : 1;
        if (stv_model_tokens_per_image(model) <= 1 << 16 && n_pixels <= 1 << 16 && !fuzz_refused(stv_batch_create(&batch, model, &spec))) {
            float *pixels = fuzz_new((size_t)n_pixels, sizeof *pixels);
            fuzz_fill(pixels, n_pixels);
            stv_forward_options options = {
                .pixels = n_images ? pixels : NULL, .n_images = n_images, .adapters = true, .vision_grad = true, .dropout = true};
            if (small) compute(model, batch, &options, n_elements, fuzz_byte(&in) & 1);
            free(pixels);
        }
        stv_batch_free(batch);
    }
    stv_model_free(model);
    stv_context_free(context);
    FUZZ_REQUIRE(stv_allocations_live() == 0);
    return 0;
}
