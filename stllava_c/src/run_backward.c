/* run_backward.c - from d loss / d result of the last call to gradients: the same steps for the whole model, the tower and the projector. */
#include "run.h"

/* Numbers in the result of the last call. */
static Py_ssize_t result_size(run_object *self)
{
    const stv_model_config *c = &self->model->config;
    switch (self->last) {
    case LAST_FORWARD: return (Py_ssize_t)stv_batch_get(self->batch->batch).n_targets;
    case LAST_VISION: return (Py_ssize_t)(self->n_images * c->vision.hidden_size) * run_tokens_per_image(self);
    default: return (Py_ssize_t)(self->n_images * self->n_tokens * c->projector.out_size);
    }
}

/* Checks `gradient` (taken; NULL: failed) of n numbers against the last call, which must be of this kind, and differentiates it. Returns None, or
 * d loss / d input of the projector. */
static PyObject *differentiate(run_object *self, last_call kind, PyObject *gradient, Py_ssize_t n, const void *data, bool want_input)
{
    static const struct {
        const char *method, *argument, *before;
    } names[] = {
        [LAST_FORWARD] = {"Run.backward", "Run.backward: dlogp", "forward with train=True"},
        [LAST_VISION] = {"Run.vision_backward", "Run.vision_backward: dfeatures", "vision_forward with train=True"},
        [LAST_PROJECTOR] = {"Run.projector_backward", "Run.projector_backward: dout", "projector_forward with train=True"},
    };
    if (!gradient || model_enter(self->model) < 0) {
        Py_XDECREF(gradient);
        return NULL;
    }
    PyObject *result = NULL;
    void *dinput = NULL;
    Py_ssize_t shape[3] = {(Py_ssize_t)self->n_images, (Py_ssize_t)self->n_tokens, (Py_ssize_t)self->model->config.projector.in_size};
    if (run_check_last(self, kind, names[kind].method, names[kind].before) == 0 && check_size(names[kind].argument, result_size(self), n) == 0 &&
        (result = want_input ? array_new(kind_of(self->model->dtype), 3, shape, &dinput) : Py_NewRef(Py_None))) {
        stv_status status;
        watched w;
        watched_begin(&w, self->model);
        switch (kind) {
        case LAST_FORWARD: status = stv_run_backward(self->run, data); break;
        case LAST_VISION: status = stv_run_vision_backward(self->run, data); break;
        default: status = stv_run_projector_backward(self->run, data, dinput); break;
        }
        watched_end(&w);
        if (status != STV_OK) {
            Py_CLEAR(result);
            raise_status(state_of((PyObject *)self), status);
        }
    }
    model_leave(self->model);
    Py_DECREF(gradient);
    return result;
}

const char backward_doc[] = "backward($self, dlogp)\n--\n\n"
                            "Adds to the model's gradient buffer what d loss / d logp asks for. Once per forward with train=True.\n\n"
                            "Args:\n"
                            "    dlogp: (n_targets,) real numbers.\n\n"
                            "Raises:\n"
                            "    Error (\"state\"): no forward with train before it, or nothing trains. ValueError: dlogp has another length.\n"
                            "    What a signal handler raises, as in forward; the gradient buffer then holds a part of the gradient.";

PyObject *run_backward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dlogp", NULL};
    PyObject *value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:backward", names, &value)) return NULL;
    Py_ssize_t n = -1;
    const void *data = NULL;
    PyObject *dlogp = array_take_list(value, "Run.backward: dlogp", KIND_F64, &n, &data);
    return differentiate((run_object *)object, LAST_FORWARD, dlogp, n, data, false);
}

const char vision_backward_doc[] = "vision_backward($self, dfeatures)\n--\n\n"
                                   "Adds the tower's gradients for d loss / d features. Once per vision_forward with train=True.\n\n"
                                   "Args:\n"
                                   "    dfeatures: n*tokens_per_image*E real numbers, as vision_forward returned them.\n\n"
                                   "Raises:\n"
                                   "    Error (\"state\"): no vision_forward with train before it. ValueError: another size.";

PyObject *run_vision_backward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dfeatures", NULL};
    run_object *self = (run_object *)object;
    PyObject *value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:vision_backward", names, &value)) return NULL;
    Py_ssize_t n = -1;
    const void *data = NULL;
    PyObject *dfeatures = array_take_flat(value, "Run.vision_backward: dfeatures", kind_of(self->model->dtype), &n, &data);
    return differentiate(self, LAST_VISION, dfeatures, n, data, false);
}

const char projector_backward_doc[] = "projector_backward($self, dout, want_input_grad=True)\n--\n\n"
                                      "Adds the projector's gradients for d loss / d output. Once per projector_forward with train=True.\n\n"
                                      "Args:\n"
                                      "    dout: n_images*n_tokens*D real numbers, as projector_forward returned them.\n"
                                      "    want_input_grad: bool.\n\n"
                                      "Returns:\n"
                                      "    ndarray (n_images, n_tokens, E) of the model's dtype, d loss / d x; or None.\n\n"
                                      "Raises:\n"
                                      "    Error (\"state\"): no projector_forward with train before it. ValueError: another size.";

PyObject *run_projector_backward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dout", "want_input_grad", NULL};
    run_object *self = (run_object *)object;
    PyObject *value;
    int want = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:projector_backward", names, &value, &want)) return NULL;
    Py_ssize_t n = -1;
    const void *data = NULL;
    PyObject *dout = array_take_flat(value, "Run.projector_backward: dout", kind_of(self->model->dtype), &n, &data);
    return differentiate(self, LAST_PROJECTOR, dout, n, data, want);
}
