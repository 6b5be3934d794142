/* run.h - Run, in three files: run.c has its life and the whole model, run_parts.c the tower and the projector alone, run_backward.c the backward
 * passes of all three. */
#ifndef STLLAVA_RUN_H
#define STLLAVA_RUN_H

#include "binding.h"

typedef enum last_call { LAST_NONE, LAST_FORWARD, LAST_VISION, LAST_PROJECTOR } last_call;

typedef struct run_object {
    PyObject_HEAD model_object *model;
    stv_run *run;
    last_call last;      /* what the core's views belong to */
    forward_call call;   /* its arguments: the core borrows them until the next */
    batch_object *batch; /* of LAST_FORWARD */
    PyObject *input;     /* of LAST_PROJECTOR */
    int64_t n_images, n_tokens;
} run_object;

/* Lets go of what the last call borrowed; nothing of it can be asked for or differentiated any more. */
void run_forget_last(run_object *self);
/* After a forward: the one before is forgotten, and this one's arguments are taken out of `call`; or -1 with the status' exception. */
int run_keep_last(run_object *self, last_call last, forward_call *call, stv_status status);
/* With the lock: -1 and an Error unless the last call was of this kind. */
int run_check_last(run_object *self, last_call wanted, const char *what, const char *before);
/* An array of the model's dtype. */
PyObject *run_real_copy(run_object *self, int ndim, const Py_ssize_t *shape, const void *data);
Py_ssize_t run_tokens_per_image(run_object *self);

/* ---- run_parts.c --------------------------------------------------------------------------------------------------------------- */

PyObject *run_encode(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_vision_forward(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_vision_hidden(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_vision_pooled(PyObject *object, PyObject *unused);
PyObject *run_projector_forward(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_cluster_assignment(PyObject *object, PyObject *unused);
PyObject *run_cluster_margin(PyObject *object, PyObject *unused);
extern const char encode_doc[], vision_forward_doc[], vision_hidden_doc[], vision_pooled_doc[], projector_forward_doc[], cluster_assignment_doc[],
    cluster_margin_doc[];

/* ---- run_backward.c ------------------------------------------------------------------------------------------------------------ */

PyObject *run_backward(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_vision_backward(PyObject *object, PyObject *args, PyObject *kwargs);
PyObject *run_projector_backward(PyObject *object, PyObject *args, PyObject *kwargs);
extern const char backward_doc[], vision_backward_doc[], projector_backward_doc[];

#endif
