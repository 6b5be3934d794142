/* model.h - Model, in three files: model.c has its life, its tensors and the lock, model_config.c the dictionary of Model(config), model_trainable.c
 * adapters and what trains. */
#ifndef STLLAVA_MODEL_H
#define STLLAVA_MODEL_H

#include "binding.h"

/* model_enter for calls that move memory: no array or memoryview may look at it. */
int model_enter_unexported(model_object *self, const char *what);
/* model_leave, then None, or the status' exception. */
PyObject *model_leave_with(model_object *self, stv_status status);
/* With the lock. False with ValueError when there is no such tensor. */
bool model_find_tensor(model_object *self, const char *what, const char *name, stv_tensor_info *info);

/* ---- model_config.c ------------------------------------------------------------------------------------------------------------ */

/* Unknown, missing and mistyped keys raise ValueError or TypeError: -1. */
int model_config_take(stv_model_config *config, PyObject *values);
PyObject *model_config_give(const stv_model_config *config);

/* ---- model_trainable.c --------------------------------------------------------------------------------------------------------- */

PyObject *model_linear_modules(PyObject *object, PyObject *unused);
PyObject *model_add_lora(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *model_merge_lora(PyObject *object, PyObject *unused);
PyObject *model_unmerge_lora(PyObject *object, PyObject *unused);
PyObject *model_effective_weight(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *model_set_trainable(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *model_zero_grad(PyObject *object, PyObject *unused);
PyObject *model_get_theta(PyObject *object, void *unused);
PyObject *model_get_grad(PyObject *object, void *unused);
extern const char linear_modules_doc[], add_lora_doc[], merge_lora_doc[], unmerge_lora_doc[], effective_weight_doc[], set_trainable_doc[],
    zero_grad_doc[];

#endif
