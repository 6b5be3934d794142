/* generator.c - Generator: prompts computed once, then one token of every continuation per step; a single one may go on with more rows. */
#include "binding.h"

typedef struct generator_object {
    PyObject_HEAD model_object *model;
    stv_generator *generator; /* NULL: closed */
    int64_t n;
} generator_object;

PyDoc_STRVAR(
    generator_doc,
    "Generator(model, batch, *, pixels=None, features=None, theta=None, adapters=True, temperature=0.0, top_k=0, top_p=1.0, "
    "repetition_penalty=1.0, n_per_sequence=1, max_new_tokens, min_new_tokens=0, seeds=None, eos_ids=())\n--\n\n"
    "Continues every sequence of a batch. Shared prefixes are computed once. Continuation i*n_per_sequence+j is the j-th of sequence i.\n\n"
    "Args:\n"
    "    model: Model with a decoder.\n"
    "    batch: Batch of this model; labels are not looked at.\n"
    "    pixels, features, theta, adapters: as in Run.forward.\n"
    "    temperature: float >= 0; 0: the likeliest token.\n"
    "    top_k: int >= 0; 0: off. top_p: float in (0, 1]; 1: off.\n"
    "    repetition_penalty: float > 0; 1: off. Before all else, logits of tokens in the prompt or drawn before are divided by it, negative ones\n"
    "        multiplied.\n"
    "    n_per_sequence: int >= 1.\n"
    "    max_new_tokens: int >= 1. min_new_tokens: int >= 0; until then none of eos_ids is drawn.\n"
    "    seeds: (n,) integers in [0, 2**64), one per continuation, which alone decides its draws; None: 0, 1, 2, ...\n"
    "    eos_ids: token ids; a continuation ends with, and includes, the first of these.\n\n"
    "Raises:\n"
    "    As Run.forward.\n\n"
    "Source: the order penalty, least length, temperature, top-k, top-p of transformers 4.31.");

/* What create and extend draw with, and the arrays it borrows from. */
typedef struct draw_settings {
    stv_generate_options options;
    PyObject *seeds, *eos; /* owned, or NULL */
    Py_ssize_t n_seeds;
} draw_settings;

typedef struct draw_values { /* as parsed */
    double temperature, top_p, repetition_penalty;
    long long top_k, n_per_sequence, min_new_tokens;
    PyObject *max_new_tokens, *seeds, *eos_ids;
} draw_values;

static const draw_values draw_defaults = {.top_p = 1, .repetition_penalty = 1, .n_per_sequence = 1};

static void draw_drop(draw_settings *self)
{
    Py_CLEAR(self->seeds);
    Py_CLEAR(self->eos);
}

static int draw_take(draw_settings *self, const char *what, const draw_values *values)
{
    char name[64];
    const void *data;
    Py_ssize_t n;
    *self = (draw_settings){.options = {.sampling = {values->temperature, values->top_k, values->top_p},
                                        .n_per_sequence = values->n_per_sequence,
                                        .min_new_tokens = values->min_new_tokens,
                                        .repetition_penalty = values->repetition_penalty}};
    if (check_given(values->max_new_tokens, what, "max_new_tokens") < 0) return -1;
    self->options.max_new_tokens = PyNumber_AsSsize_t(values->max_new_tokens, PyExc_ValueError);
    if (PyErr_Occurred()) return -1;
    if (values->seeds && values->seeds != Py_None) {
        PyOS_snprintf(name, sizeof name, "%s: seeds", what);
        self->n_seeds = -1;
        if (!(self->seeds = array_take_list(values->seeds, name, KIND_U64, &self->n_seeds, &data))) return -1;
        self->options.seeds = data;
    }
    if (values->eos_ids) {
        PyOS_snprintf(name, sizeof name, "%s: eos_ids", what);
        n = -1;
        if (!(self->eos = array_take_list(values->eos_ids, name, KIND_I32, &n, &data))) {
            draw_drop(self);
            return -1;
        }
        self->options.eos_ids = data;
        self->options.n_eos = n;
    }
    return 0;
}

static PyObject *generator_create(PyTypeObject *type, model_object *model, batch_object *batch, forward_call *call, const draw_settings *draw)
{
    const stv_generate_options *options = &draw->options;
    core_state *state = PyType_GetModuleState(type);
    Py_ssize_t n_sequences = (Py_ssize_t)stv_batch_get(batch->batch).n_sequences, want;
    if (options->n_per_sequence < 1 || options->n_per_sequence > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "Generator: n_per_sequence is %lld, want at least 1", (long long)options->n_per_sequence);
    want = n_sequences * (Py_ssize_t)options->n_per_sequence;
    if (options->seeds && check_size("Generator: seeds", want, draw->n_seeds) < 0) return NULL;
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
    static char *names[] = {"model",          "batch",
                            "pixels",         "features",
                            "theta",          "adapters",
                            "temperature",    "top_k",
                            "top_p",          "repetition_penalty",
                            "n_per_sequence", "max_new_tokens",
                            "min_new_tokens", "seeds",
                            "eos_ids",        NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model_value, *batch_value, *result = NULL;
    forward_values values = {0};
    draw_values how = draw_defaults;
    draw_settings draw;
    int adapters = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|$OOOpdLddLOLOO:Generator", names, state->model, &model_value, state->batch, &batch_value,
                                     &values.pixels, &values.features, &values.theta, &adapters, &how.temperature, &how.top_k, &how.top_p,
                                     &how.repetition_penalty, &how.n_per_sequence, &how.max_new_tokens, &how.min_new_tokens, &how.seeds,
                                     &how.eos_ids))
        return NULL;
    model_object *model = (model_object *)model_value;
    batch_object *batch = (batch_object *)batch_value;
    if (batch->model != model) return PyErr_Format(PyExc_ValueError, "Generator: the batch was made for another model");
    if (draw_take(&draw, "Generator", &how) < 0) return NULL;
    forward_call call = {0};
    if (forward_take(&call, model, "Generator", values, stv_batch_get(batch->batch).n_images) == 0) {
        call.options.adapters = adapters;
        result = generator_create(type, model, batch, &call, &draw);
    }
    forward_drop(&call);
    draw_drop(&draw);
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
    "    softmax of the logits as the model gave them: before penalty, temperature and filters.\n\n"
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

PyDoc_STRVAR(
    extend_doc,
    "extend($self, batch, *, keep_rows, pixels=None, features=None, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens, "
    "min_new_tokens=0, seeds=None, eos_ids=())\n--\n\n"
    "A conversation goes on: keeps the first rows of the one continuation (its prompt's, then one for each drawn token that was computed), and puts\n"
    "the batch's one sequence behind them. Only that is computed; logits and draws are those of a new generator of the whole, bit for bit.\n\n"
    "Args:\n"
    "    batch: Batch of this model with one sequence.\n"
    "    keep_rows: int in [0, n_rows].\n"
    "    pixels, features: images of this batch alone. All others: as for the constructor; theta and adapters stay.\n\n"
    "Raises:\n"
    "    As the constructor. ValueError: more than one continuation or sequence; then, and after all else that is found before computing,\n"
    "    nothing has changed. After an interrupt or MemoryError keep_rows rows are left, and nothing is active until the next extend.");

static PyObject *generator_extend_entered(generator_object *self, batch_object *batch, int64_t n_keep, const forward_call *call,
                                          const draw_settings *draw)
{
    stv_status status;
    watched w;
    watched_begin(&w, self->model);
    status = stv_generator_extend(self->generator, n_keep, batch->batch, &call->options, &draw->options);
    watched_end(&w);
    if (status != STV_OK) return raise_status(state_of((PyObject *)self), status);
    Py_RETURN_NONE;
}

static PyObject *generator_extend(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"batch",          "keep_rows",      "pixels", "features", "temperature", "top_k", "top_p", "repetition_penalty",
                            "max_new_tokens", "min_new_tokens", "seeds",  "eos_ids",  NULL};
    generator_object *self = (generator_object *)object;
    PyObject *batch_value, *keep = NULL, *result = NULL;
    forward_values values = {0};
    draw_values how = draw_defaults;
    draw_settings draw;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$OOOdLddOLOO:extend", names, state_of(object)->batch, &batch_value, &keep, &values.pixels,
                                     &values.features, &how.temperature, &how.top_k, &how.top_p, &how.repetition_penalty, &how.max_new_tokens,
                                     &how.min_new_tokens, &how.seeds, &how.eos_ids))
        return NULL;
    if (check_given(keep, "extend", "keep_rows") < 0) return NULL;
    int64_t n_keep = PyNumber_AsSsize_t(keep, PyExc_ValueError);
    if (PyErr_Occurred()) return NULL;
    batch_object *batch = (batch_object *)batch_value;
    if (batch->model != self->model) return PyErr_Format(PyExc_ValueError, "extend: the batch was made for another model");
    if (draw_take(&draw, "extend", &how) < 0) return NULL;
    forward_call call = {0};
    if ((!draw.seeds || check_size("extend: seeds", 1, draw.n_seeds) == 0) &&
        forward_take(&call, self->model, "extend", values, stv_batch_get(batch->batch).n_images) == 0 && generator_enter(self) == 0) {
        result = generator_extend_entered(self, batch, n_keep, &call, &draw);
        model_leave(self->model);
    }
    forward_drop(&call);
    draw_drop(&draw);
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

static PyObject *get_n_rows(PyObject *object, void *unused)
{
    (void)unused;
    generator_object *self = (generator_object *)object;
    if (generator_enter(self) < 0) return NULL;
    int64_t n = stv_generator_n_rows(self->generator);
    model_leave(self->model);
    return PyLong_FromLongLong(n);
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
    {"n_rows", get_n_rows, NULL, "int, rows of prompts and continuations whose keys and values are kept", NULL},
    {"n_active", get_n_active, NULL, "int, continuations not finished", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"step", generator_step, METH_NOARGS, step_doc},    {"extend", KEYWORDS(generator_extend), extend_doc},
    {"finish", KEYWORDS(generator_finish), finish_doc}, {"logits", generator_logits, METH_NOARGS, logits_doc},
    {"close", generator_close, METH_NOARGS, close_doc}, {NULL, NULL, 0, NULL},
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
