/* generator.c - Generator: prompts computed once, then one token of every continuation per step. */
#include "binding.h"

typedef struct generator_object {
    PyObject_HEAD model_object *model;
    stv_generator *generator; /* NULL: closed */
    int64_t n;
} generator_object;

PyDoc_STRVAR(
    generator_doc,
    "Generator(model, batch, *, pixels=None, features=None, theta=None, adapters=True, temperature=0.0, top_k=0, top_p=1.0, n_per_sequence=1, "
    "max_new_tokens, seeds=None, eos_ids=())\n--\n\n"
    "Continues every sequence of a batch. Shared prefixes are computed once. Continuation i*n_per_sequence+j is the j-th of sequence i.\n\n"
    "Args:\n"
    "    model: Model with a decoder.\n"
    "    batch: Batch of this model; labels are not looked at.\n"
    "    pixels, features, theta, adapters: as in Run.forward.\n"
    "    temperature: float >= 0; 0: the likeliest token.\n"
    "    top_k: int >= 0; 0: off. top_p: float in (0, 1]; 1: off.\n"
    "    n_per_sequence: int >= 1.\n"
    "    max_new_tokens: int >= 1.\n"
    "    seeds: (n,) integers in [0, 2**64), one per continuation, which alone decides its draws; None: 0, 1, 2, ...\n"
    "    eos_ids: token ids; a continuation ends with, and includes, the first of these.\n\n"
    "Raises:\n"
    "    As Run.forward.\n\n"
    "Source: the order temperature, top-k, top-p of transformers 4.31.");

static PyObject *generator_create(PyTypeObject *type, model_object *model, batch_object *batch, forward_call *call, stv_generate_options *options,
                                  Py_ssize_t n_seeds)
{
    core_state *state = PyType_GetModuleState(type);
    Py_ssize_t n_sequences = (Py_ssize_t)stv_batch_get(batch->batch).n_sequences, want;
    if (options->n_per_sequence < 1 || options->n_per_sequence > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "Generator: n_per_sequence is %lld, want at least 1", (long long)options->n_per_sequence);
    want = n_sequences * (Py_ssize_t)options->n_per_sequence;
    if (options->seeds && check_size("Generator: seeds", want, n_seeds) < 0) return NULL;
    generator_object *self = (generator_object *)new_instance(type);
    if (!self || model_enter(model) < 0) {
        Py_XDECREF((PyObject *)self);
        return NULL;
    }
    stv_status status = STV_OK;
    if (forward_check_theta(call, model, "Generator") == 0) {
        watched w;
        watched_begin(&w, model);
        status = stv_generator_create(&self->generator, model->model, batch->batch, &call->options, options);
        watched_end(&w);
        if (status == STV_OK) {
            self->model = model_ref(model);
            self->n = stv_generator_n(self->generator);
            model->users++;
        } else {
            self->generator = NULL;
            raise_status(state, status);
        }
    }
    model_leave(model);
    if (self->generator) return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return NULL;
}

static PyObject *generator_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "batch", "pixels",         "features",       "theta", "adapters", "temperature",
                            "top_k", "top_p", "n_per_sequence", "max_new_tokens", "seeds", "eos_ids",  NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model_value, *batch_value, *max_value = NULL, *seeds_value = NULL, *eos_value = NULL, *seeds = NULL, *eos = NULL, *result = NULL;
    forward_values values = {0};
    int adapters = 1;
    long long top_k = 0, n_per_sequence = 1;
    stv_generate_options options = {.sampling.top_p = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|$OOOpdLdLOOO:Generator", names, state->model, &model_value, state->batch, &batch_value,
                                     &values.pixels, &values.features, &values.theta, &adapters, &options.sampling.temperature, &top_k,
                                     &options.sampling.top_p, &n_per_sequence, &max_value, &seeds_value, &eos_value))
        return NULL;
    if (check_given(max_value, "Generator", "max_new_tokens") < 0) return NULL;
    options.max_new_tokens = PyNumber_AsSsize_t(max_value, PyExc_ValueError);
    if (PyErr_Occurred()) return NULL;
    options.sampling.top_k = top_k;
    options.n_per_sequence = n_per_sequence;

    model_object *model = (model_object *)model_value;
    batch_object *batch = (batch_object *)batch_value;
    if (batch->model != model) return PyErr_Format(PyExc_ValueError, "Generator: the batch was made for another model");
    forward_call call = {0};
    Py_ssize_t n_seeds = -1, n_eos = -1;
    const void *data;
    if (seeds_value && seeds_value != Py_None) {
        if (!(seeds = array_take_list(seeds_value, "Generator: seeds", KIND_U64, &n_seeds, &data))) goto done;
        options.seeds = data;
    }
    if (eos_value) {
        if (!(eos = array_take_list(eos_value, "Generator: eos_ids", KIND_I32, &n_eos, &data))) goto done;
        options.eos_ids = data;
        options.n_eos = n_eos;
    }
    if (forward_take(&call, model, "Generator", values, stv_batch_get(batch->batch).n_images) < 0) goto done;
    call.options.adapters = adapters;
    result = generator_create(type, model, batch, &call, &options, n_seeds);
done:
    forward_drop(&call);
    Py_XDECREF(seeds);
    Py_XDECREF(eos);
    return result;
}

static int generator_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((generator_object *)object)->model);
    return 0;
}

static int generator_clear(PyObject *object)
{
    generator_object *self = (generator_object *)object;
    if (!self->model) return 0;
    model_lock(self->model);
    if (self->generator) self->model->users--;
    stv_generator_free(self->generator);
    self->generator = NULL;
    model_leave(self->model);
    return 0;
}

static void generator_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    generator_clear(object);
    Py_CLEAR(((generator_object *)object)->model);
    free_instance(object);
}

PyDoc_STRVAR(close_doc, "close($self)\n--\n\nFrees the key/value cache now. Closing twice is fine; everything else raises Error afterwards.");

static PyObject *generator_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    generator_object *self = (generator_object *)object;
    if (!self->generator) Py_RETURN_NONE;
    if (model_enter(self->model) < 0) return NULL;
    generator_clear(object);
    model_leave(self->model);
    Py_RETURN_NONE;
}

/* Takes the model's lock; -1 with an Error when the generator is closed. */
static int generator_enter(generator_object *self)
{
    if (model_enter(self->model) < 0) return -1;
    if (self->generator) return 0;
    model_leave(self->model);
    raise_state(state_of((PyObject *)self), "the generator is closed");
    return -1;
}

PyDoc_STRVAR(
    step_doc,
    "step($self)\n--\n\n"
    "Draws one token for every continuation that is not finished, and computes the next logits.\n\n"
    "Returns:\n"
    "    (tokens, logp): ndarray (n,) int32, -1 where finished before; ndarray (n,) float64, the token's log-probability under the\n"
    "    unfiltered softmax.\n\n"
    "Raises:\n"
    "    Error (\"state\"): closed. NumericError: a logit is not finite. What a signal handler raises, as in Run.forward; the step can then be\n"
    "    taken again, with the same tokens.");

static PyObject *generator_step(PyObject *object, PyObject *unused)
{
    (void)unused;
    generator_object *self = (generator_object *)object;
    Py_ssize_t n = (Py_ssize_t)self->n;
    void *tokens_data, *logp_data;
    PyObject *tokens = array_new(KIND_I32, 1, &n, &tokens_data), *logp = array_new(KIND_F64, 1, &n, &logp_data);
    PyObject *result = tokens && logp ? PyTuple_Pack(2, tokens, logp) : NULL; /* before the step: a drawn token must not get lost */
    if (result && generator_enter(self) < 0) {
        Py_CLEAR(result);
    } else if (result) {
        stv_status status;
        watched w;
        watched_begin(&w, self->model);
        status = stv_generator_step(self->generator, tokens_data, logp_data);
        watched_end(&w);
        model_leave(self->model);
        if (status != STV_OK) {
            Py_CLEAR(result);
            raise_status(state_of(object), status);
        }
    }
    Py_XDECREF(tokens);
    Py_XDECREF(logp);
    return result;
}

PyDoc_STRVAR(finish_doc, "finish($self, i)\n--\n\n"
                         "Stops continuation i: a stop string was seen.\n\n"
                         "Raises:\n"
                         "    ValueError: i is not in [0, n). Error (\"state\"): closed.");

static PyObject *generator_finish(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"i", NULL};
    generator_object *self = (generator_object *)object;
    long long i;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "L:finish", names, &i)) return NULL;
    if (generator_enter(self) < 0) return NULL;
    stv_status status = stv_generator_finish(self->generator, i);
    model_leave(self->model);
    if (status != STV_OK) return raise_status(state_of(object), status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    logits_doc,
    "logits($self)\n--\n\n"
    "The logits the next step draws from: ndarray (n, vocab_size) of the model's dtype, a copy; rows of finished continuations are stale.\n\n"
    "Raises:\n"
    "    Error (\"state\"): closed.");

static PyObject *generator_logits(PyObject *object, PyObject *unused)
{
    (void)unused;
    generator_object *self = (generator_object *)object;
    if (generator_enter(self) < 0) return NULL;
    Py_ssize_t shape[2] = {(Py_ssize_t)self->n, (Py_ssize_t)self->model->config.decoder.vocab_size};
    PyObject *logits = array_copy(kind_of(self->model->dtype), 2, shape, stv_generator_logits(self->generator));
    model_leave(self->model);
    return logits;
}

static PyObject *get_n(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((generator_object *)object)->n);
}

static PyObject *get_n_active(PyObject *object, void *unused)
{
    (void)unused;
    generator_object *self = (generator_object *)object;
    if (generator_enter(self) < 0) return NULL;
    int64_t n = stv_generator_n_active(self->generator);
    model_leave(self->model);
    return PyLong_FromLongLong(n);
}

static PyGetSetDef getset[] = {
    {"n", get_n, NULL, "int, continuations", NULL},
    {"n_active", get_n_active, NULL, "int, continuations not finished", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"step", generator_step, METH_NOARGS, step_doc},
    {"finish", KEYWORDS(generator_finish), finish_doc},
    {"logits", generator_logits, METH_NOARGS, logits_doc},
    {"close", generator_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)generator_doc},
    {Py_tp_new, generator_new},
    {Py_tp_dealloc, generator_dealloc},
    {Py_tp_traverse, generator_traverse},
    {Py_tp_clear, generator_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {0, NULL},
};

PyType_Spec generator_spec = {
    .name = "stllava_c.Generator",
    .basicsize = sizeof(generator_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
