/* model_trainable.c - Model: adapters, and the flat buffers of what trains. */
#include "model.h"

/* A method without arguments. */
static PyObject *call_core(PyObject *object, stv_status (*core)(stv_model *))
{
    model_object *self = (model_object *)object;
    if (model_enter(self) < 0) return NULL;
    stv_status status;
    Py_BEGIN_ALLOW_THREADS
    status = core(self->model);
    Py_END_ALLOW_THREADS
    return model_leave_with(self, status);
}

/* ---- adapters -------------------------------------------------------------------------------------------------------------------- */

const char linear_modules_doc[] = "linear_modules($self)\n--\n\nNames of the modules that can carry an adapter: a list of str.";

PyObject *model_linear_modules(PyObject *object, PyObject *unused)
{
    (void)unused;
    model_object *self = (model_object *)object;
    if (model_enter(self) < 0) return NULL;
    PyObject *modules = PyList_New(0);
    for (int64_t i = 0; modules && i < stv_model_n_linear(self->model); i++) {
        PyObject *name = PyUnicode_FromString(stv_model_linear_name(self->model, i));
        if (!name || PyList_Append(modules, name) < 0) Py_CLEAR(modules);
        Py_XDECREF(name);
    }
    model_leave(self);
    return modules;
}

const char add_lora_doc[] =
    "add_lora($self, module, rank, scale, dropout=0.0, dora=False)\n--\n\n"
    "Puts an adapter on a linear module: y = W x + scale * B A dropout(x). Its tensors MODULE.lora_A.weight (rank, in) and\n"
    "MODULE.lora_B.weight (out, rank) appear at the end of the table, unbound; with dora also the magnitudes m,\n"
    "MODULE.lora_magnitude_vector.weight (out,): y = (m / |V|) V x with V = W + scale * B A, where |V|, the lengths of its rows, is a\n"
    "constant to backward.\n\n"
    "Args:\n"
    "    module: str, one of linear_modules().\n"
    "    rank: int >= 1.\n"
    "    scale: float, alpha / rank, or alpha / sqrt(rank) for rsLoRA.\n"
    "    dropout: float in [0, 1).\n"
    "    dora: bool.\n\n"
    "Raises:\n"
    "    ValueError: no such module, or a value out of range. Error (\"state\"): it has an adapter, or runs of the model are alive.\n"
    "    BufferError: arrays on the model's memory are alive.\n\n"
    "Source: Hu et al., arXiv 2106.09685; rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353.";

PyObject *model_add_lora(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"module", "rank", "scale", "dropout", "dora", NULL};
    model_object *self = (model_object *)object;
    const char *module;
    long long rank;
    double scale, dropout = 0;
    int dora = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sLd|dp:add_lora", names, &module, &rank, &scale, &dropout, &dora)) return NULL;
    if (model_enter_unexported(self, "Model.add_lora") < 0) return NULL;
    stv_status status = stv_model_add_lora(self->model, module, rank, scale, dropout, dora);
    self->generation += status == STV_OK;
    return model_leave_with(self, status);
}

const char merge_lora_doc[] =
    "merge_lora($self)\n--\n\n"
    "W <- the weight that effective_weight returns, in copies; the bound weights stay as they are. Adapters are skipped while merged.\n\n"
    "Raises:\n"
    "    Error (\"state\"): merged already, no adapters, or unbound ones. MemoryError.";

PyObject *model_merge_lora(PyObject *object, PyObject *unused)
{
    (void)unused;
    return call_core(object, stv_model_merge_lora);
}

const char unmerge_lora_doc[] =
    "unmerge_lora($self)\n--\n\nForgets the merged copies, exactly.\n\nRaises:\n    Error (\"state\"): nothing is merged.";

PyObject *model_unmerge_lora(PyObject *object, PyObject *unused)
{
    (void)unused;
    return call_core(object, stv_model_unmerge_lora);
}

const char effective_weight_doc[] = "effective_weight($self, module)\n--\n\n"
                                    "The weight a linear module computes with: W + scale * B A, of DoRA (m / |V|) V; merged or not.\n\n"
                                    "Returns:\n"
                                    "    ndarray (out, in) of the model's dtype, a copy.\n\n"
                                    "Raises:\n"
                                    "    ValueError: no such module. Error (\"state\"): it is not bound.";

PyObject *model_effective_weight(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"module", NULL};
    model_object *self = (model_object *)object;
    const char *module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s:effective_weight", names, &module)) return NULL;
    PyObject *weight = PyUnicode_FromFormat("%s.weight", module), *array = NULL;
    const char *name = weight ? PyUnicode_AsUTF8AndSize(weight, NULL) : NULL;
    if (!name || model_enter(self) < 0) {
        Py_XDECREF(weight);
        return NULL;
    }
    stv_tensor_info info;
    if (model_find_tensor(self, "Model.effective_weight", name, &info)) {
        Py_ssize_t shape[2] = {(Py_ssize_t)info.shape[0], (Py_ssize_t)(info.size / info.shape[0])};
        void *data;
        if ((array = array_new(kind_of(self->dtype), 2, shape, &data))) {
            stv_status status;
            Py_BEGIN_ALLOW_THREADS
            status = stv_model_effective_weight(self->model, module, data);
            Py_END_ALLOW_THREADS
            if (status != STV_OK) {
                Py_CLEAR(array);
                raise_status(state_of(object), status);
            }
        }
    }
    Py_DECREF(weight);
    model_leave(self);
    return array;
}

/* ---- training -------------------------------------------------------------------------------------------------------------------- */

const char set_trainable_doc[] =
    "set_trainable($self, names)\n--\n\n"
    "These tensors train, in this order, in one flat buffer (theta) beside one flat gradient (grad, zeroed); all others are frozen. Values\n"
    "are carried over; buffers bound to tensors that train are let go of.\n\n"
    "Args:\n"
    "    names: sequence of str; empty: none train.\n\n"
    "Raises:\n"
    "    ValueError: an unknown or repeated name. Error (\"state\"): adapters are merged. BufferError: arrays on the model's memory are "
    "alive. MemoryError.";

/* The name strings live in `tuple`, which the caller holds. */
static const char **take_names(PyObject *tuple)
{
    Py_ssize_t n = PyTuple_Size(tuple);
    const char **texts = PyMem_Calloc(n ? (size_t)n : 1, sizeof *texts);
    for (Py_ssize_t i = 0; texts && i < n; i++) {
        PyObject *name = PyTuple_GetItem(tuple, i);
        if (!PyUnicode_Check(name)) PyErr_Format(PyExc_TypeError, "Model.set_trainable: names[%zd] is %R, want a str", i, name);
        else texts[i] = PyUnicode_AsUTF8AndSize(name, NULL);
        if (PyErr_Occurred()) {
            PyMem_Free(texts);
            return NULL;
        }
    }
    if (!texts) PyErr_NoMemory();
    return texts;
}

PyObject *model_set_trainable(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"names", NULL};
    model_object *self = (model_object *)object;
    PyObject *value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:set_trainable", names, &value)) return NULL;
    if (PyUnicode_Check(value)) return PyErr_Format(PyExc_TypeError, "Model.set_trainable: names is the str %R, want a sequence of str", value);
    PyObject *tuple = PySequence_Tuple(value);
    const char **texts = tuple ? take_names(tuple) : NULL;
    if (!texts || model_enter_unexported(self, "Model.set_trainable") < 0) {
        PyMem_Free(texts);
        Py_XDECREF(tuple);
        return NULL;
    }
    Py_ssize_t n = PyTuple_Size(tuple);
    stv_status status;
    Py_BEGIN_ALLOW_THREADS
    status = stv_model_set_trainable(self->model, texts, n);
    Py_END_ALLOW_THREADS
    if (status == STV_OK) {
        self->generation++;
        for (Py_ssize_t i = 0; i < n; i++) {
            PyObject *name = PyTuple_GetItem(tuple, i); /* itself the key: nothing that happens now may want memory */
            if (PyDict_GetItemWithError(self->bindings, name)) PyDict_DelItem(self->bindings, name);
        }
    }
    PyMem_Free(texts);
    Py_DECREF(tuple);
    return model_leave_with(self, status);
}

const char zero_grad_doc[] = "zero_grad($self)\n--\n\nSets the gradient buffer to zero; without trainable tensors there is nothing to do.";

PyObject *model_zero_grad(PyObject *object, PyObject *unused)
{
    (void)unused;
    return call_core(object, stv_model_zero_grad);
}

static PyObject *flat_view(model_object *self, const char *name, void *(*get)(stv_model *))
{
    if (model_enter(self) < 0) return NULL;
    const stv_tensor_info flat = {.ndim = 1, .shape = {stv_model_n_trainable(self->model)}, .data = get(self->model), .dtype = self->dtype};
    PyObject *text = PyUnicode_FromString(name), *view = NULL;
    if (text && !flat.data) view = Py_NewRef(Py_None);
    else if (text) view = tensor_view_new(self, NULL, text, &flat);
    Py_XDECREF(text);
    model_leave(self);
    return view;
}

PyObject *model_get_theta(PyObject *object, void *unused)
{
    (void)unused;
    return flat_view((model_object *)object, "theta", stv_model_theta);
}

PyObject *model_get_grad(PyObject *object, void *unused)
{
    (void)unused;
    return flat_view((model_object *)object, "grad", stv_model_grad);
}
