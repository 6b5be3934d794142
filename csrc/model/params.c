#include "model/params.h"

#include "base/alloc.h"
#include "tensor/widen.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define TOWER "model.vision_tower.vision_tower.vision_model."
#define PROJECTOR "model.mm_projector."

/* ---- building the table -------------------------------------------------------------------------------------------------- */

typedef struct builder {
    stv_model *model;
    stv_part part;
    bool influences, adapter;
    bool out_of_memory; /* sticky: looked at once, at the end */
} builder;

static char *copy_text(const char *text)
{
    char *copy = stv_alloc(strlen(text) + 1);
    if (copy) memcpy(copy, text, strlen(text) + 1);
    return copy;
}

/* Makes room for one more element of `size` bytes. */
static bool grow(void **array, int n, int *capacity, size_t size)
{
    if (n < *capacity) return true;
    int wanted = *capacity ? 2 * *capacity : 64;
    void *larger = stv_alloc((size_t)wanted * size);
    if (!larger) return false;
    if (n) memcpy(larger, *array, (size_t)n * size);
    stv_free(*array);
    *array = larger;
    *capacity = wanted;
    return true;
}

static int add_tensor(builder *b, const char *name, int ndim, const int64_t *shape)
{
    stv_model *m = b->model;
    char *copy = copy_text(name);
    if (!copy || !grow((void **)&m->params, m->n_params, &m->params_capacity, sizeof *m->params)) {
        stv_free(copy);
        b->out_of_memory = true;
        return 0;
    }
    stv_param *p = &m->params[m->n_params];
    *p = (stv_param){
        .name = copy, .ndim = ndim, .size = 1, .part = b->part, .influences = b->influences, .adapter = b->adapter, .dtype = m->dtype, .offset = -1};
    for (int i = 0; i < ndim; i++) p->size *= p->shape[i] = shape[i];
    return m->n_params++;
}

static int add_vector(builder *b, const char *name, int64_t n) { return add_tensor(b, name, 1, (int64_t[]){n}); }

static int add_matrix(builder *b, const char *name, int64_t rows, int64_t cols) { return add_tensor(b, name, 2, (int64_t[]){rows, cols}); }

typedef char text[256];

static const char *join(text out, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)vsnprintf(out, sizeof(text), format, args);
    va_end(args);
    return out;
}

static stv_affine add_affine(builder *b, const char *name, int64_t n_out, int64_t n_in)
{
    text t;
    int weight = n_in ? add_matrix(b, join(t, "%s.weight", name), n_out, n_in) : add_vector(b, join(t, "%s.weight", name), n_out);
    return (stv_affine){weight, add_vector(b, join(t, "%s.bias", name), n_out)};
}

static stv_affine add_norm(builder *b, const char *name, int64_t n) { return add_affine(b, name, n, 0); }

static int add_module(builder *b, const char *name, int64_t n_out, int64_t n_in, bool bias)
{
    stv_model *m = b->model;
    text t;
    int weight = add_matrix(b, join(t, "%s.weight", name), n_out, n_in);
    int bias_number = bias ? add_vector(b, join(t, "%s.bias", name), n_out) : -1;
    char *copy = copy_text(name);
    if (!copy || !grow((void **)&m->modules, m->n_modules, &m->modules_capacity, sizeof *m->modules)) {
        stv_free(copy);
        b->out_of_memory = true;
        return 0;
    }
    m->modules[m->n_modules] = (stv_module){.name = copy,
                                            .part = b->part,
                                            .influences = b->influences,
                                            .weight = weight,
                                            .bias = bias_number,
                                            .lora_a = -1,
                                            .lora_b = -1,
                                            .magnitude = -1};
    return m->n_modules++;
}

static void add_vision(builder *b)
{
    const stv_vision_config *c = &b->model->config.vision;
    stv_vision_params *v = &b->model->vision;
    int64_t E = c->hidden_size, F = c->intermediate_size, used = stv_config_n_layers_used(c);
    text t;
    v->layers = stv_alloc_zero((size_t)c->n_layers * sizeof *v->layers);
    if (!v->layers) {
        b->out_of_memory = true;
        return;
    }
    b->part = STV_PART_VISION;
    b->influences = used > 0 || c->select_class; /* without layers patches never see the class token */
    v->class_embedding = add_vector(b, TOWER "embeddings.class_embedding", E);
    b->influences = true;
    v->patch_embedding = add_tensor(b, TOWER "embeddings.patch_embedding.weight", 4, (int64_t[]){E, 3, c->patch_size, c->patch_size});
    v->position_embedding = add_matrix(b, TOWER "embeddings.position_embedding.weight", stv_config_n_patches(c) + 1, E);
    v->pre_norm = add_norm(b, TOWER "pre_layrnorm", E); /* CLIP's own spelling */
    for (int64_t i = 0; i < c->n_layers; i++) {
        stv_vision_layer *layer = &v->layers[i];
        b->influences = i < used;
#define NAME(suffix) join(t, TOWER "encoder.layers.%lld." suffix, (long long)i)
        layer->norm1 = add_norm(b, NAME("layer_norm1"), E);
        layer->q = add_module(b, NAME("self_attn.q_proj"), E, E, true);
        layer->k = add_module(b, NAME("self_attn.k_proj"), E, E, true);
        layer->v = add_module(b, NAME("self_attn.v_proj"), E, E, true);
        layer->out = add_module(b, NAME("self_attn.out_proj"), E, E, true);
        layer->norm2 = add_norm(b, NAME("layer_norm2"), E);
        layer->fc1 = add_module(b, NAME("mlp.fc1"), F, E, true);
        layer->fc2 = add_module(b, NAME("mlp.fc2"), E, F, true);
#undef NAME
    }
    b->influences = false;
    v->post_norm = add_norm(b, TOWER "post_layernorm", E);
}

static void add_projector(builder *b)
{
    const stv_projector_config *c = &b->model->config.projector;
    stv_projector_params *p = &b->model->projector;
    int64_t E = c->in_size, D = c->out_size;
    text t;
    b->part = STV_PART_PROJECTOR;
    b->influences = true;
    switch (c->kind) {
    case STV_PROJECTOR_IDENTITY: break;
    case STV_PROJECTOR_LINEAR: p->mlp[p->n_mlp++] = add_affine(b, "model.mm_projector", D, E); break;
    case STV_PROJECTOR_MLP: /* numbers of torch's Sequential: every second module is an activation */
        for (int64_t i = 0; i < c->depth; i++) p->mlp[p->n_mlp++] = add_affine(b, join(t, PROJECTOR "%lld", 2 * (long long)i), D, i ? D : E);
        break;
    case STV_PROJECTOR_CLUSTER:
        p->sim_alpha = add_tensor(b, PROJECTOR "sim_alpha", 3, (int64_t[]){1, 1, 1});
        p->sim_beta = add_tensor(b, PROJECTOR "sim_beta", 3, (int64_t[]){1, 1, 1});
        p->c = add_affine(b, PROJECTOR "c", E, E);
        p->v = add_affine(b, PROJECTOR "v", E, E);
        p->f = add_affine(b, PROJECTOR "f", E, E);
        b->influences = false;
        add_norm(b, PROJECTOR "ln_1", E); /* in every checkpoint, applied nowhere */
        b->influences = true;
        p->mlp[p->n_mlp++] = add_affine(b, PROJECTOR "mlp.0", D, E);
        p->mlp[p->n_mlp++] = add_affine(b, PROJECTOR "mlp.2", D, D);
        break;
    }
}

static void add_decoder(builder *b)
{
    const stv_decoder_config *c = &b->model->config.decoder;
    stv_decoder_params *d = &b->model->decoder;
    int64_t D = c->hidden_size, F = c->intermediate_size, q_size = c->n_heads * c->head_dim, kv_size = c->n_kv_heads * c->head_dim;
    text t;
    d->layers = stv_alloc_zero((size_t)c->n_layers * sizeof *d->layers);
    if (!d->layers) {
        b->out_of_memory = true;
        return;
    }
    b->part = STV_PART_DECODER;
    b->influences = true;
    d->embed = add_matrix(b, "model.embed_tokens.weight", c->vocab_size, D);
    for (int64_t i = 0; i < c->n_layers; i++) {
        stv_decoder_layer *layer = &d->layers[i];
#define NAME(suffix) join(t, "model.layers.%lld." suffix, (long long)i)
        layer->input_norm = add_vector(b, NAME("input_layernorm.weight"), D);
        layer->q = add_module(b, NAME("self_attn.q_proj"), q_size, D, false);
        layer->k = add_module(b, NAME("self_attn.k_proj"), kv_size, D, false);
        layer->v = add_module(b, NAME("self_attn.v_proj"), kv_size, D, false);
        layer->o = add_module(b, NAME("self_attn.o_proj"), D, q_size, false);
        layer->post_norm = add_vector(b, NAME("post_attention_layernorm.weight"), D);
        layer->gate = add_module(b, NAME("mlp.gate_proj"), F, D, false);
        layer->up = add_module(b, NAME("mlp.up_proj"), F, D, false);
        layer->down = add_module(b, NAME("mlp.down_proj"), D, F, false);
#undef NAME
    }
    d->norm = add_vector(b, "model.norm.weight", D);
    d->head = c->tie_word_embeddings ? d->embed : add_matrix(b, "lm_head.weight", c->vocab_size, D);
}

stv_status stv_model_create(stv_model **out, stv_context *context, const stv_model_config *config, stv_dtype dtype)
{
    *out = NULL;
    if (dtype != STV_DTYPE_F32 && dtype != STV_DTYPE_F64) return stv_fail(STV_ERR_DTYPE, "model: dtype %d, want f32 or f64", (int)dtype);
    STV_TRY(stv_config_check(config));
    stv_model *model = stv_alloc_zero(sizeof *model);
    if (!model) return stv_fail(STV_ERR_MEMORY, "model: no memory for its table");
    model->context = context;
    model->config = *config;
    model->dtype = dtype;
    builder b = {.model = model, .part = STV_PART_VISION};
    if (config->has_vision) add_vision(&b);
    if (config->has_projector) add_projector(&b);
    if (config->has_decoder) add_decoder(&b);
    if (b.out_of_memory) {
        stv_model_free(model);
        return stv_fail(STV_ERR_MEMORY, "model: no memory for its table of tensors");
    }
    *out = model;
    return STV_OK;
}

void stv_model_free(stv_model *model)
{
    if (!model) return;
    for (int i = 0; i < model->n_params; i++) {
        stv_free(model->params[i].name);
        stv_free(model->params[i].own);
    }
    for (int i = 0; i < model->n_modules; i++) {
        stv_free(model->modules[i].name);
        stv_free(model->modules[i].merged);
    }
    stv_free(model->params);
    stv_free(model->modules);
    stv_free(model->vision.layers);
    stv_free(model->decoder.layers);
    stv_free(model->theta);
    stv_free(model->grad);
    stv_free(model);
}

/* ---- reading the table --------------------------------------------------------------------------------------------------- */

stv_dtype stv_model_dtype(const stv_model *model) { return model->dtype; }

const stv_model_config *stv_model_get_config(const stv_model *model) { return &model->config; }

int64_t stv_model_tokens_per_image(const stv_model *model) { return stv_config_tokens_per_image(&model->config); }

int64_t stv_model_n_tensors(const stv_model *model) { return model->n_params; }

stv_tensor_info stv_model_tensor(const stv_model *model, int64_t i)
{
    const stv_param *p = &model->params[i];
    stv_tensor_info info = {.name = p->name,
                            .ndim = p->ndim,
                            .size = p->size,
                            .data = p->data,
                            .dtype = p->dtype,
                            .offset = p->offset,
                            .influences = p->influences,
                            .optional = !p->influences};
    memcpy(info.shape, p->shape, sizeof info.shape);
    return info;
}

int64_t stv_model_find(const stv_model *model, const char *name)
{
    for (int i = 0; i < model->n_params; i++)
        if (strcmp(model->params[i].name, name) == 0) return i;
    return -1;
}

static stv_status find(const stv_model *model, const char *name, int64_t *i)
{
    *i = stv_model_find(model, name);
    return *i >= 0 ? STV_OK : stv_fail(STV_ERR_NAME, "no tensor \"%s\" in this model", name);
}

int64_t stv_model_n_linear(const stv_model *model) { return model->n_modules; }

const char *stv_model_linear_name(const stv_model *model, int64_t i) { return model->modules[i].name; }

int64_t stv_params_find_module(const stv_model *model, const char *name)
{
    for (int i = 0; i < model->n_modules; i++)
        if (strcmp(model->modules[i].name, name) == 0) return i;
    return -1;
}

stv_status stv_params_check_bound(const stv_model *model, unsigned parts, bool adapters, bool all_vision)
{
    for (int i = 0; i < model->n_params; i++) {
        const stv_param *p = &model->params[i];
        bool needed = (p->part & parts) && (p->influences || (all_vision && p->part == STV_PART_VISION)) && (adapters || !p->adapter);
        if (needed && !p->data) return stv_fail(STV_ERR_STATE, "tensor \"%s\" is not bound", p->name);
    }
    return STV_OK;
}

stv_status stv_params_check_unmerged(const stv_model *model, const char *what)
{
    return model->merged ? stv_fail(STV_ERR_STATE, "%s: adapters are merged; unmerge them first", what) : STV_OK;
}

/* ---- binding ------------------------------------------------------------------------------------------------------------- */

/* Values (n) in the model's precision. */
static void widen(const stv_model *model, void *to, stv_stored from, int64_t n)
{
    if (model->dtype == STV_DTYPE_F64) stv_widen_f64(to, from, n);
    else stv_widen_f32(to, from, n);
}

stv_status stv_model_bind(stv_model *model, const char *name, stv_stored values, int64_t size)
{
    int64_t i;
    STV_TRY(find(model, name, &i));
    STV_TRY(stv_params_check_unmerged(model, "bind"));
    stv_param *p = &model->params[i];
    if (!values.data) return stv_fail(STV_ERR_ARGUMENT, "bind \"%s\": no data", name);
    if (size != p->size) return stv_fail(STV_ERR_SHAPE, "bind \"%s\": %lld elements, want %lld", name, (long long)size, (long long)p->size);
    if ((unsigned)values.dtype >= STV_N_DTYPES || !stv_dtype_widens(values.dtype, model->dtype))
        return stv_fail(STV_ERR_DTYPE, "bind \"%s\": %s values in a model of %s, want %s", name,
                        (unsigned)values.dtype < STV_N_DTYPES ? stv_dtype_name(values.dtype) : "unknown", stv_dtype_name(model->dtype),
                        model->dtype == STV_DTYPE_F64 ? "f64, f32, f16 or bf16" : "f32, f16 or bf16");
    if (p->offset >= 0) {
        size_t item = stv_dtype_size(model->dtype);
        p->data = (char *)model->theta + (size_t)p->offset * item;
        if (values.dtype == model->dtype) memmove(p->data, values.data, (size_t)size * item);
        else widen(model, p->data, values, size);
        return STV_OK;
    }
    stv_free(p->own);
    p->own = NULL;
    p->data = (void *)values.data; /* frozen tensors are only read */
    p->dtype = values.dtype;
    return STV_OK;
}

stv_status stv_model_add_lora(stv_model *model, const char *name, int64_t rank, double scale, double dropout, bool dora)
{
    int64_t i = stv_params_find_module(model, name);
    if (i < 0) return stv_fail(STV_ERR_NAME, "add_lora: no linear module \"%s\" that can carry an adapter", name);
    if (model->modules[i].rank) return stv_fail(STV_ERR_STATE, "add_lora: \"%s\" has an adapter already", name);
    if (model->n_users) return stv_fail(STV_ERR_STATE, "add_lora: \"%s\": runs or generators of this model exist; free them first", name);
    STV_TRY(stv_params_check_unmerged(model, "add_lora"));
    const stv_param *weight = &model->params[model->modules[i].weight];
    int64_t n_out = weight->shape[0], n_in = weight->shape[1];
    if (rank < 1 || rank > 1 << 20) return stv_fail(STV_ERR_ARGUMENT, "add_lora: \"%s\": rank %lld, want 1..%d", name, (long long)rank, 1 << 20);
    if (!(scale > -1e30 && scale < 1e30)) return stv_fail(STV_ERR_ARGUMENT, "add_lora: \"%s\": scale %g is not a number to scale with", name, scale);
    if (!(dropout >= 0 && dropout < 1)) return stv_fail(STV_ERR_ARGUMENT, "add_lora: \"%s\": dropout %g, want 0 <= p < 1", name, dropout);

    builder b = {.model = model, .part = model->modules[i].part, .influences = model->modules[i].influences, .adapter = true};
    text t;
    int n_before = model->n_params, magnitude = -1;
    int a_number = add_matrix(&b, join(t, "%s.lora_A.weight", name), rank, n_in);
    int b_number = add_matrix(&b, join(t, "%s.lora_B.weight", name), n_out, rank);
    if (dora) magnitude = add_vector(&b, join(t, "%s.lora_magnitude_vector.weight", name), n_out);
    if (b.out_of_memory) {
        while (model->n_params > n_before) stv_free(model->params[--model->n_params].name);
        return stv_fail(STV_ERR_MEMORY, "add_lora: \"%s\": no memory for the table", name);
    }
    stv_module *module = &model->modules[i];
    module->lora_a = a_number, module->lora_b = b_number, module->magnitude = magnitude;
    module->rank = rank, module->scale = scale, module->dropout = dropout;
    if (dora) module->norm = model->n_norms, model->n_norms += n_out;
    return STV_OK;
}

bool stv_params_module_bound(const stv_model *model, const stv_module *module)
{
    const int tensors[] = {module->weight, module->lora_a, module->lora_b, module->magnitude};
    for (int i = 0; i < 4; i++)
        if (tensors[i] >= 0 && !model->params[tensors[i]].data) return false;
    return true;
}

void stv_params_free_merged(stv_model *model)
{
    for (int i = 0; i < model->n_modules; i++) {
        stv_free(model->modules[i].merged);
        model->modules[i].merged = NULL;
    }
}

stv_status stv_model_unmerge_lora(stv_model *model)
{
    if (!model->merged) return stv_fail(STV_ERR_STATE, "unmerge_lora: no adapters are merged");
    stv_params_free_merged(model);
    model->merged = false;
    model->layout++;
    return STV_OK;
}

/* ---- the flat buffers ---------------------------------------------------------------------------------------------------- */

int64_t stv_model_n_trainable(const stv_model *model) { return model->n_trainable; }

void *stv_model_theta(stv_model *model) { return model->theta; }

void *stv_model_grad(stv_model *model) { return model->grad; }

stv_status stv_model_zero_grad(stv_model *model)
{
    if (model->n_trainable) memset(model->grad, 0, (size_t)model->n_trainable * stv_dtype_size(model->dtype));
    return STV_OK;
}

typedef struct layout {
    int64_t *offset; /* (n_params) new offsets, -1: frozen */
    int64_t n;       /* elements */
    void *theta, *grad;
} layout;

static stv_status lay_out(const stv_model *model, layout *next, const char *const *names, int64_t n)
{
    for (int i = 0; i < model->n_params; i++) next->offset[i] = -1;
    for (int64_t j = 0; j < n; j++) {
        int64_t i;
        STV_TRY(find(model, names[j], &i));
        if (next->offset[i] >= 0) return stv_fail(STV_ERR_ARGUMENT, "set_trainable: \"%s\" is named twice", names[j]);
        next->offset[i] = next->n;
        next->n += model->params[i].size;
    }
    return STV_OK;
}

static bool allocate(stv_model *model, layout *next)
{
    size_t item = stv_dtype_size(model->dtype);
    if (next->n) {
        next->theta = stv_alloc_zero((size_t)next->n * item);
        next->grad = stv_alloc_zero((size_t)next->n * item);
        if (!next->theta || !next->grad) return false;
    }
    for (int i = 0; i < model->n_params; i++) {
        stv_param *p = &model->params[i];
        bool stops = p->offset >= 0 && next->offset[i] < 0 && p->data;
        if (stops && !(p->own = stv_alloc((size_t)p->size * item))) return false;
    }
    return true;
}

static void move_values(stv_model *model, const layout *next)
{
    size_t item = stv_dtype_size(model->dtype);
    for (int i = 0; i < model->n_params; i++) {
        stv_param *p = &model->params[i];
        bool trained = p->offset >= 0, trains = next->offset[i] >= 0;
        p->offset = next->offset[i];
        if (!p->data || (!trained && !trains)) continue;
        void *place = trains ? (char *)next->theta + (size_t)p->offset * item : p->own;
        assert(place); /* allocated by the step that cannot be undone any more */
        widen(model, place, (stv_stored){p->data, p->dtype}, p->size);
        p->data = place;
        p->dtype = model->dtype;
        if (trains) {
            stv_free(p->own);
            p->own = NULL;
        }
    }
}

stv_status stv_model_set_trainable(stv_model *model, const char *const *names, int64_t n)
{
    STV_TRY(stv_params_check_unmerged(model, "set_trainable"));
    layout next = {.offset = stv_alloc((size_t)model->n_params * sizeof(int64_t))};
    if (!next.offset) return stv_fail(STV_ERR_MEMORY, "set_trainable: no memory for the table");
    stv_status status = lay_out(model, &next, names, n);
    if (status == STV_OK && !allocate(model, &next)) {
        for (int i = 0; i < model->n_params; i++) /* a trainable tensor has no memory of its own otherwise */
            if (model->params[i].offset >= 0) {
                stv_free(model->params[i].own);
                model->params[i].own = NULL;
            }
        stv_free(next.theta);
        stv_free(next.grad);
        status = stv_fail(STV_ERR_MEMORY, "set_trainable: no memory for %lld trainable values and their gradients", (long long)next.n);
    }
    if (status == STV_OK) {
        move_values(model, &next);
        stv_free(model->theta);
        stv_free(model->grad);
        model->theta = next.theta;
        model->grad = next.grad;
        model->n_trainable = next.n;
        model->layout++;
    }
    stv_free(next.offset);
    return status;
}
