/* batch.c - Batch: trees of token segments, packed once, then read-only. */
#include "binding.h"

#include <string.h>

PyDoc_STRVAR(
    batch_doc,
    "Batch(model, *, parent, begin, ids, labels=None, sample=None, image=(), n_images=0)\n--\n\n"
    "Trees of token segments for one model. A segment sees its ancestors and itself; a sequence is a path from a root to a leaf. Every\n"
    "label on a path is a target of that sequence, predicted by the row before it. Integer arrays of any width, or lists; all are copied.\n\n"
    "Args:\n"
    "    parent: (S,) an earlier segment of the same tree, -1 for a root.\n"
    "    begin: (S+1,) segment s is ids[begin[s]:begin[s+1]]; from 0 to len(ids).\n"
    "    ids: token ids, or -200 for an image.\n"
    "    labels: like ids: token id, or -100 for a token that is no target; None: no targets.\n"
    "    sample: (S,) dropout key of each segment's rows, in [0, 2**64); None: the segment's number.\n"
    "    image: which image of the batch each -200 stands for, in order.\n"
    "    n_images: int, images of the batch.\n\n"
    "Raises:\n"
    "    ValueError, TypeError: what does not fit; segment and token are named.");

/* The arrays of one call; they live until the core has copied them. */
enum { PARENT, BEGIN, IDS, LABELS, SAMPLE, IMAGE, N_ARRAYS };
typedef struct arrays {
    PyObject *object[N_ARRAYS];
    const void *data[N_ARRAYS];
    Py_ssize_t n[N_ARRAYS];
} arrays;

static int take_arrays(arrays *a, PyObject *const values[N_ARRAYS])
{
    static const char *const names[] = {"Batch: parent", "Batch: begin", "Batch: ids", "Batch: labels", "Batch: sample", "Batch: image"};
    static const array_kind kinds[] = {KIND_I32, KIND_I64, KIND_I32, KIND_I32, KIND_U64, KIND_I32};
    for (int i = 0; i < N_ARRAYS; i++) {
        if (i > IDS && (!values[i] || values[i] == Py_None)) continue;
        a->n[i] = i == BEGIN ? a->n[PARENT] + 1 : i == LABELS ? a->n[IDS] : i == SAMPLE ? a->n[PARENT] : -1;
        if (!(a->object[i] = array_take_list(values[i], names[i], kinds[i], &a->n[i], &a->data[i]))) return -1;
    }
    const int64_t *begin = a->data[BEGIN];
    int64_t last = begin[a->n[PARENT]];
    if (last == a->n[IDS]) return 0; /* that it only grows towards this is the core's to check */
    PyErr_Format(PyExc_ValueError, "Batch: begin: ends at %lld, but there are %zd ids", (long long)last, a->n[IDS]);
    return -1;
}

static PyObject *batch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "parent", "begin", "ids", "labels", "sample", "image", "n_images", NULL};
    core_state *state = PyType_GetModuleState(type);
    PyObject *model_value, *values[N_ARRAYS] = {0};
    long long n_images = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$OOOOOOL:Batch", names, state->model, &model_value, &values[PARENT], &values[BEGIN],
                                     &values[IDS], &values[LABELS], &values[SAMPLE], &values[IMAGE], &n_images))
        return NULL;
    for (int i = PARENT; i <= IDS; i++) {
        if (check_given(values[i], "Batch", names[i + 1]) < 0) return NULL;
        if (values[i] == Py_None) return PyErr_Format(PyExc_TypeError, "Batch: %s is None, want integers", names[i + 1]);
    }

    model_object *model = (model_object *)model_value;
    batch_object *self = NULL;
    arrays a = {0};
    if (take_arrays(&a, values) == 0 && model_enter(model) == 0) {
        stv_batch_spec spec = {
            .n_segments = a.n[PARENT],
            .parent = a.data[PARENT],
            .begin = a.data[BEGIN],
            .ids = a.data[IDS],
            .labels = a.data[LABELS],
            .sample = a.data[SAMPLE],
            .n_image_refs = a.n[IMAGE],
            .image = a.data[IMAGE],
            .n_images = n_images,
        };
        stv_batch *batch = NULL;
        stv_status status;
        Py_BEGIN_ALLOW_THREADS
        status = stv_batch_create(&batch, model->model, &spec);
        Py_END_ALLOW_THREADS
        model_leave(model);
        if (status != STV_OK) raise_status(state, status);
        else if (!(self = (batch_object *)new_instance(type))) stv_batch_free(batch);
        else self->model = model_ref(model), self->batch = batch;
    }
    for (int i = 0; i < N_ARRAYS; i++) Py_XDECREF(a.object[i]);
    return (PyObject *)self;
}

static int batch_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((batch_object *)object)->model);
    return 0;
}

static int batch_clear(PyObject *object)
{
    Py_CLEAR(((batch_object *)object)->model);
    return 0;
}

static void batch_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    stv_batch_free(((batch_object *)object)->batch);
    batch_clear(object);
    free_instance(object);
}

/* ---- attributes: every field of stv_batch_view ---------------------------------------------------------------------------------- */

typedef struct column {
    size_t offset, n_offset; /* of the pointer and of its count in the view */
    Py_ssize_t extra;        /* elements beyond the count */
    array_kind kind;
} column;

static PyObject *get_count(PyObject *object, void *offset)
{
    stv_batch_view view = stv_batch_get(((batch_object *)object)->batch);
    return PyLong_FromLongLong(*(const int64_t *)((const char *)&view + (size_t)offset));
}

static PyObject *get_column(PyObject *object, void *closure)
{
    const column *c = closure;
    stv_batch_view view = stv_batch_get(((batch_object *)object)->batch);
    const void *data;
    memcpy(&data, (const char *)&view + c->offset, sizeof data);
    Py_ssize_t n = (Py_ssize_t) * (const int64_t *)((const char *)&view + c->n_offset) + c->extra;
    return array_view(Py_NewRef(object), c->kind, 1, &n, data, false);
}

#define AT(field) (void *)offsetof(stv_batch_view, field)
#define COLUMN(field, count, extra, kind) \
    &(column) { offsetof(stv_batch_view, field), offsetof(stv_batch_view, count), extra, kind }

static PyGetSetDef getset[] = {
    {"n_rows", get_count, NULL, "int, packed rows, images included", AT(n_rows)},
    {"n_segments", get_count, NULL, "int, segments", AT(n_segments)},
    {"n_sequences", get_count, NULL, "int, paths from a root to a leaf", AT(n_sequences)},
    {"n_targets", get_count, NULL, "int, targets", AT(n_targets)},
    {"n_images", get_count, NULL, "int, images", AT(n_images)},
    {"row_token", get_column, NULL, "read-only array (n_rows,) int32: token id, -1 for image rows", COLUMN(row_token, n_rows, 0, KIND_I32)},
    {"row_feature", get_column, NULL, "read-only array (n_rows,) int64: image * tokens_per_image + token, or -1",
     COLUMN(row_feature, n_rows, 0, KIND_I64)},
    {"row_position", get_column, NULL, "read-only array (n_rows,) int32: position in its own sequences", COLUMN(row_position, n_rows, 0, KIND_I32)},
    {"row_sample", get_column, NULL, "read-only array (n_rows,) uint64: dropout key", COLUMN(row_sample, n_rows, 0, KIND_U64)},
    {"segment_row", get_column, NULL, "read-only array (n_segments+1,) int64: ranges of rows", COLUMN(segment_row, n_segments, 1, KIND_I64)},
    {"sequence_leaf", get_column, NULL, "read-only array (n_sequences,) int32: leaf segment", COLUMN(sequence_leaf, n_sequences, 0, KIND_I32)},
    {"sequence_begin", get_column, NULL, "read-only array (n_sequences+1,) int64: ranges of targets",
     COLUMN(sequence_begin, n_sequences, 1, KIND_I64)},
    {"target_row", get_column, NULL, "read-only array (n_targets,) int64: the predicting row", COLUMN(target_row, n_targets, 0, KIND_I64)},
    {"label_row", get_column, NULL, "read-only array (n_targets,) int64: the row of the label token itself",
     COLUMN(label_row, n_targets, 0, KIND_I64)},
    {"target_token", get_column, NULL, "read-only array (n_targets,) int32: token id", COLUMN(target_token, n_targets, 0, KIND_I32)},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)batch_doc},
    {Py_tp_new, batch_new},
    {Py_tp_dealloc, batch_dealloc},
    {Py_tp_traverse, batch_traverse},
    {Py_tp_clear, batch_clear},
    {Py_tp_getset, getset},
    {0, NULL},
};

PyType_Spec batch_spec = {
    .name = "stllava_c.Batch",
    .basicsize = sizeof(batch_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
