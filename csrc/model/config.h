/* config.h - what a model configuration promises, and the sizes that follow from it. */
#ifndef STV_MODEL_CONFIG_H
#define STV_MODEL_CONFIG_H

#include "stllava.h"

#define STV_MAX_PROJECTOR_DEPTH 16

/* Errors: argument, naming the key, the range and what was found. */
stv_status stv_config_check(const stv_model_config *config);

int64_t stv_config_n_patches(const stv_vision_config *vision);       /* P: patches of one image */
int64_t stv_config_n_layers_used(const stv_vision_config *vision);   /* layers up to and with select_layer; later ones reach no output */
int64_t stv_config_tokens_per_image(const stv_model_config *config); /* T; 0 without a tower */

#endif
