/* ndarray.c - NumPy arrays in and out; the only file that includes NumPy's headers. */
#include "binding.h"

#include <numpy/arrayobject.h>

#include <string.h>

const kind_info array_kinds[KIND_COUNT] = {
    [KIND_F32] = {"f32", "f", 4}, [KIND_F64] = {"f64", "d", 8}, [KIND_F16] = {"f16", "e", 2}, [KIND_BF16] = {"bf16", "H", 2},
    [KIND_I32] = {"i32", "i", 4}, [KIND_I64] = {"i64", "q", 8}, [KIND_U64] = {"u64", "Q", 8}, [KIND_U8] = {"u8", "B", 1},
};

static const int numpy_types[KIND_COUNT] = {[KIND_F32] = NPY_FLOAT32, [KIND_F64] = NPY_FLOAT64, [KIND_F16] = NPY_FLOAT16, [KIND_BF16] = NPY_UINT16,
                                            [KIND_I32] = NPY_INT32,   [KIND_I64] = NPY_INT64,   [KIND_U64] = NPY_UINT64,  [KIND_U8] = NPY_UINT8};
static const char *const numpy_names[KIND_COUNT] = {"float32", "float64", "float16", "uint16", "int32", "int64", "uint64", "uint8"};

int ndarray_init(void) { return PyArray_ImportNumPyAPI(); }

/* ---- out ------------------------------------------------------------------------------------------------------------------- */

PyObject *array_new(array_kind kind, int ndim, const Py_ssize_t *shape, void **data)
{
    PyObject *array = PyArray_SimpleNew(ndim, shape, numpy_types[kind]);
    if (array) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

PyObject *array_copy(array_kind kind, int ndim, const Py_ssize_t *shape, const void *data)
{
    void *to;
    PyObject *array = array_new(kind, ndim, shape, &to);
    if (array && data) memcpy(to, data, (size_t)PyArray_NBYTES((PyArrayObject *)array));
    return array;
}

PyObject *array_view(PyObject *base, array_kind kind, int ndim, const Py_ssize_t *shape, const void *data, bool writable)
{
    int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (writable ? NPY_ARRAY_WRITEABLE : 0);
    PyObject *array = PyArray_New(&PyArray_Type, ndim, shape, numpy_types[kind], NULL, (void *)data, 0, flags, NULL);
    if (!array) {
        Py_DECREF(base);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, base) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* ---- in -------------------------------------------------------------------------------------------------------------------- */

static PyArrayObject *cast(PyArrayObject *array, int type)
{
    return (PyArrayObject *)PyArray_FromArray(array, PyArray_DescrFromType(type), NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
}

/* Integers of any width to `kind`, each checked to fit. Only uint64 reaches beyond int64, and it needs no cast to itself. */
static PyArrayObject *cast_integers(PyArrayObject *array, const char *what, array_kind kind)
{
    bool from_unsigned = PyArray_TYPE(array) == NPY_UINT64 || PyArray_TYPE(array) == NPY_ULONGLONG;
    PyArrayObject *wide = cast(array, NPY_INT64);
    if (!wide || PyArray_TYPE(array) == numpy_types[kind] || (from_unsigned && kind == KIND_U64)) {
        Py_XDECREF((PyObject *)wide);
        return wide ? cast(array, numpy_types[kind]) : NULL;
    }
    const int64_t *values = PyArray_DATA(wide);
    int64_t low = kind == KIND_I32 ? INT32_MIN : kind == KIND_I64 && !from_unsigned ? INT64_MIN : 0;
    int64_t high = kind == KIND_I32 ? INT32_MAX : INT64_MAX;
    for (npy_intp i = 0; i < PyArray_SIZE(wide); i++) {
        if (values[i] >= low && values[i] <= high) continue;
        if (from_unsigned)
            PyErr_Format(PyExc_ValueError, "%s: element %zd is %llu, which does not fit %s", what, (Py_ssize_t)i, (unsigned long long)values[i],
                         numpy_names[kind]);
        else
            PyErr_Format(PyExc_ValueError, "%s: element %zd is %lld, which does not fit %s", what, (Py_ssize_t)i, (long long)values[i],
                         numpy_names[kind]);
        Py_DECREF((PyObject *)wide);
        return NULL;
    }
    PyArrayObject *result = cast(wide, numpy_types[kind]);
    Py_DECREF((PyObject *)wide);
    return result;
}

static PyArrayObject *convert(PyArrayObject *array, const char *what, array_kind kind)
{
    int type = PyArray_TYPE(array);
    bool is_integer = PyTypeNum_ISINTEGER(type), empty = PyArray_SIZE(array) == 0;
    if ((kind == KIND_F32 || kind == KIND_F64) && (PyTypeNum_ISFLOAT(type) || is_integer)) return cast(array, numpy_types[kind]);
    if (kind == KIND_U8 && type == NPY_UINT8) return cast(array, type);
    if (kind != KIND_U8 && (is_integer || (empty && kind != KIND_F32 && kind != KIND_F64))) return cast_integers(array, what, kind);
    PyErr_Format(PyExc_TypeError, "%s: want %s, got an array of %S", what,
                 kind == KIND_U8                        ? "uint8"
                 : kind == KIND_F32 || kind == KIND_F64 ? "real numbers"
                                                        : "integers",
                 (PyObject *)PyArray_DESCR(array));
    return NULL;
}

/* "(2, 3, any)" */
static PyObject *shape_text(int ndim, const Py_ssize_t *shape)
{
    PyObject *text = PyUnicode_FromString("(");
    for (int i = 0; text && i < ndim; i++) {
        PyObject *size = shape[i] < 0 ? PyUnicode_FromString("any") : PyUnicode_FromFormat("%zd", shape[i]);
        PyObject *longer = size ? PyUnicode_FromFormat("%U%s%U", text, i ? ", " : "", size) : NULL;
        Py_XDECREF(size);
        Py_DECREF(text);
        text = longer;
    }
    PyObject *closed = text ? PyUnicode_FromFormat("%U%s)", text, ndim == 1 ? "," : "") : NULL;
    Py_XDECREF(text);
    return closed;
}

static int check_shape(PyArrayObject *array, const char *what, int ndim, Py_ssize_t *shape)
{
    bool same = ndim == PyArray_NDIM(array);
    for (int i = 0; same && i < ndim; i++) same = shape[i] < 0 || shape[i] == PyArray_DIM(array, i);
    if (same) {
        for (int i = 0; i < ndim; i++) shape[i] = PyArray_DIM(array, i);
        return 0;
    }
    PyObject *want = shape_text(ndim, shape), *found = shape_text(PyArray_NDIM(array), PyArray_DIMS(array));
    if (want && found) PyErr_Format(PyExc_ValueError, "%s: want shape %U, got %U", what, want, found);
    Py_XDECREF(want);
    Py_XDECREF(found);
    return -1;
}

/* Any value as an array. Python integers on both sides of 2^63 in one list would become float64 (NumPy's common type): they are read as uint64. */
static PyArrayObject *array_of(PyObject *value, array_kind kind)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(value);
    if (!array || kind != KIND_U64 || PyArray_TYPE(array) != NPY_DOUBLE || !(PyList_Check(value) || PyTuple_Check(value))) return array;
    Py_ssize_t n = PySequence_Size(value);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(value, i);
        bool integer = item && PyLong_Check(item);
        Py_XDECREF(item);
        if (!integer) return array;
    }
    Py_DECREF((PyObject *)array);
    return (PyArrayObject *)PyArray_FROM_OT(value, NPY_UINT64);
}

PyObject *array_take(PyObject *value, const char *what, array_kind kind, int ndim, Py_ssize_t *shape, const void **data)
{
    PyArrayObject *given = array_of(value, kind);
    if (!given) return NULL;
    PyArrayObject *array = check_shape(given, what, ndim, shape) < 0 ? NULL : convert(given, what, kind);
    Py_DECREF((PyObject *)given);
    if (array) *data = PyArray_DATA(array);
    return (PyObject *)array;
}

PyObject *array_take_list(PyObject *value, const char *what, array_kind kind, Py_ssize_t *n, const void **data)
{
    return array_take(value, what, kind, 1, n, data);
}

int check_size(const char *what, Py_ssize_t want, Py_ssize_t found)
{
    if (want == found) return 0;
    PyErr_Format(PyExc_ValueError, "%s: want %zd elements, got %zd", what, want, found);
    return -1;
}

PyObject *array_take_flat(PyObject *value, const char *what, array_kind kind, Py_ssize_t *n, const void **data)
{
    PyArrayObject *given = array_of(value, kind), *array = NULL;
    if (!given) return NULL;
    Py_ssize_t found = PyArray_SIZE(given);
    if (*n < 0 || check_size(what, *n, found) == 0) array = convert(given, what, kind);
    Py_DECREF((PyObject *)given);
    if (!array) return NULL;
    *n = found;
    *data = PyArray_DATA(array);
    return (PyObject *)array;
}
