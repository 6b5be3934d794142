/* tensor.c - memory with a shape, in and out through the buffer protocol, never copied.
 *
 * Whose memory it is:
 *   owned     Tensor.zeros
 *   borrowed  Tensor.from_buffer: the other object's, held by its Py_buffer
 *   a view    Model.tensor, .theta, .grad: the model's. Whatever moves the model's memory is refused while a view is exported, and makes
 *             the others stale: they refuse to be exported. Memory that a model only borrows is held by `holder`. */
#include "binding.h"

#include <stdlib.h>
#include <string.h>

typedef struct tensor_object {
    PyObject_HEAD array_kind kind;
    int ndim;
    Py_ssize_t shape[TENSOR_MAX_DIM], strides[TENSOR_MAX_DIM], size_bytes;
    void *data; /* NULL: freed */
    bool writable;
    Py_ssize_t exports;
    PyObject *name; /* str or None */
    void *owned;
    Py_buffer source; /* obj NULL: not borrowed */
    model_object *model;
    uint64_t generation; /* of the model when the view was made */
    PyObject *holder;
} tensor_object;

/* ---- buffers of others ------------------------------------------------------------------------------------------------------- */

bool buffer_kind(const Py_buffer *view, array_kind *kind)
{
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || (*format == '<' && PY_LITTLE_ENDIAN)) format++;
    if (!format[0] || format[1]) return false;
    char c = format[0];
    if (c == 'l' || c == 'L') c = (view->itemsize == 8 ? "qQ" : "iI")[c == 'L'];
    for (int i = 0; i < KIND_COUNT; i++) {
        if (array_kinds[i].format[0] != c || array_kinds[i].size_bytes != view->itemsize) continue;
        *kind = (array_kind)i;
        return true;
    }
    return false;
}

/* `kinds`: bits of the kinds wanted, `names` how to say them; *kind is filled. */
static int borrow_one_of(Py_buffer *view, PyObject *obj, const char *what, unsigned kinds, const char *names, array_kind *kind, bool writable)
{
    if (!PyObject_CheckBuffer(obj)) {
        PyErr_Format(PyExc_TypeError, "%s: want a C-contiguous buffer of %s, got an object without the buffer protocol", what, names);
        return -1;
    }
    if (PyObject_GetBuffer(obj, view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) return -1;
    bool known = buffer_kind(view, kind);
    if (!known || !(kinds & 1u << *kind))
        PyErr_Format(PyExc_TypeError, "%s: want %s, got %s", what, names, known ? array_kinds[*kind].name : view->format);
    else if (!PyBuffer_IsContiguous(view, 'C'))
        PyErr_Format(PyExc_ValueError, "%s: the buffer is not C-contiguous; copy it with numpy.ascontiguousarray", what);
    else if (writable && view->readonly) PyErr_Format(PyExc_ValueError, "%s: the buffer is read-only, want one that can be written", what);
    else if ((uintptr_t)view->buf % (uintptr_t)view->itemsize && view->len)
        PyErr_Format(PyExc_ValueError, "%s: the buffer does not begin at a multiple of its %zd-byte elements; copy it", what, view->itemsize);
    else return 0;
    PyBuffer_Release(view);
    return -1;
}

int borrow_buffer(Py_buffer *view, PyObject *obj, const char *what, array_kind kind, Py_ssize_t n, bool writable)
{
    array_kind found;
    if (borrow_one_of(view, obj, what, 1u << kind, array_kinds[kind].name, &found, writable) < 0) return -1;
    if (n < 0 || check_size(what, n, view->len / view->itemsize) == 0) return 0;
    PyBuffer_Release(view);
    return -1;
}

/* ---- making ------------------------------------------------------------------------------------------------------------------ */

static tensor_object *tensor_new(PyTypeObject *type, array_kind kind, int ndim, const Py_ssize_t *shape)
{
    tensor_object *self = (tensor_object *)new_instance(type);
    if (!self) return NULL;
    self->kind = kind;
    self->ndim = ndim;
    self->writable = true;
    self->name = Py_NewRef(Py_None);
    self->size_bytes = array_kinds[kind].size_bytes;
    for (int i = ndim - 1; i >= 0; i--) {
        self->shape[i] = shape[i];
        self->strides[i] = self->size_bytes;
        self->size_bytes *= shape[i];
    }
    return self;
}

PyObject *tensor_view_new(model_object *model, PyObject *holder, PyObject *name, const stv_tensor_info *info)
{
    Py_ssize_t sizes[TENSOR_MAX_DIM] = {0};
    for (int i = 0; i < info->ndim; i++) sizes[i] = (Py_ssize_t)info->shape[i];
    tensor_object *self = tensor_new(state_of((PyObject *)model)->tensor, kind_of(info->dtype), info->ndim, sizes);
    if (!self) return NULL;
    Py_DECREF(self->name);
    self->name = Py_NewRef(name);
    self->data = info->data;
    self->model = model_ref(model);
    self->generation = model->generation;
    self->holder = Py_XNewRef(holder);
    self->writable = !holder || ((tensor_object *)holder)->writable;
    return (PyObject *)self;
}

static PyObject *tensor_take_buffer(PyTypeObject *type, Py_buffer *view, array_kind kind)
{
    if (view->ndim > TENSOR_MAX_DIM) {
        PyErr_Format(PyExc_ValueError, "Tensor: %d dimensions, at most %d are supported", view->ndim, TENSOR_MAX_DIM);
        PyBuffer_Release(view);
        return NULL;
    }
    tensor_object *self = tensor_new(type, kind, view->ndim, view->shape);
    if (!self) {
        PyBuffer_Release(view);
        return NULL;
    }
    self->source = *view;
    self->data = view->buf;
    self->writable = !view->readonly;
    return (PyObject *)self;
}

PyObject *tensor_borrow(core_state *state, PyObject *obj, const char *what, stv_dtype dtype, stv_stored *values, Py_ssize_t *n)
{
    unsigned kinds = 0;
    for (int from = 0; from < STV_N_DTYPES; from++) kinds |= (unsigned)stv_dtype_widens((stv_dtype)from, dtype) << kind_of((stv_dtype)from);
    const char *names = dtype == STV_DTYPE_F64 ? "f64, f32, f16 or bf16 (as uint16)" : "f32, f16 or bf16 (as uint16)";
    Py_buffer view;
    array_kind kind;
    if (borrow_one_of(&view, obj, what, kinds, names, &kind, false) < 0) return NULL;
    *n = view.len / view.itemsize;
    *values = (stv_stored){view.buf, (stv_dtype)kind};
    return tensor_take_buffer(state->tensor, &view, kind);
}

PyDoc_STRVAR(from_buffer_doc,
             "from_buffer($type, obj)\n--\n\n"
             "A tensor on the memory of another object, which stays alive and locked until the tensor is freed.\n\n"
             "Args:\n"
             "    obj: C-contiguous buffer of float32, float64, float16, int32, int64, uint64, uint8 or uint16 (the bits of bfloat16), at most 8\n"
             "        dimensions; read-only stays read-only.\n\n"
             "Raises:\n"
             "    TypeError: no buffer, or of another type. BufferError, ValueError: not C-contiguous.");

static PyObject *from_buffer(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"obj", NULL};
    PyObject *obj;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:from_buffer", names, &obj)) return NULL;
    Py_buffer view;
    if (PyObject_GetBuffer(obj, &view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) return NULL;
    array_kind kind;
    if (!PyBuffer_IsContiguous(&view, 'C')) {
        PyErr_SetString(PyExc_ValueError, "Tensor.from_buffer: the buffer is not C-contiguous; copy it with numpy.ascontiguousarray");
    } else if (!buffer_kind(&view, &kind)) {
        PyErr_Format(PyExc_TypeError,
                     "Tensor.from_buffer: elements of format '%s', supported: float32, float64, float16, int32, int64, uint64, uint8, uint16 (bf16)",
                     view.format);
    } else {
        return tensor_take_buffer((PyTypeObject *)type, &view, kind);
    }
    PyBuffer_Release(&view);
    return NULL;
}

PyDoc_STRVAR(zeros_doc, "zeros($type, shape, dtype='f32')\n--\n\n"
                        "A tensor of zeros in memory of its own, 64-byte aligned.\n\n"
                        "Args:\n"
                        "    shape: int, or tuple of at most 8 int >= 0.\n"
                        "    dtype: \"f32\", \"f64\", \"f16\", \"bf16\" (uint16 in NumPy), \"i32\", \"i64\", \"u64\" or \"u8\".\n\n"
                        "Raises:\n"
                        "    ValueError: shape or dtype. MemoryError.");

static int parse_shape(PyObject *value, Py_ssize_t shape[TENSOR_MAX_DIM])
{
    PyObject *sizes = PyLong_Check(value) ? PyTuple_Pack(1, value) : PySequence_Tuple(value);
    if (!sizes) return -1;
    Py_ssize_t ndim = PyTuple_Size(sizes);
    if (ndim > TENSOR_MAX_DIM) PyErr_Format(PyExc_ValueError, "Tensor.zeros: %zd dimensions, at most %d are supported", ndim, TENSOR_MAX_DIM);
    Py_ssize_t room = PY_SSIZE_T_MAX / 16;
    for (Py_ssize_t i = 0; i < ndim && !PyErr_Occurred(); i++) {
        shape[i] = PyNumber_AsSsize_t(PyTuple_GetItem(sizes, i), PyExc_OverflowError);
        if (PyErr_Occurred()) break;
        if (shape[i] < 0) PyErr_Format(PyExc_ValueError, "Tensor.zeros: shape[%zd] is %zd, want at least 0", i, shape[i]);
        else if (shape[i] > room) PyErr_NoMemory();
        else if (shape[i] > 0) room /= shape[i];
    }
    Py_DECREF(sizes);
    return PyErr_Occurred() ? -1 : (int)ndim;
}

static PyObject *zeros(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"shape", "dtype", NULL};
    PyObject *shape_value;
    const char *dtype = "f32";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s:zeros", names, &shape_value, &dtype)) return NULL;
    int kind = 0;
    while (kind < KIND_COUNT && strcmp(array_kinds[kind].name, dtype) != 0) kind++;
    if (kind == KIND_COUNT)
        return PyErr_Format(PyExc_ValueError, "Tensor.zeros: dtype is '%s', supported: f32, f64, f16, bf16, i32, i64, u64, u8", dtype);
    Py_ssize_t shape[TENSOR_MAX_DIM];
    int ndim = parse_shape(shape_value, shape);
    if (ndim < 0) return NULL;

    tensor_object *self = tensor_new((PyTypeObject *)type, (array_kind)kind, ndim, shape);
    if (!self) return NULL;
    size_t room = ((size_t)self->size_bytes + 63) / 64 * 64;
    self->data = self->owned = aligned_alloc(64, room ? room : 64);
    if (!self->owned) {
        PyErr_Format(PyExc_MemoryError, "Tensor.zeros: no memory for %zd bytes", self->size_bytes);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    memset(self->owned, 0, room);
    return (PyObject *)self;
}

/* ---- freeing ----------------------------------------------------------------------------------------------------------------- */

static void tensor_release(tensor_object *self)
{
    self->data = NULL;
    free(self->owned);
    self->owned = NULL;
    PyBuffer_Release(&self->source);
    Py_CLEAR(self->model);
    Py_CLEAR(self->holder);
}

PyDoc_STRVAR(free_doc,
             "free($self)\n--\n\n"
             "Gives the memory back now: its own, or the hold on another object's. The tensor is of no use afterwards; freeing twice is fine.\n\n"
             "Raises:\n"
             "    BufferError: arrays or memoryviews on it are alive.");

static PyObject *tensor_free(PyObject *object, PyObject *unused)
{
    (void)unused;
    tensor_object *self = (tensor_object *)object;
    if (self->exports > 0)
        return PyErr_Format(PyExc_BufferError, "Tensor.free: %zd exported buffers (arrays or memoryviews) are alive; delete them first",
                            self->exports);
    tensor_release(self);
    Py_RETURN_NONE;
}

static int tensor_traverse(PyObject *object, visitproc visit, void *arg)
{
    tensor_object *self = (tensor_object *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->source.obj);
    Py_VISIT(self->model);
    Py_VISIT(self->holder);
    return 0;
}

static int tensor_clear(PyObject *object)
{
    tensor_object *self = (tensor_object *)object;
    if (self->exports == 0) tensor_release(self); /* whoever exports it is in the same cycle and is cleared too */
    return 0;
}

static void tensor_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    tensor_release((tensor_object *)object);
    Py_CLEAR(((tensor_object *)object)->name);
    free_instance(object);
}

/* ---- buffer protocol --------------------------------------------------------------------------------------------------------- */

static int tensor_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    tensor_object *self = (tensor_object *)object;
    view->obj = NULL;
    if ((flags & PyBUF_WRITABLE) && !self->writable) {
        PyErr_SetString(PyExc_BufferError, "Tensor: its memory is read-only");
        return -1;
    }
    bool stale = false;
    model_object *model = self->model ? model_ref(self->model) : NULL;
    if (model) { /* waiting for the lock lets other threads run: everything is looked at after it */
        model_lock(model);
        stale = !model->model || self->generation != model->generation;
        if (self->data && !stale) model->exports++, self->exports++;
        model_leave(model);
        Py_DECREF((PyObject *)model);
    } else if (self->data) {
        self->exports++;
    }
    if (!self->data || stale) {
        PyErr_Format(PyExc_BufferError,
                     self->data ? "Tensor %R: the model's memory has moved since (bind, add_lora, set_trainable or close); take it from the "
                                  "model again"
                                : "Tensor %R: its memory was freed",
                     self->name);
        return -1;
    }
    *view = (Py_buffer){
        .buf = self->data,
        .obj = Py_NewRef(object),
        .len = self->size_bytes,
        .itemsize = array_kinds[self->kind].size_bytes,
        .readonly = !self->writable,
        .ndim = self->ndim,
        .format = flags & PyBUF_FORMAT ? (char *)array_kinds[self->kind].format : NULL,
        .shape = (flags & PyBUF_ND) == PyBUF_ND ? self->shape : NULL,
        .strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL,
    };
    return 0;
}

static void tensor_releasebuffer(PyObject *object, Py_buffer *view)
{
    (void)view;
    tensor_object *self = (tensor_object *)object;
    self->exports--;
    if (self->model) self->model->exports--;
}

PyDoc_STRVAR(numpy_doc,
             "numpy($self)\n--\n\n"
             "An array on the same memory: what is written to one is seen in the other. While it lives, the memory cannot be freed or moved.\n\n"
             "Raises:\n"
             "    BufferError: the tensor was freed, or its model's memory has moved since.");

static PyObject *tensor_numpy(PyObject *object, PyObject *unused)
{
    (void)unused;
    tensor_object *self = (tensor_object *)object;
    PyObject *view = PyMemoryView_FromObject(object); /* holds the export for as long as the array lives */
    return view ? array_view(view, self->kind, self->ndim, self->shape, self->data, self->writable) : NULL;
}

/* ---- attributes -------------------------------------------------------------------------------------------------------------- */

static PyObject *get_shape(PyObject *object, void *unused)
{
    (void)unused;
    tensor_object *self = (tensor_object *)object;
    PyObject *shape = PyTuple_New(self->ndim);
    for (int i = 0; shape && i < self->ndim; i++) {
        PyObject *size = PyLong_FromSsize_t(self->shape[i]);
        if (!size || PyTuple_SetItem(shape, i, size) < 0) Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *get_dtype(PyObject *object, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(array_kinds[((tensor_object *)object)->kind].name);
}

static PyObject *get_name(PyObject *object, void *unused)
{
    (void)unused;
    return Py_NewRef(((tensor_object *)object)->name);
}

static PyObject *get_nbytes(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((tensor_object *)object)->size_bytes);
}

static PyObject *tensor_repr(PyObject *object)
{
    tensor_object *self = (tensor_object *)object;
    PyObject *shape = get_shape(object, NULL);
    PyObject *text =
        shape ? PyUnicode_FromFormat("<Tensor %R %s%R%s>", self->name, array_kinds[self->kind].name, shape, self->data ? "" : " freed") : NULL;
    Py_XDECREF(shape);
    return text;
}

static PyGetSetDef getset[] = {
    {"shape", get_shape, NULL, "tuple of int", NULL},
    {"dtype", get_dtype, NULL, "\"f32\", \"f64\", \"f16\", \"bf16\" (uint16 in NumPy), \"i32\", \"i64\", \"u64\" or \"u8\"", NULL},
    {"name", get_name, NULL, "name in the model, or None", NULL},
    {"nbytes", get_nbytes, NULL, "size in bytes", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"from_buffer", KEYWORDS(from_buffer) | METH_CLASS, from_buffer_doc},
    {"zeros", KEYWORDS(zeros) | METH_CLASS, zeros_doc},
    {"numpy", tensor_numpy, METH_NOARGS, numpy_doc},
    {"free", tensor_free, METH_NOARGS, free_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Memory with a shape. Exports the buffer protocol (numpy.asarray, memoryview) without copying; made by Tensor.zeros,\n"
                "Tensor.from_buffer and a model. Row-major, contiguous."},
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_traverse, tensor_traverse},
    {Py_tp_clear, tensor_clear},
    {Py_tp_repr, tensor_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_bf_getbuffer, tensor_getbuffer},
    {Py_bf_releasebuffer, tensor_releasebuffer},
    {0, NULL},
};

PyType_Spec tensor_spec = {
    .name = "stllava_c.Tensor",
    .basicsize = sizeof(tensor_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
