/* run.c - Run: one arena, the activations of one batch at a time. Everything it gives out is a copy. */
#include "run.h"

/* ---- life ---------------------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    run_doc,
    "Run(model)\n--\n\n"
    "Forward and backward passes of a model, in one block of memory that grows to what the largest batch needs. A model may have several.\n\n"
    "Raises:\n"
    "    Error (\"state\"): the model is closed. MemoryError.");

static PyObject *run_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model_value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!:Run", names, state->model, &model_value)) return NULL;
    model_object *model = (model_object *)model_value;
    run_object *self = (run_object *)new_instance(type);
    if (!self || model_enter(model) < 0) {
        Py_XDECREF((PyObject *)self);
        return NULL;
    }
    stv_status status = stv_run_create(&self->run, model->model);
    if (status == STV_OK) {
        self->model = model_ref(model);
        model->users++;
    }
    model_leave(model);
    if (status == STV_OK) return (PyObject *)self;
    self->run = NULL;
    raise_status(state, status);
    Py_DECREF((PyObject *)self);
    return NULL;
}

void run_forget_last(run_object *self)
{
    self->last = LAST_NONE;
    forward_drop(&self->call);
    Py_CLEAR(self->batch);
    Py_CLEAR(self->input);
}

int run_keep_last(run_object *self, last_call last, forward_call *call, stv_status status)
{
    run_forget_last(self);
    if (status != STV_OK) {
        raise_status(state_of((PyObject *)self), status);
        return -1;
    }
    self->last = last;
    self->call = *call;
    *call = (forward_call){0};
    return 0;
}

int run_check_last(run_object *self, last_call wanted, const char *what, const char *before)
{
    if (self->last == wanted) return 0;
    raise_state(state_of((PyObject *)self), "%s: call %s first; a failed or another call has its results no more", what, before);
    return -1;
}

PyObject *run_real_copy(run_object *self, int ndim, const Py_ssize_t *shape, const void *data)
{
    return array_copy(kind_of(self->model->dtype), ndim, shape, data);
}

Py_ssize_t run_tokens_per_image(run_object *self) { return (Py_ssize_t)stv_model_tokens_per_image(self->model->model); }

static int run_traverse(PyObject *object, visitproc visit, void *arg)
{
    run_object *self = (run_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->model);
    Py_VISIT(self->batch);
    Py_VISIT(self->input);
    return forward_traverse(&self->call, visit, arg);
}

static int run_clear(PyObject *object)
{
    run_object *self = (run_object *)object;
    run_forget_last(self);
    if (!self->model) return 0;
    model_lock(self->model);
    stv_run_free(self->run);
    self->run = NULL;
    self->model->users--;
    model_leave(self->model);
    Py_CLEAR(self->model);
    return 0;
}

static void run_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    run_clear(object);
    free_instance(object);
}

PyDoc_STRVAR(set_recompute_doc,
             "set_recompute($self, n_vision_layers, n_decoder_layers)\n--\n\n"
             "The first n layers of each stack keep only their input and compute again in backward: less memory, the same numbers. Default 0, 0.\n\n"
             "Raises:\n"
             "    ValueError: more layers than there are, or negative.");

static PyObject *run_set_recompute(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n_vision_layers", "n_decoder_layers", NULL};
    run_object *self = (run_object *)object;
    long long n_vision, n_decoder;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LL:set_recompute", names, &n_vision, &n_decoder)) return NULL;
    if (model_enter(self->model) < 0) return NULL;
    stv_status status = stv_run_set_recompute(self->run, n_vision, n_decoder);
    model_leave(self->model);
    if (status != STV_OK) return raise_status(state_of(object), status);
    Py_RETURN_NONE;
}

/* ---- the whole model ----------------------------------------------------------------------------------------------------------- */

/* (batch, *, pixels, ... mean_logit) of forward and estimate. */
static int take_batch_call(run_object *self, PyObject *args, PyObject *kwargs, const char *format, const char *what, forward_call *call,
                           batch_object **batch)
{
    static char *names[] = {"batch",       "pixels",  "features", "theta", "adapters",   "train",
                            "vision_grad", "dropout", "seed",     "step",  "mean_logit", NULL};
    PyObject *batch_value;
    forward_values values = {0};
    int adapters = 1, train = 0, vision_grad = 1, dropout = 0, mean_logit = 0;
    uint64_t seed = 0, step = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, names, state_of((PyObject *)self)->batch, &batch_value, &values.pixels, &values.features,
                                     &values.theta, &adapters, &train, &vision_grad, &dropout, convert_u64, &seed, convert_u64, &step, &mean_logit))
        return -1;
    *batch = (batch_object *)batch_value;
    if ((*batch)->model != self->model) {
        PyErr_Format(PyExc_ValueError, "%s: the batch was made for another model", what);
        return -1;
    }
    if (forward_take(call, self->model, what, values, stv_batch_get((*batch)->batch).n_images) < 0) return -1;
    call->options.adapters = adapters;
    call->options.train = train;
    call->options.vision_grad = vision_grad;
    call->options.dropout = dropout;
    call->options.seed = seed;
    call->options.step = step;
    call->options.mean_logit = mean_logit;
    return 0;
}

PyDoc_STRVAR(
    forward_doc,
    "forward($self, batch, *, pixels=None, features=None, theta=None, adapters=True, train=False, vision_grad=True, dropout=False, seed=0, step=0, "
    "mean_logit=False)\n--\n\n"
    "Log-probabilities of a batch's targets.\n\n"
    "Args:\n"
    "    batch: Batch of this run's model.\n"
    "    pixels: (n_images, 3, size, size) normalised images, real numbers; kept until the next forward.\n"
    "    features: (n_images*tokens_per_image, D) projected image features in place of pixels: tower and projector do not run.\n"
    "    theta: (n_trainable,) of the model's dtype, in place of the model's own trainable values: a reference policy. Kept likewise.\n"
    "    adapters: bool, False: LoRA off.\n"
    "    train: bool, keep what backward needs.\n"
    "    vision_grad: bool, False: no gradient into the tower (as the original trains).\n"
    "    dropout: bool, the adapters' dropout on, drawn from (seed, step).\n"
    "    seed, step: int in [0, 2**64).\n"
    "    mean_logit: bool, also compute the mean over the vocabulary of the logits at every label's row.\n\n"
    "Returns:\n"
    "    ndarray (n_targets,) float64.\n\n"
    "Raises:\n"
    "    ValueError, TypeError: arguments that do not fit. Error (\"state\"): an unbound tensor. MemoryError.\n"
    "    NumericError: a log-probability is not finite.\n"
    "    What a signal handler raises (KeyboardInterrupt): on the main thread handlers run about every 50 ms, and the call then ends early.");

static PyObject *run_forward(PyObject *object, PyObject *args, PyObject *kwargs)
{
    run_object *self = (run_object *)object;
    forward_call call = {0};
    batch_object *batch;
    if (take_batch_call(self, args, kwargs, "O!|$OOOppppO&O&p:forward", "Run.forward", &call, &batch) < 0) return NULL;
    PyObject *logp = NULL;
    stv_status status = STV_OK;
    if (model_enter(self->model) < 0) goto done;
    if (forward_check_theta(&call, self->model, "Run.forward") == 0) {
        watched w;
        watched_begin(&w, self->model);
        status = stv_run_forward(self->run, batch->batch, &call.options);
        watched_end(&w);
        if (run_keep_last(self, LAST_FORWARD, &call, status) == 0) {
            self->batch = (batch_object *)Py_NewRef((PyObject *)batch);
            Py_ssize_t n = (Py_ssize_t)stv_batch_get(batch->batch).n_targets;
            logp = array_copy(KIND_F64, 1, &n, stv_run_logp(self->run));
        }
    }
    model_leave(self->model);
done:
    forward_drop(&call);
    return logp;
}

PyDoc_STRVAR(logits_doc, "logits($self, rows)\n--\n\n"
                         "Logits of any rows of the last forward.\n\n"
                         "Args:\n"
                         "    rows: (n,) integers in [0, n_rows).\n\n"
                         "Returns:\n"
                         "    ndarray (n, vocab_size) of the model's dtype.\n\n"
                         "Raises:\n"
                         "    Error (\"state\"): no forward before it. ValueError: a row out of range.");

static PyObject *run_logits(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rows", NULL};
    run_object *self = (run_object *)object;
    PyObject *value, *rows = NULL, *logits = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:logits", names, &value)) return NULL;
    Py_ssize_t n = -1;
    const void *indices;
    if (!(rows = array_take_list(value, "Run.logits: rows", KIND_I64, &n, &indices)) || model_enter(self->model) < 0) {
        Py_XDECREF(rows);
        return NULL;
    }
    if (run_check_last(self, LAST_FORWARD, "Run.logits", "forward") == 0) {
        void *data;
        logits = array_new(kind_of(self->model->dtype), 2, (Py_ssize_t[]){n, (Py_ssize_t)self->model->config.decoder.vocab_size}, &data);
        if (logits) {
            stv_status status;
            watched w;
            watched_begin(&w, self->model);
            status = stv_run_logits(self->run, indices, n, data);
            watched_end(&w);
            if (status != STV_OK) {
                Py_CLEAR(logits);
                raise_status(state_of(object), status);
            }
        }
    }
    model_leave(self->model);
    Py_DECREF(rows);
    return logits;
}

PyDoc_STRVAR(
    estimate_doc,
    "estimate($self, batch, *, pixels=None, features=None, theta=None, adapters=True, train=False, vision_grad=True, dropout=False, seed=0, step=0, "
    "mean_logit=False)\n--\n\n"
    "Bytes of working memory that forward (and backward, with train) would need; takes forward's arguments and computes nothing else.");

static PyObject *run_estimate(PyObject *object, PyObject *args, PyObject *kwargs)
{
    run_object *self = (run_object *)object;
    forward_call call = {0};
    batch_object *batch;
    if (take_batch_call(self, args, kwargs, "O!|$OOOppppO&O&p:estimate", "Run.estimate", &call, &batch) < 0) return NULL;
    PyObject *result = NULL;
    if (model_enter(self->model) == 0) {
        size_t bytes = 0;
        if (forward_check_theta(&call, self->model, "Run.estimate") == 0) {
            stv_status status = stv_run_estimate(self->run, batch->batch, &call.options, &bytes);
            result = status == STV_OK ? PyLong_FromSize_t(bytes) : raise_status(state_of(object), status);
        }
        model_leave(self->model);
    }
    forward_drop(&call);
    return result;
}

/* ---- attributes ---------------------------------------------------------------------------------------------------------------- */

static PyObject *get_mean_logit(PyObject *object, void *unused)
{
    (void)unused;
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    PyObject *result = NULL;
    if (run_check_last(self, LAST_FORWARD, "Run.mean_logit", "forward") == 0) {
        Py_ssize_t n = (Py_ssize_t)stv_batch_get(self->batch->batch).n_targets;
        const double *data = stv_run_mean_logit(self->run);
        result = data ? array_copy(KIND_F64, 1, &n, data) : Py_NewRef(Py_None);
    }
    model_leave(self->model);
    return result;
}

static PyObject *get_features(PyObject *object, void *unused)
{
    (void)unused;
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    PyObject *result = NULL;
    if (run_check_last(self, LAST_FORWARD, "Run.features", "forward") == 0) {
        Py_ssize_t n_images = (Py_ssize_t)stv_batch_get(self->batch->batch).n_images;
        Py_ssize_t shape[2] = {n_images * run_tokens_per_image(self), (Py_ssize_t)feature_width(self->model)};
        const void *data = stv_run_features(self->run);
        result = data ? run_real_copy(self, 2, shape, data) : Py_NewRef(Py_None);
    }
    model_leave(self->model);
    return result;
}

static PyObject *get_embeddings(PyObject *object, void *unused)
{
    (void)unused;
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    PyObject *result = NULL;
    if (run_check_last(self, LAST_FORWARD, "Run.embeddings", "forward") == 0) {
        Py_ssize_t shape[2] = {(Py_ssize_t)stv_batch_get(self->batch->batch).n_rows, (Py_ssize_t)self->model->config.decoder.hidden_size};
        result = run_real_copy(self, 2, shape, stv_run_embeddings(self->run));
    }
    model_leave(self->model);
    return result;
}

static PyObject *get_arena_bytes(PyObject *object, void *unused)
{
    (void)unused;
    run_object *self = (run_object *)object;
    if (model_enter(self->model) < 0) return NULL;
    size_t bytes = stv_run_arena_bytes(self->run);
    model_leave(self->model);
    return PyLong_FromSize_t(bytes);
}

static PyGetSetDef getset[] = {
    {"mean_logit", get_mean_logit, NULL, "ndarray (n_targets,) float64 of the last forward, None unless asked for", NULL},
    {"features", get_features, NULL, "ndarray (n_images*tokens_per_image, D), the last forward's projected image features; None without images",
     NULL},
    {"embeddings", get_embeddings, NULL, "ndarray (n_rows, D), the rows that entered the decoder in the last forward", NULL},
    {"arena_bytes", get_arena_bytes, NULL, "int, working memory held now", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"set_recompute", KEYWORDS(run_set_recompute), set_recompute_doc},
    {"forward", KEYWORDS(run_forward), forward_doc},
    {"backward", KEYWORDS(run_backward), backward_doc},
    {"logits", KEYWORDS(run_logits), logits_doc},
    {"estimate", KEYWORDS(run_estimate), estimate_doc},
    {"encode", KEYWORDS(run_encode), encode_doc},
    {"vision_forward", KEYWORDS(run_vision_forward), vision_forward_doc},
    {"vision_hidden", KEYWORDS(run_vision_hidden), vision_hidden_doc},
    {"vision_pooled", run_vision_pooled, METH_NOARGS, vision_pooled_doc},
    {"vision_backward", KEYWORDS(run_vision_backward), vision_backward_doc},
    {"projector_forward", KEYWORDS(run_projector_forward), projector_forward_doc},
    {"cluster_assignment", run_cluster_assignment, METH_NOARGS, cluster_assignment_doc},
    {"cluster_margin", run_cluster_margin, METH_NOARGS, cluster_margin_doc},
    {"projector_backward", KEYWORDS(run_projector_backward), projector_backward_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)run_doc}, {Py_tp_new, run_new},     {Py_tp_dealloc, run_dealloc}, {Py_tp_traverse, run_traverse},
    {Py_tp_clear, run_clear},     {Py_tp_methods, methods}, {Py_tp_getset, getset},       {0, NULL},
};

PyType_Spec run_spec = {
    .name = "stllava_c.Run",
    .basicsize = sizeof(run_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
