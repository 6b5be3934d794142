/* door.h - the functions of stllava.h that compute in the model's precision, declared for both; stllava.c picks one by the model's dtype. */
#ifndef STV_MODEL_DOOR_H
#define STV_MODEL_DOOR_H

#include "stllava.h"

#define STV_DECLARE(result, name, ...) \
    result name##_f32(__VA_ARGS__); \
    result name##_f64(__VA_ARGS__)

STV_DECLARE(stv_status, stv_model_merge_lora, stv_model *model);
STV_DECLARE(stv_status, stv_model_effective_weight, stv_model *model, const char *module, void *fills);

STV_DECLARE(stv_status, stv_run_create, stv_run **out, stv_model *model);
STV_DECLARE(void, stv_run_free, stv_run *run);
STV_DECLARE(stv_status, stv_run_forward, stv_run *run, const stv_batch *batch, const stv_forward_options *options);
STV_DECLARE(stv_status, stv_run_logits, stv_run *run, const int64_t *rows, int64_t n, void *out);
STV_DECLARE(stv_status, stv_run_backward, stv_run *run, const double *dlogp);
STV_DECLARE(stv_status, stv_run_estimate, stv_run *run, const stv_batch *batch, const stv_forward_options *options, size_t *bytes);
STV_DECLARE(stv_status, stv_run_vision_forward, stv_run *run, const stv_forward_options *options, bool all_layers);
STV_DECLARE(const void *, stv_run_vision_hidden, const stv_run *run, int64_t i);
STV_DECLARE(stv_status, stv_run_vision_backward, stv_run *run, const void *dfeatures);
STV_DECLARE(stv_status, stv_run_projector_forward, stv_run *run, const void *in, int64_t n_images, int64_t n_tokens,
            const stv_forward_options *options);
STV_DECLARE(stv_status, stv_run_projector_backward, stv_run *run, const void *dout, void *din);
STV_DECLARE(stv_status, stv_run_encode, stv_run *run, const stv_forward_options *options, void *features);

#endif
