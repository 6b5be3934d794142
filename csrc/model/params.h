/* params.h - the model as a table of named tensors and of linear modules, and where their values lie.
 *
 *   table of tensors   name, shape, data -->  borrowed (bound by the caller), maybe f16 or bf16   frozen
 *                                             own copy (trained once, frozen now)                 frozen
 *                                             a place in theta, gradient in grad                  trainable
 *   table of modules   weight, bias, lora_A, lora_B, magnitude as tensor numbers; the merged weight while adapters are merged
 *   layers             which tensor and module numbers a layer of the tower or the decoder consists of
 *
 * Nothing here computes: both precisions share it, and model/weights.h turns numbers into pointers for one pass. */
#ifndef STV_MODEL_PARAMS_H
#define STV_MODEL_PARAMS_H

#include "base/threads.h"
#include "model/config.h"

typedef enum stv_part { STV_PART_VISION = 1, STV_PART_PROJECTOR = 2, STV_PART_DECODER = 4 } stv_part; /* a set, as bits */

typedef struct stv_param {
    char *name; /* owned */
    int ndim;
    int64_t shape[4], size;
    stv_part part;
    bool influences, adapter;
    void *data;      /* NULL until bound */
    stv_dtype dtype; /* of data; the model's unless borrowed */
    void *own;       /* the model's own memory, or NULL */
    int64_t offset;  /* in theta; -1: frozen */
} stv_param;

typedef struct stv_module { /* a linear layer that can carry an adapter */
    char *name;             /* owned */
    stv_part part;
    bool influences;
    int weight, bias;   /* tensor numbers; bias -1: none */
    int lora_a, lora_b; /* tensor numbers; -1: no adapter */
    int magnitude;      /* tensor number; -1: not DoRA */
    int64_t norm;       /* DoRA: where a pass keeps the lengths of the rows of W + s B A, see stv_weights.norms */
    int64_t rank;
    double scale, dropout;
    void *merged; /* (N,K) while merged, owned */
} stv_module;

typedef struct stv_affine {
    int weight, bias;
} stv_affine; /* tensor numbers */

typedef struct stv_vision_layer {
    stv_affine norm1, norm2;
    int q, k, v, out, fc1, fc2; /* module numbers */
} stv_vision_layer;
typedef struct stv_vision_params {
    int class_embedding, patch_embedding, position_embedding;
    stv_affine pre_norm, post_norm;
    stv_vision_layer *layers; /* (n_layers), owned */
} stv_vision_params;

typedef struct stv_projector_params {
    stv_affine mlp[STV_MAX_PROJECTOR_DEPTH];
    int64_t n_mlp;
    stv_affine c, v, f; /* cluster */
    int sim_alpha, sim_beta;
} stv_projector_params;

typedef struct stv_decoder_layer {
    int input_norm, post_norm;
    int q, k, v, o, gate, up, down; /* module numbers */
} stv_decoder_layer;
typedef struct stv_decoder_params {
    int embed, norm, head;
    stv_decoder_layer *layers; /* (n_layers), owned */
} stv_decoder_params;

struct stv_context {
    stv_pool *pool;
};

struct stv_model {
    stv_context *context;
    stv_model_config config;
    stv_dtype dtype;
    stv_param *params;
    int n_params, params_capacity;
    stv_module *modules;
    int n_modules, modules_capacity;
    stv_vision_params vision;
    stv_projector_params projector;
    stv_decoder_params decoder;
    void *theta, *grad; /* (n_trainable) */
    int64_t n_trainable;
    int64_t n_norms; /* of all DoRA modules */
    bool merged;
    int64_t n_users; /* runs and generators alive */
    uint64_t layout; /* counts changes of what trains: a backward must not meet another layout than its forward */
};

/* Errors: state, naming the first tensor of `parts` that a pass needs and nobody bound. */
stv_status stv_params_check_bound(const stv_model *model, unsigned parts, bool adapters, bool all_vision);
stv_status stv_params_check_unmerged(const stv_model *model, const char *what);
void stv_params_free_merged(stv_model *model);
int64_t stv_params_find_module(const stv_model *model, const char *name);       /* -1: no such module */
bool stv_params_module_bound(const stv_model *model, const stv_module *module); /* its weight, and its adapter if it has one */

#endif
