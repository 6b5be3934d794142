/* run_parts.c - the tower and the projector alone. */
#include "run.h"

const char encode_doc[] = "encode($self, pixels, *, theta=None, adapters=True)\n--\n\n"
                          "Tower and projector: image features for later use as forward's `features`.\n\n"
                          "Args:\n"
                          "    pixels: (n, 3, size, size) real numbers. theta, adapters: as in forward.\n\n"
                          "Returns:\n"
                          "    ndarray (n*tokens_per_image, D) of the model's dtype.\n\n"
                          "Raises:\n"
                          "    As forward.";

PyObject *run_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixels", "theta", "adapters", NULL};
    run_object *self = (run_object *)object;
    forward_values values = {0};
    forward_call call = {0};
    int adapters = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$Op:encode", names, &values.pixels, &values.theta, &adapters)) return NULL;
    if (values.pixels == Py_None) return PyErr_Format(PyExc_TypeError, "Run.encode: pixels is None, want an array");
    if (forward_take(&call, self->model, "Run.encode", values, -1) < 0) return NULL;
    call.options.adapters = adapters;
    PyObject *features = NULL;
    if (model_enter(self->model) == 0) {
        void *data;
        Py_ssize_t shape[2] = {(Py_ssize_t)call.options.n_images * run_tokens_per_image(self), (Py_ssize_t)feature_width(self->model)};
        if (forward_check_theta(&call, self->model, "Run.encode") == 0 && (features = array_new(kind_of(self->model->dtype), 2, shape, &data))) {
            stv_status status;
            watched w;
            watched_begin(&w, self->model);
            status = stv_run_encode(self->run, &call.options, data);
            watched_end(&w);
            run_forget_last(self);
            if (status != STV_OK) {
                Py_CLEAR(features);
                raise_status(state_of(object), status);
            }
        }
        model_leave(self->model);
    }
    forward_drop(&call);
    return features;
}

const char vision_forward_doc[] = "vision_forward($self, pixels, *, all_layers=False, theta=None, adapters=True, train=False)\n--\n\n"
                                  "The tower alone.\n\n"
                                  "Args:\n"
                                  "    pixels: (n, 3, size, size) real numbers.\n"
                                  "    all_layers: bool, also compute what vision_hidden and vision_pooled give.\n"
                                  "    theta, adapters, train: as in forward; train allows vision_backward.\n\n"
                                  "Returns:\n"
                                  "    ndarray (n*tokens_per_image, E) of the model's dtype.\n\n"
                                  "Raises:\n"
                                  "    As forward.";

PyObject *run_vision_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pixels", "all_layers", "theta", "adapters", "train", NULL};
    run_object *self = (run_object *)object;
    forward_values values = {0};
    forward_call call = {0};
    int all_layers = 0, adapters = 1, train = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$pOpp:vision_forward", names, &values.pixels, &all_layers, &values.theta, &adapters, &train))
        return NULL;
    if (values.pixels == Py_None) return PyErr_Format(PyExc_TypeError, "Run.vision_forward: pixels is None, want an array");
    if (forward_take(&call, self->model, "Run.vision_forward", values, -1) < 0) return NULL;
    call.options.adapters = adapters;
    call.options.train = train;
    call.options.vision_grad = true;
    PyObject *features = NULL;
    if (model_enter(self->model) == 0) {
        if (forward_check_theta(&call, self->model, "Run.vision_forward") == 0) {
            stv_status status;
            watched w;
            watched_begin(&w, self->model);
            status = stv_run_vision_forward(self->run, &call.options, all_layers);
            watched_end(&w);
            if (run_keep_last(self, LAST_VISION, &call, status) == 0) {
                self->n_images = self->call.options.n_images;
                Py_ssize_t shape[2] = {(Py_ssize_t)self->n_images * run_tokens_per_image(self), (Py_ssize_t)self->model->config.vision.hidden_size};
                features = run_real_copy(self, 2, shape, stv_run_vision_features(self->run));
            }
        }
        model_leave(self->model);
    }
    forward_drop(&call);
    return features;
}

const char vision_hidden_doc[] = "vision_hidden($self, i)\n--\n\n"
                                 "hidden_states[i] after vision_forward(all_layers=True): 0 is the input of the first layer.\n\n"
                                 "Args:\n"
                                 "    i: int in [0, n_layers].\n\n"
                                 "Returns:\n"
                                 "    ndarray (n*(patches+1), E) of the model's dtype, class token first.\n\n"
                                 "Raises:\n"
                                 "    Error (\"state\"): not computed. ValueError: i out of range.";

PyObject *run_vision_hidden(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"i", NULL};
    run_object *self = (run_object *)object;
    long long i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L:vision_hidden", names, &i)) return NULL;
    const stv_vision_config *c = &self->model->config.vision;
    if (i < 0 || i > c->n_layers) return PyErr_Format(PyExc_ValueError, "Run.vision_hidden: i is %lld, want 0 to %lld", i, (long long)c->n_layers);
    if (model_enter(self->model) < 0) return NULL;
    PyObject *hidden = NULL;
    if (run_check_last(self, LAST_VISION, "Run.vision_hidden", "vision_forward with all_layers=True") == 0) {
        int64_t side = c->image_size / c->patch_size;
        Py_ssize_t shape[2] = {(Py_ssize_t)(self->n_images * (side * side + 1)), (Py_ssize_t)c->hidden_size};
        const void *data = stv_run_vision_hidden(self->run, i);
        hidden = data ? run_real_copy(self, 2, shape, data)
                      : raise_state(state_of(object), "Run.vision_hidden: hidden states are kept only by vision_forward with all_layers=True");
    }
    model_leave(self->model);
    return hidden;
}

const char vision_pooled_doc[] =
    "vision_pooled($self)\n--\n\n"
    "The post-LayerNorm of the class token after vision_forward(all_layers=True): ndarray (n, E) of the model's dtype.\n\n"
    "Raises:\n"
    "    Error (\"state\"): not computed.";

PyObject *run_vision_pooled(PyObject *object, PyObject *unused)
{
    (void)unused;
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    PyObject *pooled = NULL;
    if (run_check_last(self, LAST_VISION, "Run.vision_pooled", "vision_forward with all_layers=True") == 0) {
        Py_ssize_t shape[2] = {(Py_ssize_t)self->n_images, (Py_ssize_t)self->model->config.vision.hidden_size};
        const void *data = stv_run_vision_pooled(self->run);
        pooled = data ? run_real_copy(self, 2, shape, data)
                      : raise_state(state_of(object), "Run.vision_pooled: computed only by vision_forward with all_layers=True");
    }
    model_leave(self->model);
    return pooled;
}

const char projector_forward_doc[] = "projector_forward($self, x, *, theta=None, train=False)\n--\n\n"
                                     "The projector alone.\n\n"
                                     "Args:\n"
                                     "    x: (n_images, n_tokens, E) real numbers; n_tokens need not be the tower's. Kept until the next forward.\n"
                                     "    theta, train: as in forward; train allows projector_backward.\n\n"
                                     "Returns:\n"
                                     "    ndarray (n_images, n_tokens, D) of the model's dtype.\n\n"
                                     "Raises:\n"
                                     "    As forward.";

PyObject *run_projector_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "theta", "train", NULL};
    run_object *self = (run_object *)object;
    const stv_projector_config *c = &self->model->config.projector;
    PyObject *value, *output = NULL;
    forward_values values = {0};
    forward_call call = {0};
    int train = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$Op:projector_forward", names, &value, &values.theta, &train)) return NULL;
    if (!self->model->config.has_projector) return PyErr_Format(PyExc_ValueError, "Run.projector_forward: this model has no projector");
    Py_ssize_t shape[3] = {-1, -1, (Py_ssize_t)c->in_size};
    const void *data;
    PyObject *x = array_take(value, "Run.projector_forward: x", kind_of(self->model->dtype), 3, shape, &data);
    if (!x || forward_take(&call, self->model, "Run.projector_forward", values, -1) < 0 || model_enter(self->model) < 0) goto done;
    call.options.train = train;
    call.options.adapters = true;
    if (forward_check_theta(&call, self->model, "Run.projector_forward") == 0) {
        stv_status status;
        watched w;
        watched_begin(&w, self->model);
        status = stv_run_projector_forward(self->run, data, shape[0], shape[1], &call.options);
        watched_end(&w);
        if (run_keep_last(self, LAST_PROJECTOR, &call, status) == 0) {
            self->input = Py_NewRef(x);
            self->n_images = shape[0];
            self->n_tokens = shape[1];
            output = run_real_copy(self, 3, (Py_ssize_t[]){shape[0], shape[1], (Py_ssize_t)c->out_size}, stv_run_projector_output(self->run));
        }
    }
    model_leave(self->model);
done:
    forward_drop(&call);
    Py_XDECREF(x);
    return output;
}

static PyObject *cluster_result(PyObject *object, const char *what, bool margin)
{
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    PyObject *result = NULL;
    if (run_check_last(self, LAST_PROJECTOR, what, "projector_forward") == 0) {
        Py_ssize_t n = (Py_ssize_t)(self->n_images * self->n_tokens);
        const void *data = margin ? (const void *)stv_run_cluster_margin(self->run) : (const void *)stv_run_cluster_assignment(self->run);
        result = data ? array_copy(margin ? KIND_F64 : KIND_I32, 1, &n, data)
                      : raise_state(state_of(object), "%s: this model's projector is not of kind cluster", what);
    }
    model_leave(self->model);
    return result;
}

const char cluster_assignment_doc[] = "cluster_assignment($self)\n--\n\n"
                                      "The centre of each token after projector_forward: ndarray (n_images*n_tokens,) int32.\n\n"
                                      "Raises:\n"
                                      "    Error (\"state\"): no projector_forward before it, or another kind of projector.";

PyObject *run_cluster_assignment(PyObject *object, PyObject *unused)
{
    (void)unused;
    return cluster_result(object, "Run.cluster_assignment", false);
}

const char cluster_margin_doc[] = "cluster_margin($self)\n--\n\n"
                                  "Best minus second-best similarity of each token after projector_forward: ndarray (n_images*n_tokens,) float64.\n\n"
                                  "Raises:\n"
                                  "    Error (\"state\"): no projector_forward before it, or another kind of projector.";

PyObject *run_cluster_margin(PyObject *object, PyObject *unused)
{
    (void)unused;
    return cluster_result(object, "Run.cluster_margin", true);
}
