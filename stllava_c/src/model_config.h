/* model_config.h - the dictionary of Model(config). */
#ifndef STLLAVA_MODEL_CONFIG_H
#define STLLAVA_MODEL_CONFIG_H

#include "binding.h"

/* Unknown, missing and mistyped keys raise ValueError or TypeError: -1. */
int model_config_take(stv_model_config *config, PyObject *values);
PyObject *model_config_give(const stv_model_config *config);

#endif
