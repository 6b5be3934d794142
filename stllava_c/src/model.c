/* model.c - Model: its life, its tensors by name, and the lock that everything made from it shares. */
#include "model.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

/* ---- lock -------------------------------------------------------------------------------------------------------------------- */

/* A fork in the middle of a thread's call copies the lock as taken, and the child has no such thread to give it back. */
static atomic_int n_forks;
static pthread_once_t forks_once = PTHREAD_ONCE_INIT;
static void one_more_fork(void) { atomic_fetch_add(&n_forks, 1); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, one_more_fork); }

void count_forks(void) { pthread_once(&forks_once, watch_forks); }

int forks_counted(void) { return atomic_load(&n_forks); }

void forget_calls_before_fork(core_state *state)
{
    if (state->n_forks == forks_counted()) return;
    state->n_forks = forks_counted();
    state->calls = 0;
}

static void forget_lock_before_fork(model_object *self, unsigned long me)
{
    if (self->n_forks == forks_counted()) return;
    self->n_forks = forks_counted();
    forget_calls_before_fork(self->state);
    if (self->depth > 0 && self->owner == me) return;
    PyThread_acquire_lock(self->lock, NOWAIT_LOCK); /* taken now, by whomever */
    PyThread_release_lock(self->lock);
    self->depth = 0;
}

void model_lock(model_object *self)
{
    unsigned long me = PyThread_get_thread_ident();
    forget_lock_before_fork(self, me);
    if (self->depth == 0 || self->owner != me) {
        if (!PyThread_acquire_lock(self->lock, NOWAIT_LOCK)) {
            Py_BEGIN_ALLOW_THREADS
            PyThread_acquire_lock(self->lock, WAIT_LOCK);
            Py_END_ALLOW_THREADS
        }
        self->owner = me;
        self->state->calls++;
    }
    self->depth++;
}

void model_leave(model_object *self)
{
    if (--self->depth > 0) return;
    if (self->state->calls > 0) self->state->calls--; /* 0: a fork was made by a finaliser inside this call */
    PyThread_release_lock(self->lock);
}

int model_enter(model_object *self)
{
    model_lock(self);
    if (self->model && !self->in_handler) return 0;
    const char *why = self->model ? "a signal handler cannot use the model whose call it interrupts" : "the model is closed";
    model_leave(self);
    raise_state(state_of((PyObject *)self), "%s", why);
    return -1;
}

int model_enter_unexported(model_object *self, const char *what)
{
    if (model_enter(self) < 0) return -1;
    if (self->exports == 0) return 0;
    PyErr_Format(PyExc_BufferError, "%s: %zd arrays or memoryviews on the model's memory are alive (tensor, theta, grad); delete or copy them first",
                 what, self->exports);
    model_leave(self);
    return -1;
}

PyObject *model_leave_with(model_object *self, stv_status status)
{
    model_leave(self);
    if (status != STV_OK) return raise_status(state_of((PyObject *)self), status);
    Py_RETURN_NONE;
}

/* ---- creation ------------------------------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(
    model_doc,
    "Model(config, dtype='f32')\n--\n\n"
    "A vision tower, a projector and a decoder, or some of them, computed in one dtype. Its tensors have the names of a LLaVA checkpoint\n"
    "and are bound one by one. Usable from several threads, one call at a time.\n\n"
    "Args:\n"
    "    config: {\"vision\": dict | None, \"projector\": dict | None, \"decoder\": dict | None}; an absent part is None.\n"
    "        vision: image_size, patch_size (pixels), hidden_size, n_layers, n_heads, intermediate_size, activation (\"quick_gelu\" or\n"
    "            \"gelu\"), layer_norm_eps, select_layer (-2: output of the last layer but one), select_feature (\"patch\" or \"cls_patch\").\n"
    "        projector: kind (\"cluster\", \"linear\", \"mlp\" or \"identity\"), in_size, out_size, depth (of mlp), n_centers and n_rounds (of "
    "cluster).\n"
    "        decoder: vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, intermediate_size, rms_norm_eps, rope_theta,\n"
    "            sliding_window (tokens, 0: none), tie_word_embeddings; max_position_embeddings is accepted and unused.\n"
    "    dtype: \"f32\", or \"f64\" as the exact check.\n\n"
    "Raises:\n"
    "    ValueError, TypeError: an unknown, missing or unfit key; it is named. MemoryError.");

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "dtype", NULL};
    PyObject *values;
    const char *dtype = "f32";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|s:Model", names, &PyDict_Type, &values, &dtype)) return NULL;
    if (strcmp(dtype, "f32") != 0 && strcmp(dtype, "f64") != 0)
        return PyErr_Format(PyExc_ValueError, "Model: dtype is '%s', supported: f32, f64", dtype);

    model_object *self = (model_object *)new_instance(type);
    if (!self) return NULL;
    core_state *state = self->state = state_of((PyObject *)self);
    self->module = Py_NewRef(PyType_GetModule(type));
    self->dtype = strcmp(dtype, "f64") ? STV_DTYPE_F32 : STV_DTYPE_F64;
    self->n_forks = forks_counted();
    self->bindings = PyDict_New();
    self->lock = PyThread_allocate_lock();
    if (!self->bindings || !self->lock || model_config_take(&self->config, values) < 0) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    stv_status status;
    Py_BEGIN_ALLOW_THREADS
    status = stv_model_create(&self->model, state->context, &self->config, self->dtype);
    Py_END_ALLOW_THREADS
    if (status == STV_OK) return (PyObject *)self;
    self->model = NULL;
    raise_status(state, status);
    Py_DECREF((PyObject *)self);
    return NULL;
}

static int model_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((model_object *)object)->bindings);
    return 0;
}

static void drop_model(model_object *self)
{
    stv_model_free(self->model);
    self->model = NULL;
    self->generation++;
    if (self->bindings) PyDict_Clear(self->bindings);
}

/* Cleared only as garbage, when nobody can call it any more. Runs in the same cycle may be freed later, so the core's model stays until dealloc;
 * what it borrows is not touched by freeing it. */
static int model_clear(PyObject *object)
{
    Py_CLEAR(((model_object *)object)->bindings);
    return 0;
}

static void model_dealloc(PyObject *object)
{
    model_object *self = (model_object *)object;
    PyObject_GC_UnTrack(object);
    drop_model(self);
    Py_CLEAR(self->bindings);
    if (self->lock) PyThread_free_lock(self->lock);
    PyObject *module = self->module;
    free_instance(object);
    Py_XDECREF(module);
}

PyDoc_STRVAR(close_doc,
             "close($self)\n--\n\n"
             "Frees the model's memory and lets go of bound buffers now. Closing twice is fine; everything else raises Error afterwards.\n\n"
             "Raises:\n"
             "    BufferError: arrays on its memory are alive. Error (\"state\"): runs or generators of it are alive.");

static PyObject *model_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)object;
    if (!self->model) Py_RETURN_NONE;
    if (model_enter_unexported(self, "Model.close") < 0) return NULL;
    if (self->users > 0) {
        raise_state(state_of(object), "Model.close: %zd runs or generators of this model are alive; delete them first", self->users);
        model_leave(self);
        return NULL;
    }
    drop_model(self);
    model_leave(self);
    Py_RETURN_NONE;
}

/* ---- tensors --------------------------------------------------------------------------------------------------------------------- */

static PyStructSequence_Field tensor_info_fields[] = {
    {"name", "str, as in a LLaVA checkpoint; adapters: MODULE.lora_A.weight (r, in), MODULE.lora_B.weight (out, r), "
             "MODULE.lora_magnitude_vector.weight (out,)"},
    {"shape", "tuple of int"},
    {"size", "int, elements"},
    {"offset", "int, first element in theta and grad; -1: frozen"},
    {"influences", "bool, False: no output depends on it (tower layers behind select_layer, post-LayerNorm)"},
    {"optional", "bool, may stay unbound"},
    {"bound", "bool, has values"},
    {"dtype", "str, of its values: as bound while frozen (\"f32\", \"f16\", \"bf16\"), else the model's"},
    {NULL, NULL},
};
PyStructSequence_Desc tensor_info_desc = {"stllava_c.TensorInfo", "One row of a model's tensor table.", tensor_info_fields, 8};

static PyObject *tensor_info_new(core_state *state, const stv_tensor_info *info)
{
    PyObject *shape = PyTuple_New(info->ndim), *row = PyStructSequence_New(state->tensor_info);
    for (int i = 0; shape && i < info->ndim; i++) PyTuple_SetItem(shape, i, PyLong_FromLongLong(info->shape[i]));
    if (!shape || !row) {
        Py_XDECREF(shape);
        Py_XDECREF(row);
        return NULL;
    }
    PyStructSequence_SetItem(row, 0, PyUnicode_FromString(info->name));
    PyStructSequence_SetItem(row, 1, shape);
    PyStructSequence_SetItem(row, 2, PyLong_FromLongLong(info->size));
    PyStructSequence_SetItem(row, 3, PyLong_FromLongLong(info->offset));
    PyStructSequence_SetItem(row, 4, PyBool_FromLong(info->influences));
    PyStructSequence_SetItem(row, 5, PyBool_FromLong(info->optional));
    PyStructSequence_SetItem(row, 6, PyBool_FromLong(info->data != NULL));
    PyStructSequence_SetItem(row, 7, PyUnicode_FromString(stv_dtype_name(info->dtype)));
    if (!PyErr_Occurred()) return row;
    Py_DECREF(row);
    return NULL;
}

PyDoc_STRVAR(tensors_doc, "tensors($self)\n--\n\nThe tensor table: a list of TensorInfo, adapters last.");

static PyObject *model_tensors(PyObject *object, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)object;
    if (model_enter(self) < 0) return NULL;
    PyObject *rows = PyList_New(0);
    for (int64_t i = 0; rows && i < stv_model_n_tensors(self->model); i++) {
        stv_tensor_info info = stv_model_tensor(self->model, i);
        PyObject *row = tensor_info_new(state_of(object), &info);
        if (!row || PyList_Append(rows, row) < 0) Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    model_leave(self);
    return rows;
}

bool model_find_tensor(model_object *self, const char *what, const char *name, stv_tensor_info *info)
{
    int64_t i = stv_model_find(self->model, name);
    if (i >= 0) *info = stv_model_tensor(self->model, i);
    else PyErr_Format(PyExc_ValueError, "%s: no tensor '%s' in this model; tensors() lists them", what, name);
    return i >= 0;
}

PyDoc_STRVAR(bind_doc,
             "bind($self, name, array)\n--\n\n"
             "Gives a tensor its values. A frozen tensor borrows the array, which is kept alive and not copied; a trainable one copies it.\n\n"
             "Args:\n"
             "    name: str.\n"
             "    array: C-contiguous buffer with the tensor's number of elements, any shape, of float32, float16 or uint16 (the bits of bfloat16);\n"
             "        in a model of f64 also float64. What is computed has the bits of the same model with the values widened to its dtype, which\n"
             "        happens where they are read: the array stays as it is.\n\n"
             "Raises:\n"
             "    ValueError: no such tensor, or another size. TypeError: another dtype, or no buffer.\n"
             "    BufferError: arrays are alive on memory that this would free.");

static PyObject *model_bind(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "array", NULL};
    model_object *self = (model_object *)object;
    const char *name;
    PyObject *array;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO:bind", names, &name, &array)) return NULL;
    PyObject *key = PyUnicode_FromString(name), *what = PyUnicode_FromFormat("Model.bind: %s", name), *holder = NULL;
    const char *what_text = what ? PyUnicode_AsUTF8AndSize(what, NULL) : NULL;
    stv_stored values;
    Py_ssize_t n;
    if (key && what_text) holder = tensor_borrow(state_of(object), array, what_text, self->dtype, &values, &n);
    Py_XDECREF(what);
    if (!holder || model_enter(self) < 0) {
        Py_XDECREF(holder);
        Py_XDECREF(key);
        return NULL;
    }
    stv_tensor_info info;
    if (model_find_tensor(self, "Model.bind", name, &info)) {
        PyObject *before = Py_XNewRef(PyDict_GetItemWithError(self->bindings, key));
        bool frozen = info.offset < 0, core_owned = frozen && info.data && !before; /* it trained once; would be freed */
        if (core_owned && self->exports > 0) {
            PyErr_Format(PyExc_BufferError, "Model.bind: %s: arrays or memoryviews on the model's memory are alive; delete or copy them first", name);
        } else if (!frozen || PyDict_SetItem(self->bindings, key, holder) == 0) { /* first: what the core borrows must have a holder */
            stv_status status;
            Py_BEGIN_ALLOW_THREADS
            status = stv_model_bind(self->model, name, values, n);
            Py_END_ALLOW_THREADS
            if (status == STV_OK) {
                self->generation += core_owned;
            } else { /* putting back what was there takes no memory */
                if (before) PyDict_SetItem(self->bindings, key, before);
                else if (frozen) PyDict_DelItem(self->bindings, key);
                raise_status(state_of(object), status);
            }
        }
        Py_XDECREF(before); /* lets go of the array bound before */
    }
    Py_DECREF(holder);
    Py_DECREF(key);
    model_leave(self);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(tensor_doc, "tensor($self, name)\n--\n\n"
                         "A view of a tensor's values as they are stored, not a copy; it keeps the model alive. While arrays on it are alive, "
                         "add_lora, set_trainable and close\n"
                         "raise BufferError. Binding another array leaves the view on the one bound before.\n\n"
                         "Raises:\n"
                         "    ValueError: no such tensor. Error (\"state\"): it is not bound.");

static PyObject *model_tensor(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", NULL};
    model_object *self = (model_object *)object;
    const char *name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s:tensor", names, &name)) return NULL;
    PyObject *key = PyUnicode_FromString(name), *view = NULL;
    if (!key || model_enter(self) < 0) {
        Py_XDECREF(key);
        return NULL;
    }
    stv_tensor_info info;
    if (model_find_tensor(self, "Model.tensor", name, &info)) {
        if (info.data) view = tensor_view_new(self, PyDict_GetItemWithError(self->bindings, key), key, &info);
        else raise_state(state_of(object), "Model.tensor: '%s' is not bound", name);
    }
    Py_DECREF(key);
    model_leave(self);
    return view;
}

/* ---- attributes -------------------------------------------------------------------------------------------------------------------- */

static PyObject *get_dtype(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(array_kinds[kind_of(((model_object *)object)->dtype)].name);
}

static PyObject *get_config(PyObject *object, void *unused)
{
    (void)unused;
    return model_config_give(&((model_object *)object)->config);
}

static PyObject *get_tokens_per_image(PyObject *object, void *unused)
{
    (void)unused;
    model_object *self = (model_object *)object;
    if (model_enter(self) < 0) return NULL;
    int64_t n = stv_model_tokens_per_image(self->model);
    model_leave(self);
    return PyLong_FromLongLong(n);
}

static PyObject *get_n_trainable(PyObject *object, void *unused)
{
    (void)unused;
    model_object *self = (model_object *)object;
    if (model_enter(self) < 0) return NULL;
    int64_t n = stv_model_n_trainable(self->model);
    model_leave(self);
    return PyLong_FromLongLong(n);
}

static PyGetSetDef getset[] = {
    {"dtype", get_dtype, NULL, "\"f32\" or \"f64\"", NULL},
    {"config", get_config, NULL, "the configuration as a new dict, every key present", NULL},
    {"tokens_per_image", get_tokens_per_image, NULL, "rows an image takes; 0 without a tower", NULL},
    {"n_trainable", get_n_trainable, NULL, "elements of theta", NULL},
    {"theta", model_get_theta, NULL, "Tensor (n_trainable,): the flat trainable buffer, a view; None when nothing trains", NULL},
    {"grad", model_get_grad, NULL, "Tensor (n_trainable,): the flat gradient, a view; None when nothing trains", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"tensors", model_tensors, METH_NOARGS, tensors_doc},
    {"bind", KEYWORDS(model_bind), bind_doc},
    {"tensor", KEYWORDS(model_tensor), tensor_doc},
    {"linear_modules", model_linear_modules, METH_NOARGS, linear_modules_doc},
    {"add_lora", KEYWORDS(model_add_lora), add_lora_doc},
    {"merge_lora", model_merge_lora, METH_NOARGS, merge_lora_doc},
    {"unmerge_lora", model_unmerge_lora, METH_NOARGS, unmerge_lora_doc},
    {"effective_weight", KEYWORDS(model_effective_weight), effective_weight_doc},
    {"set_trainable", KEYWORDS(model_set_trainable), set_trainable_doc},
    {"zero_grad", model_zero_grad, METH_NOARGS, zero_grad_doc},
    {"close", model_close, METH_NOARGS, close_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)model_doc}, {Py_tp_new, model_new},   {Py_tp_dealloc, model_dealloc}, {Py_tp_traverse, model_traverse},
    {Py_tp_clear, model_clear},     {Py_tp_methods, methods}, {Py_tp_getset, getset},         {0, NULL},
};

PyType_Spec model_spec = {
    .name = "stllava_c.Model",
    .basicsize = sizeof(model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
