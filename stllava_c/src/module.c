/* module.c - the module: init in phases, its state, the functions that belong to no type. */
#include "binding.h"

static core_state *module_state(PyObject *module) { return PyModule_GetState(module); }

/* Our types cannot be subclassed, so an instance's type is the one the module made. */
core_state *state_of(PyObject *object) { return PyType_GetModuleState(Py_TYPE(object)); }

PyObject *new_instance(PyTypeObject *type)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return allocate(type, 0);
}

void free_instance(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

int convert_u64(PyObject *value, void *to)
{
    if (!PyLong_Check(value)) {
        PyErr_Format(PyExc_TypeError, "want an integer in [0, 2**64), got %R", value);
        return 0;
    }
    *(uint64_t *)to = PyLong_AsUnsignedLongLong(value);
    if (!PyErr_Occurred()) return 1;
    PyErr_Format(PyExc_ValueError, "want an integer in [0, 2**64), got %R", value);
    return 0;
}

int check_given(PyObject *value, const char *function, const char *name)
{
    if (!value) PyErr_Format(PyExc_TypeError, "%s() missing required keyword-only argument: '%s'", function, name);
    return value ? 0 : -1;
}

int find_item(PyObject *dict, const char *key, PyObject **item)
{
    PyObject *text = PyUnicode_FromString(key);
    *item = text ? PyDict_GetItemWithError(dict, text) : NULL;
    Py_XDECREF(text);
    return *item ? 1 : PyErr_Occurred() ? -1 : 0;
}

/* ---- functions ------------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(build_info_doc,
             "build_info()\n--\n\n"
             "How the core was built.\n\n"
             "Returns:\n"
             "    dict: version, blas, cpu_level (\"portable\", \"avx2\" or \"avx512\": the kernels this machine runs) as str; stb_image,\n"
             "    cuda, debug, sanitizers as bool.");

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    stv_build_info info = stv_get_build_info();
    return Py_BuildValue("{sssssssNsNsNsN}", "version", info.version, "blas", info.blas, "cpu_level", info.cpu_level, "stb_image",
                         PyBool_FromLong(info.stb_image), "cuda", PyBool_FromLong(info.cuda), "debug", PyBool_FromLong(info.debug), "sanitizers",
                         PyBool_FromLong(info.sanitizers));
}

enum { MAX_THREADS = 1024 }; /* more is a mistake: each has a stack */

PyDoc_STRVAR(set_num_threads_doc, "set_num_threads(n)\n--\n\n"
                                  "How many threads the core uses, for every model. Results have the same bits at any number.\n\n"
                                  "Args:\n"
                                  "    n: int in [1, 1024]; 0 = one per core this process may use, which is also the default.\n\n"
                                  "Raises:\n"
                                  "    ValueError: another n. Error (\"state\"): another thread is computing. MemoryError.");

static PyObject *set_num_threads(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n", NULL};
    PyObject *value;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:set_num_threads", names, &value)) return NULL;
    Py_ssize_t n = PyNumber_AsSsize_t(value, NULL); /* what is too large for C becomes the largest */
    if (PyErr_Occurred()) return NULL;
    if (n < 0 || n > MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "set_num_threads: n is %R, want 1 to %d, or 0 for one per core", value, MAX_THREADS);
    core_state *state = module_state(module);
    forget_calls_before_fork(state);
    /* A forward plans its memory for the number of threads it began with. With the GIL held no other call can begin. */
    if (state->calls > 0) return raise_state(state, "set_num_threads: other threads are computing; set it between their calls");
    stv_status status = stv_context_set_n_threads(state->context, (int)n);
    if (status != STV_OK) return raise_status(state, status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc, "get_num_threads()\n--\n\nHow many threads the core uses.");

static PyObject *get_num_threads(PyObject *module, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(stv_context_n_threads(module_state(module)->context));
}

PyDoc_STRVAR(allocations_doc, "allocations()\n--\n\n"
                              "Memory allocations of the core since the process began. Equal before and after a steady training or decoding step.");

static PyObject *allocations(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(stv_allocations());
}

PyDoc_STRVAR(live_allocations_doc, "_live_allocations()\n--\n\nFor tests: memory blocks of the core not freed yet.");

static PyObject *live_allocations(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromUnsignedLongLong(stv_allocations_live());
}

/* In every build, so that the tests run against the extension that is shipped; what it costs is said in csrc/base/alloc.h. */
PyDoc_STRVAR(fail_allocation_doc, "_fail_allocation(n, forever=False)\n--\n\n"
                                  "For tests: the core's n-th allocation from now (1: the next) fails, and with forever all after it; 0: none does.");

static PyObject *fail_allocation(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"n", "forever", NULL};
    uint64_t n;
    int forever = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|p:_fail_allocation", names, convert_u64, &n, &forever)) return NULL;
    stv_allocations_fail_at(n, forever);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(fill_uniform_doc, "fill_uniform(out, low, high, seed, stream)\n--\n\n"
                               "Fills a buffer with uniform draws, the same for the same seed and stream on every machine.\n\n"
                               "Args:\n"
                               "    out: writable C-contiguous float32 or float64 buffer of any shape.\n"
                               "    low, high: float, the draws lie in [low, high).\n"
                               "    seed, stream: int in [0, 2**64).\n\n"
                               "Raises:\n"
                               "    TypeError: out is no such buffer. ValueError: low > high.\n\n"
                               "Source: Philox4x32-10, Salmon et al., SC11.");

static PyObject *fill_uniform(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"out", "low", "high", "seed", "stream", NULL};
    PyObject *out;
    double low, high;
    uint64_t seed, stream;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OddO&O&:fill_uniform", names, &out, &low, &high, convert_u64, &seed, convert_u64, &stream))
        return NULL;
    if (!(low <= high)) {
        PyErr_SetString(PyExc_ValueError, "fill_uniform: low must not be above high");
        return NULL;
    }

    Py_buffer view;
    if (PyObject_GetBuffer(out, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE) < 0) return NULL;
    array_kind kind;
    if (!buffer_kind(&view, &kind) || (kind != KIND_F32 && kind != KIND_F64)) {
        PyErr_Format(PyExc_TypeError, "fill_uniform: out: want float32 or float64, got format '%s'", view.format ? view.format : "B");
        PyBuffer_Release(&view);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    stv_fill_uniform(view.buf, view.len / view.itemsize, kind == KIND_F64 ? STV_DTYPE_F64 : STV_DTYPE_F32, low, high, seed, stream);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, build_info_doc},
    {"set_num_threads", KEYWORDS(set_num_threads), set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"allocations", allocations, METH_NOARGS, allocations_doc},
    {"_live_allocations", live_allocations, METH_NOARGS, live_allocations_doc},
    {"_fail_allocation", KEYWORDS(fail_allocation), fail_allocation_doc},
    {"fill_uniform", KEYWORDS(fill_uniform), fill_uniform_doc},
    {NULL, NULL, 0, NULL},
};

/* ---- init ------------------------------------------------------------------------------------------------------------------ */

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
    return type;
}

static int add_loss_types(PyObject *module)
{
    PyObject *names = PyTuple_New(STV_LOSS_COUNT);
    for (int i = 0; names && i < STV_LOSS_COUNT; i++) {
        PyObject *name = PyUnicode_FromString(stv_loss_name((stv_loss_type)i));
        if (!name || PyTuple_SetItem(names, i, name) < 0) Py_CLEAR(names);
    }
    int result = names ? PyModule_AddObjectRef(module, "LOSS_TYPES", names) : -1;
    Py_XDECREF(names);
    return result;
}

static int module_exec(PyObject *module)
{
    core_state *state = module_state(module);
    count_forks();
    state->n_forks = forks_counted();
    if (ndarray_init() < 0 || errors_init(module, state) < 0) return -1;
    if (PyModule_AddFunctions(module, train_functions) < 0 || PyModule_AddFunctions(module, image_functions) < 0) return -1;
    if (!(state->tensor = add_type(module, &tensor_spec)) || !(state->model = add_type(module, &model_spec)) ||
        !(state->batch = add_type(module, &batch_spec)) || !(state->run = add_type(module, &run_spec)) ||
        !(state->generator = add_type(module, &generator_spec)))
        return -1;
    state->tensor_info = PyStructSequence_NewType(&tensor_info_desc);
    if (!state->tensor_info || PyModule_AddType(module, state->tensor_info) < 0 || add_loss_types(module) < 0) return -1;
    stv_status status = stv_context_create(&state->context, 0);
    return status == STV_OK ? 0 : (raise_status(state, status), -1);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = module_state(module);
    Py_VISIT(state->error);
    Py_VISIT(state->numeric_error);
    Py_VISIT(state->tensor);
    Py_VISIT(state->tensor_info);
    Py_VISIT(state->model);
    Py_VISIT(state->batch);
    Py_VISIT(state->run);
    Py_VISIT(state->generator);
    return 0;
}

static int module_clear(PyObject *module)
{
    core_state *state = module_state(module);
    Py_CLEAR(state->error);
    Py_CLEAR(state->numeric_error);
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->tensor_info);
    Py_CLEAR(state->model);
    Py_CLEAR(state->batch);
    Py_CLEAR(state->run);
    Py_CLEAR(state->generator);
    return 0;
}

/* The context goes here and not in clear: models need it, and their type keeps the module alive until the last is gone. */
static void module_free(void *module)
{
    core_state *state = module_state(module);
    if (!state) return;
    module_clear(module);
    stv_context_free(state->context);
    state->context = NULL;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "stllava_c._core",
    .m_doc = "The stllava core: models, batches, runs, generation, training and image functions.",
    .m_size = sizeof(core_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

/* NOLINTNEXTLINE(misc-use-internal-linkage): Python looks it up by name */
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
