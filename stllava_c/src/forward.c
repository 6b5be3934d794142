/* forward.c - the arguments that every forward shares: images or their features, and another flat trainable buffer. */
#include "binding.h"

int64_t feature_width(const model_object *model)
{
    const stv_model_config *c = &model->config;
    return c->has_projector ? c->projector.out_size : c->has_decoder ? c->decoder.hidden_size : c->vision.hidden_size;
}

static int take_pixels(forward_call *call, model_object *model, PyObject *what, PyObject *value, int64_t n_images)
{
    int64_t size = model->config.vision.image_size;
    if (!model->config.has_vision) {
        PyErr_Format(PyExc_ValueError, "%U: this model has no vision tower", what);
        return -1;
    }
    Py_ssize_t shape[4] = {(Py_ssize_t)n_images, 3, (Py_ssize_t)size, (Py_ssize_t)size};
    call->pixels = array_take(value, PyUnicode_AsUTF8AndSize(what, NULL), kind_of(model->dtype), 4, shape, &call->options.pixels);
    call->options.n_images = shape[0];
    return call->pixels ? 0 : -1;
}

static int take_features(forward_call *call, model_object *model, PyObject *what, PyObject *value, int64_t n_images)
{
    if (call->pixels) {
        PyErr_Format(PyExc_ValueError, "%U: pixels are given too; give one of the two", what);
        return -1;
    }
    if (model_enter(model) < 0) return -1;
    Py_ssize_t n = (Py_ssize_t)(n_images * stv_model_tokens_per_image(model->model) * feature_width(model));
    model_leave(model);
    call->features = array_take_flat(value, PyUnicode_AsUTF8AndSize(what, NULL), kind_of(model->dtype), &n, &call->options.features);
    return call->features ? 0 : -1;
}

static int take_theta(forward_call *call, model_object *model, PyObject *what, PyObject *value)
{
    if (borrow_buffer(&call->theta, value, PyUnicode_AsUTF8AndSize(what, NULL), kind_of(model->dtype), -1, false) < 0) {
        call->theta.obj = NULL;
        return -1;
    }
    call->options.theta = call->theta.buf;
    return 0;
}

int forward_take(forward_call *call, model_object *model, const char *what, forward_values values, int64_t n_images)
{
    static const char *const names[] = {"pixels", "features", "theta"};
    PyObject *const given[] = {values.pixels, values.features, values.theta};
    call->options.n_images = n_images < 0 ? 0 : n_images;
    for (int i = 0; i < 3; i++) {
        if (!given[i] || given[i] == Py_None) continue;
        PyObject *name = PyUnicode_FromFormat("%s: %s", what, names[i]);
        int result = !name    ? -1
                     : i == 0 ? take_pixels(call, model, name, given[i], n_images)
                     : i == 1 ? take_features(call, model, name, given[i], n_images)
                              : take_theta(call, model, name, given[i]);
        Py_XDECREF(name);
        if (result == 0) continue;
        forward_drop(call);
        return -1;
    }
    return 0;
}

int forward_check_theta(const forward_call *call, model_object *model, const char *what)
{
    if (!call->theta.obj) return 0;
    int64_t want = stv_model_n_trainable(model->model), found = call->theta.len / call->theta.itemsize;
    if (want == found) return 0;
    PyErr_Format(PyExc_ValueError, "%s: theta: want %lld elements, as many as train, got %lld", what, (long long)want, (long long)found);
    return -1;
}

void forward_drop(forward_call *call)
{
    Py_CLEAR(call->pixels);
    Py_CLEAR(call->features);
    PyBuffer_Release(&call->theta);
    call->options = (stv_forward_options){0};
}

int forward_traverse(const forward_call *call, visitproc visit, void *arg)
{
    Py_VISIT(call->pixels);
    Py_VISIT(call->features);
    Py_VISIT(call->theta.obj);
    return 0;
}
