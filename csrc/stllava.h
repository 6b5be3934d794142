/* stllava.h - the only public door of the core.
 *
 *   images --> vision tower --> projector --> splice into token rows --> decoder --> log-probabilities of targets
 *   (backward: the same, upside down)                                        --> adamw / generation
 *
 * Usage, in data-flow order:
 *   1. stv_context_create            worker threads
 *   2. stv_model_create              from a configuration; then bind every tensor, add adapters, choose what trains
 *   3. stv_batch_create              trees of token segments -> packed rows and targets
 *   4. stv_run_forward / _backward   log-probs out, d-log-probs in; gradients land in the model's flat gradient buffer
 *   5. stv_adamw_step                over the flat trainable buffer
 *   6. stv_generator_*               prefill once, then one token of every continuation per step
 *
 * Shape letters: B images, T image tokens, R packed rows, D decoder width, E tower width, V vocabulary, S segments, Q sequences.
 * "real" means float or double according to the model's dtype. Arrays are row-major and contiguous.
 * Ownership words: *owns*, *borrows* (until when), *fills* (caller's buffer). Objects are not locked: one caller at a time per object. */
#ifndef STLLAVA_H
#define STLLAVA_H

#include "base/status.h"
#include "base/watch.h" /* stv_watch_set: how a long call is stopped */
#include "tensor/dtype.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STV_IGNORE_INDEX (-100) /* label of a token that is no target */
#define STV_IMAGE_TOKEN (-200)  /* id that stands for one image's T feature rows */

/* ---- context ------------------------------------------------------------------------------------------------------------- */

typedef struct stv_context stv_context; /* owns the worker threads */

stv_status stv_context_create(stv_context **out, int n_threads /* <= 0: one per core */);
void stv_context_free(stv_context *context); /* takes NULL; no model may still use it */
int stv_context_n_threads(const stv_context *context);
stv_status stv_context_set_n_threads(stv_context *context, int n_threads);

typedef struct stv_build_info {
    const char *version;   /* of the package */
    const char *blas;      /* "openblas (bundled)", "system", "none" */
    const char *cpu_level; /* kernels chosen on this machine: "portable", "avx2", "avx512" */
    bool stb_image, cuda, debug, sanitizers;
} stv_build_info;
stv_build_info stv_get_build_info(void);
uint64_t stv_allocations(void);      /* core allocations so far; equal before and after a steady step */
uint64_t stv_allocations_live(void); /* not freed yet */
/* For tests: the n-th allocation from now (1: the next) fails, and with `forever` all after it; 0: none does. */
void stv_allocations_fail_at(uint64_t n, bool forever);

/* ---- model --------------------------------------------------------------------------------------------------------------- */

typedef struct stv_vision_config {
    int64_t image_size, patch_size, hidden_size, n_layers, n_heads, intermediate_size;
    int activation; /* 0 gelu (exact), 1 quick_gelu */
    double layer_norm_eps;
    int64_t select_layer; /* as in LLaVA: -2 = output of the last layer but one; 0..n_layers = hidden_states[i] */
    bool select_class;    /* false: "patch" features; true: "cls_patch" */
} stv_vision_config;

typedef enum stv_projector_kind {
    STV_PROJECTOR_IDENTITY = 0,
    STV_PROJECTOR_LINEAR = 1,
    STV_PROJECTOR_MLP = 2,
    STV_PROJECTOR_CLUSTER = 3
} stv_projector_kind;

typedef struct stv_projector_config {
    stv_projector_kind kind;
    int64_t in_size, out_size;   /* E, D */
    int64_t depth;               /* mlpNx_gelu: N */
    int64_t n_centers, n_rounds; /* cluster: 256 and 2 in real checkpoints */
} stv_projector_config;

typedef struct stv_decoder_config {
    int64_t vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, intermediate_size;
    double rms_norm_eps, rope_theta;
    int64_t sliding_window; /* 0: none */
    bool tie_word_embeddings;
} stv_decoder_config;

/* Any part may be absent: a tower or a projector alone, a language model without images. */
typedef struct stv_model_config {
    bool has_vision, has_projector, has_decoder;
    stv_vision_config vision;
    stv_projector_config projector;
    stv_decoder_config decoder;
} stv_model_config;

typedef struct stv_model stv_model;

/* dtype f32 or f64. The context must outlive the model. Errors: argument (which value, what range), memory. */
stv_status stv_model_create(stv_model **out, stv_context *context, const stv_model_config *config, stv_dtype dtype);
void stv_model_free(stv_model *model); /* takes NULL */
stv_dtype stv_model_dtype(const stv_model *model);
const stv_model_config *stv_model_get_config(const stv_model *model);
int64_t stv_model_tokens_per_image(const stv_model *model); /* T; 0 without a tower */

/* Tensors are known by the names of a full LLaVA checkpoint (model.layers.0.self_attn.q_proj.weight, model.mm_projector.f.weight,
 * model.vision_tower.vision_tower.vision_model.…); adapters by <module>.lora_A.weight (r,K) and <module>.lora_B.weight (N,r),
 * those of DoRA also by <module>.lora_magnitude_vector.weight (N). */
typedef struct stv_tensor_info {
    const char *name; /* valid as long as the model */
    int ndim;
    int64_t shape[4];
    int64_t size;    /* elements */
    void *data;      /* NULL until bound. Trainable: inside the flat buffer */
    stv_dtype dtype; /* of data: as it was bound while frozen, else the model's */
    int64_t offset;  /* element offset in the flat buffer; -1: frozen */
    bool influences; /* false: no output depends on it (tower layers behind select_layer, post-LayerNorm, ln_1) */
    bool optional;   /* may stay unbound: tensors that do not influence */
} stv_tensor_info;

int64_t stv_model_n_tensors(const stv_model *model);
stv_tensor_info stv_model_tensor(const stv_model *model, int64_t i);
int64_t stv_model_find(const stv_model *model, const char *name); /* -1: no such tensor */

/* Borrows the values (size elements, aligned to their size) until bound again, made trainable, or the model is freed. They may be stored in any precision
 * that the model's holds exactly, f16 and bf16 among them: they stay as they lie and are widened where they are read, so every result has the bits of
 * the model with widened values. A trainable tensor is copied into the flat buffer instead. Errors: name, shape, dtype. */
stv_status stv_model_bind(stv_model *model, const char *name, stv_stored values, int64_t size);

/* Puts an adapter on a linear module ("model.layers.0.mlp.up_proj"); its two tensors, three of DoRA, appear unbound at the end of the table.
 * scale = alpha/r (alpha/sqrt(r) for rsLoRA). Errors: name (no such linear), argument, state (has one already, or runs exist). */
stv_status stv_model_add_lora(stv_model *model, const char *name, int64_t rank, double scale, double dropout, bool dora);
int64_t stv_model_n_linear(const stv_model *model);
const char *stv_model_linear_name(const stv_model *model, int64_t i); /* modules that can carry an adapter */

/* These tensors train, in this order, in one flat buffer and one flat gradient buffer (zeroed); all others are frozen. Values are
 * carried over from wherever they were; tensors that stop training get memory owned by the model. n = 0: none train. */
stv_status stv_model_set_trainable(stv_model *model, const char *const *names, int64_t n);
int64_t stv_model_n_trainable(const stv_model *model); /* elements; the flat buffers' length */
void *stv_model_theta(stv_model *model);               /* (n_trainable) real; NULL when none train */
void *stv_model_grad(stv_model *model);
stv_status stv_model_zero_grad(stv_model *model);

/* W <- W + s B A, its rows stretched to the magnitudes of DoRA, in memory of the model's own while merged (the base stays where it is); adapters are
 * then skipped.
 * unmerge forgets the merged copies: exact. Errors: state, memory. */
stv_status stv_model_merge_lora(stv_model *model);
stv_status stv_model_unmerge_lora(stv_model *model);
/* The weight a linear module computes with, merged or not: (N,K) real. */
stv_status stv_model_effective_weight(stv_model *model, const char *module, void *fills);

/* ---- batch: prefix trees --------------------------------------------------------------------------------------------------- */

/* Trees lie one after another; a segment names its parent (an earlier segment of the same tree, -1 for a root). It sees its
 * ancestors and itself; positions continue from its parent. A *sequence* is a path from a root to a leaf, numbered in leaf order.
 * Every label on a path is a target of that sequence (a label in a shared segment counts for every sequence through it),
 * predicted by the row before it on the path; a label on a root's first token has no predictor and is left out. */
typedef struct stv_batch_spec {
    int64_t n_segments;
    const int32_t *parent;  /* (S) */
    const int64_t *begin;   /* (S+1) ranges of ids/labels */
    const int32_t *ids;     /* token id in [0,V) or STV_IMAGE_TOKEN */
    const int32_t *labels;  /* like ids, token id or STV_IGNORE_INDEX; NULL: no targets */
    const uint64_t *sample; /* (S) dropout key of each segment's rows; NULL: segment number */
    int64_t n_image_refs;
    const int32_t *image; /* (n_image_refs) which image of the batch, one per STV_IMAGE_TOKEN in order */
    int64_t n_images;
} stv_batch_spec;

typedef struct stv_batch stv_batch;

/* Copies everything it needs. Errors: argument/shape, naming segment and token. */
stv_status stv_batch_create(stv_batch **out, const stv_model *model, const stv_batch_spec *spec);
void stv_batch_free(stv_batch *batch); /* takes NULL */

typedef struct stv_batch_view { /* borrowed until the batch is freed */
    int64_t n_rows, n_segments, n_sequences, n_targets, n_images;
    const int32_t *row_token;      /* (R) token id; -1 for image rows */
    const int64_t *row_feature;    /* (R) image * T + token, or -1 */
    const int32_t *row_position;   /* (R) */
    const uint64_t *row_sample;    /* (R) */
    const int64_t *segment_row;    /* (S+1) row ranges */
    const int32_t *sequence_leaf;  /* (Q) leaf segment */
    const int64_t *sequence_begin; /* (Q+1) ranges of targets */
    const int64_t *target_row;     /* (n_targets) the predicting row */
    const int64_t *label_row;      /* (n_targets) the row of the label token itself */
    const int32_t *target_token;   /* (n_targets) */
} stv_batch_view;
stv_batch_view stv_batch_get(const stv_batch *batch);

/* ---- run: forward and backward ---------------------------------------------------------------------------------------------- */

typedef struct stv_run stv_run; /* owns one arena: the activations of one batch at a time */

stv_status stv_run_create(stv_run **out, stv_model *model); /* the model must outlive it */
void stv_run_free(stv_run *run);                            /* takes NULL */
/* Layers that keep only their input and compute again in backward: the first n of each stack. Default 0, 0. */
stv_status stv_run_set_recompute(stv_run *run, int64_t n_vision_layers, int64_t n_decoder_layers);

typedef struct stv_forward_options {
    const void *pixels;   /* (n_images,3,size,size) real, borrowed until backward is done; NULL if `features` or no images */
    const void *features; /* (n_images*T, D) real: projected image features computed before; then tower and projector do not run */
    int64_t n_images;
    const void *theta; /* another flat trainable buffer (a snapshot: the reference policy); NULL: the model's own */
    bool adapters;     /* false: LoRA off */
    bool train;        /* keep what backward needs */
    bool vision_grad;  /* false: no gradient into the tower, as the original (spec D1) */
    bool dropout;      /* adapters' dropout on, drawn from (seed, step) */
    uint64_t seed, step;
    bool mean_logit; /* also compute mean over the vocabulary of the logits at every label row */
} stv_forward_options;

/* After it: logp, and the views below, valid until the next forward on this run. The arena grows only when a batch needs more than any
 * before (planned by a measuring pass). Errors: state (unbound tensor, named), argument, memory, numeric (non-finite log-prob: first target). */
stv_status stv_run_forward(stv_run *run, const stv_batch *batch, const stv_forward_options *options);
const double *stv_run_logp(const stv_run *run);       /* (n_targets) */
const double *stv_run_mean_logit(const stv_run *run); /* (n_targets), NULL unless asked for */
const void *stv_run_features(const stv_run *run);     /* (n_images*T, D) real, NULL without images */
const void *stv_run_embeddings(const stv_run *run);   /* (R, D) real: rows entering the decoder */
/* Logits of any rows of the last forward: fills out (n, V) real. */
stv_status stv_run_logits(stv_run *run, const int64_t *rows, int64_t n, void *out);
/* dlogp (n_targets) = d loss / d logp; adds to the model's gradient buffer. Once per forward with train. */
stv_status stv_run_backward(stv_run *run, const double *dlogp);
/* Arena bytes that forward (and backward, with train) would need; computes nothing else. */
stv_status stv_run_estimate(stv_run *run, const stv_batch *batch, const stv_forward_options *options, size_t *bytes);
size_t stv_run_arena_bytes(const stv_run *run); /* held now */

/* Parts alone, with the same options. Features out of the tower: (n_images*T, E). all_layers: also compute hidden_states[0..n_layers],
 * and the pooled class token, for inspection. */
stv_status stv_run_vision_forward(stv_run *run, const stv_forward_options *options, bool all_layers);
const void *stv_run_vision_features(const stv_run *run);          /* (n_images*T, E) */
const void *stv_run_vision_hidden(const stv_run *run, int64_t i); /* (n_images*(patches+1), E) after all_layers, else NULL */
const void *stv_run_vision_pooled(const stv_run *run);            /* (n_images, E) post-LayerNorm of the class token, after all_layers */
stv_status stv_run_vision_backward(stv_run *run, const void *dfeatures);

/* in (n_images*n_tokens, E); n_tokens need not be the tower's. options: theta and train only. */
stv_status stv_run_projector_forward(stv_run *run, const void *in, int64_t n_images, int64_t n_tokens, const stv_forward_options *options);
const void *stv_run_projector_output(const stv_run *run);      /* (n_images*n_tokens, D) */
const int32_t *stv_run_cluster_assignment(const stv_run *run); /* (n_images*n_tokens) centre of each token; NULL for other kinds */
const double *stv_run_cluster_margin(const stv_run *run);      /* (n_images*n_tokens) best minus second-best similarity */
/* Fills din (n_images*n_tokens, E) unless NULL. */
stv_status stv_run_projector_backward(stv_run *run, const void *dout, void *din);

/* Tower and projector: fills features (n_images*T, D) for later use as options.features. */
stv_status stv_run_encode(stv_run *run, const stv_forward_options *options, void *features);

/* ---- training --------------------------------------------------------------------------------------------------------------- */

typedef enum stv_loss_type {
    STV_LOSS_SIGMOID,
    STV_LOSS_HINGE,
    STV_LOSS_IPO,
    STV_LOSS_EXO_PAIR,
    STV_LOSS_NCA_PAIR,
    STV_LOSS_ROBUST,
    STV_LOSS_BCO_PAIR,
    STV_LOSS_SPPO_HARD,
    STV_LOSS_AOT,
    STV_LOSS_AOT_UNPAIRED,
    STV_LOSS_APO_ZERO,
    STV_LOSS_APO_DOWN,
    STV_LOSS_DISCOPOP,
    STV_LOSS_SFT,
    STV_LOSS_SIGMOID_NORM,
    STV_LOSS_COUNT
} stv_loss_type;
typedef enum stv_f_divergence { STV_REVERSE_KL, STV_FORWARD_KL, STV_JS_DIVERGENCE, STV_ALPHA_DIVERGENCE } stv_f_divergence;

typedef struct stv_preference_config {
    int64_t n_losses;
    const stv_loss_type *types; /* (n_losses) a mixture: loss = sum_k weights[k] * mean over pairs of loss k */
    const double *weights;      /* (n_losses) */
    double beta, label_smoothing, discopop_tau;
    stv_f_divergence f_divergence;
    double alpha;        /* of alpha_divergence */
    bool reference_free; /* reference log-probs count as 0 */
} stv_preference_config;

typedef struct stv_preference_input { /* each (n_pairs); log-probs are sums over a sequence's targets */
    int64_t n_pairs;
    const double *policy_chosen, *policy_rejected, *reference_chosen, *reference_rejected; /* reference: NULL iff reference_free */
    const double *chosen_tokens, *rejected_tokens;                                         /* target counts */
} stv_preference_input;

/* Fills loss (1), per_pair (n_losses, n_pairs) unweighted, dchosen and drejected (n_pairs) = d loss / d policy log-prob. Errors: argument. */
stv_status stv_preference_loss(double *loss, double *per_pair, double *dchosen, double *drejected, const stv_preference_config *config,
                               const stv_preference_input *input);
const char *stv_loss_name(stv_loss_type type); /* "sigmoid", ... as in TRL; NULL beyond the end */

typedef struct stv_adamw_range { /* one parameter group, or part of one: elements [begin, end) of the flat buffer */
    int64_t begin, end;
    double lr, weight_decay;
} stv_adamw_range;
typedef struct stv_adamw_config {
    double beta1, beta2, eps;
    int64_t step;      /* 1-based number of this update */
    double grad_scale; /* gradients are multiplied by it first: 1/accumulation times the clipping coefficient */
} stv_adamw_config;
/* In place on the model's flat buffer; m, v (n_trainable) real, caller's. Elements outside every range stay untouched.
 * Source: Loshchilov & Hutter (arXiv 1711.05101) in torch.optim.AdamW's order of operations. Errors: argument, state. */
stv_status stv_adamw_step(stv_model *model, void *m, void *v, const stv_adamw_range *ranges, int64_t n_ranges, const stv_adamw_config *config);
/* sqrt of the sum of squares of the gradients inside the ranges, in double; NaN/Inf shows through. */
stv_status stv_grad_norm(stv_model *model, const stv_adamw_range *ranges, int64_t n_ranges, double *norm);

typedef enum stv_schedule_kind { STV_SCHEDULE_CONSTANT, STV_SCHEDULE_LINEAR, STV_SCHEDULE_COSINE } stv_schedule_kind;
/* Multiplier of update `step` (from 0): step/warmup while warming up, then the curve down to `floor` at `total`. */
double stv_schedule(stv_schedule_kind kind, int64_t step, int64_t warmup, int64_t total, double floor);

/* ---- generation -------------------------------------------------------------------------------------------------------------- */

typedef struct stv_sampling {
    double temperature; /* 0: greedy */
    int64_t top_k;      /* 0: off */
    double top_p;       /* 1: off */
} stv_sampling;

/* temperature -> top-k (ties with the k-th kept) -> top-p (drop the tail whose cumulative probability <= 1 - top_p, keep one)
 * -> softmax; transformers 4.31's order. Fills probabilities (V). Errors: argument, memory. */
stv_status stv_sampling_probabilities(double *probabilities, const double *logits, int64_t V, const stv_sampling *sampling);

typedef struct stv_generate_options {
    stv_sampling sampling;
    int64_t n_per_sequence; /* continuations of each sequence of the batch; they share its prefix */
    int64_t max_new_tokens;
    int64_t min_new_tokens; /* until then no token of eos_ids is drawn */
    double
        repetition_penalty; /* 1: off; logits of tokens in the prompt or drawn before are divided by it, negative ones multiplied, before all else */
    const uint64_t *seeds;  /* (Q * n_per_sequence); NULL: 0, 1, 2, ... */
    const int32_t *eos_ids; /* (n_eos) a sequence ends with, and includes, the first of these */
    int64_t n_eos;
} stv_generate_options;

typedef struct stv_generator stv_generator; /* owns the key/value cache of one batch of prompts */

/* Runs the prompts (prefill) and keeps their keys and values. Continuation i*n_per_sequence+j is the j-th of sequence i.
 * Nothing is borrowed after the call but the model. forward: pixels/features, theta and adapters only. */
stv_status stv_generator_create(stv_generator **out, stv_model *model, const stv_batch *batch, const stv_forward_options *forward,
                                const stv_generate_options *options);
void stv_generator_free(stv_generator *generator);              /* takes NULL */
int64_t stv_generator_n(const stv_generator *generator);        /* continuations */
int64_t stv_generator_n_active(const stv_generator *generator); /* not finished */
/* The logits the next step draws from: (n, V) real, rows of finished continuations stale. Valid until the next step. */
const void *stv_generator_logits(const stv_generator *generator);
/* Draws one token for every active continuation and computes the next logits. Fills tokens (n), -1 where finished before, and logp (n) (may be
 * NULL) = log-probability of the token under the softmax of the logits as the model gave them. */
stv_status stv_generator_step(stv_generator *generator, int32_t *tokens, double *logp);
stv_status stv_generator_finish(stv_generator *generator, int64_t i); /* stop this continuation (a stop string was seen) */
/* Rows whose keys and values are kept. Of a generator of one continuation: the prompt's, then one for each token drawn, but for the last token of
 * a continuation that ended by itself. */
int64_t stv_generator_n_rows(const stv_generator *generator);
/* A generator of one continuation goes on with its first n_keep rows and the batch's one sequence behind them; only the latter is computed. Logits
 * and draws have the bits of a new generator of the whole. forward: pixels/features of the batch; theta and adapters stay those of creation.
 * Errors: argument (nothing has changed); memory, interrupted (n_keep rows are left and nothing is active until it is extended again). */
stv_status stv_generator_extend(stv_generator *generator, int64_t n_keep, const stv_batch *batch, const stv_forward_options *forward,
                                const stv_generate_options *options);

/* ---- images -------------------------------------------------------------------------------------------------------------------- */

/* Reads the header of a PNG, BMP or JPEG file, decodes nothing. channels: 1 grey, 2 grey + alpha, 3 colour or palette,
 * 4 colour + alpha or CMYK; bits: per sample as stored (palette: 8). Errors: format; unsupported = another kind of file, or
 * beyond the limits of image/decode.h. */
stv_status stv_image_probe(const void *bytes, size_t n, int *width_px, int *height_px, int *channels, int *bits);
/* Fills rgb (height_px, width_px, 3); rgb_bytes must be exactly that. The whole file is checked first: PNG structure and
 * checksums, BMP length. Errors: format = damaged or truncated; unsupported; shape; memory. */
stv_status stv_image_decode(const void *bytes, size_t n, uint8_t *rgb, size_t rgb_bytes);

typedef struct stv_image_options {
    int size_px;
    bool pad;              /* pad to a square first; false: long sides are cropped away */
    uint8_t background[3]; /* of the padding */
    float mean[3], std[3]; /* of pixels in 0..1; std > 0 */
} stv_image_options;

/* hwc (S,S,3) with S = size_px: the picture the model sees, the same bytes as Pillow's. rgb (height_px, width_px, 3); hwc
 * overlaps nothing. mean and std are not read. One scratch allocation. Errors: argument, memory. */
stv_status stv_image_resize_crop(uint8_t *hwc, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options);
/* chw (3,S,S) = (pixel/255 - mean) / std of the same picture. Errors: argument, memory. */
stv_status stv_image_preprocess(float *chw, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options);

/* ---- randomness ------------------------------------------------------------------------------------------------------------------ */

/* Fills out (n) of dtype with uniform draws in [low, high); the same for the same (seed, stream) everywhere. */
void stv_fill_uniform(void *out, int64_t n, stv_dtype dtype, double low, double high, uint64_t seed, uint64_t stream);

#endif
