/* binding.h - what the files of the binding share. The binding translates: parse, borrow, release the GIL, call stllava.h, map the status.
 *
 *   module.c   init, state, context        tensor.c     memory with a shape: the buffer protocol
 *   errors.c   the only file that raises   model*.c     tensors by name, adapters, the flat buffers, the lock
 *              for the core                batch.c run*.c generator.c    one type each, all made from a model
 *   ndarray.c  the only file that sees     forward.c    arguments that every forward shares
 *              NumPy's headers             train.c image.c               functions
 *   watched.c  signals in long calls
 *
 * Locking. The core wants one caller at a time per object, and runs and generators read and write their model. So one lock, the
 * model's, guards the model and everything made from it; it is waited for without the GIL and held while the core computes without
 * the GIL. The thread that has it may take it again: a garbage collection inside a call may free another run of the same model. */
#ifndef STLLAVA_BINDING_H
#define STLLAVA_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "stllava.h"

/* ---- module state ---------------------------------------------------------------------------------------------------------- */

typedef struct core_state {
    stv_context *context;
    Py_ssize_t calls; /* held locks of models: calls that may be computing */
    int n_forks;      /* when calls was counted */
    PyObject *error, *numeric_error;
    PyTypeObject *tensor, *tensor_info, *model, *batch, *run, *generator;
} core_state;

core_state *state_of(PyObject *object); /* of an instance of one of our types */

extern PyType_Spec tensor_spec, model_spec, batch_spec, run_spec, generator_spec;
extern PyStructSequence_Desc tensor_info_desc;
extern PyMethodDef train_functions[], image_functions[];

/* Function and flags of a PyMethodDef. */
#define KEYWORDS(f) (PyCFunction)(void (*)(void))(f), METH_VARARGS | METH_KEYWORDS

int convert_u64(PyObject *value, void *to); /* "O&" converter to uint64_t */
/* A required keyword-only argument: -1 with TypeError when it was not given. */
int check_given(PyObject *value, const char *function, const char *name);

/* dict[key], borrowed: 1 found, 0 not there, -1 error. PyDict_GetItemString takes a want of memory for "not there". */
int find_item(PyObject *dict, const char *key, PyObject **item);

/* tp_alloc, and the last step of tp_dealloc. */
PyObject *new_instance(PyTypeObject *type);
void free_instance(PyObject *self);

/* ---- errors.c -------------------------------------------------------------------------------------------------------------- */

/* Raises what belongs to the core's status and message; returns NULL. */
PyObject *raise_status(core_state *state, stv_status status);
/* stllava_c.Error with code "state": right call, wrong moment. Returns NULL. */
PyObject *raise_state(core_state *state, const char *format, ...);
int errors_init(PyObject *module, core_state *state);

/* ---- ndarray.c ------------------------------------------------------------------------------------------------------------- */

/* The first are stv_dtype's, in its order. */
typedef enum array_kind { KIND_F32, KIND_F64, KIND_F16, KIND_BF16, KIND_I32, KIND_I64, KIND_U64, KIND_U8, KIND_COUNT } array_kind;

typedef struct kind_info {
    const char *name, *format; /* "f32", and struct's character; bf16 has none and travels as uint16 */
    Py_ssize_t size_bytes;
} kind_info;
extern const kind_info array_kinds[KIND_COUNT];

static inline array_kind kind_of(stv_dtype dtype) { return (array_kind)dtype; }

int ndarray_init(void);
/* A new array and where its elements lie; NULL on error. */
PyObject *array_new(array_kind kind, int ndim, const Py_ssize_t *shape, void **data);
PyObject *array_copy(array_kind kind, int ndim, const Py_ssize_t *shape, const void *data);
/* An array on foreign memory that `base` keeps alive (the reference is taken, also on error). */
PyObject *array_view(PyObject *base, array_kind kind, int ndim, const Py_ssize_t *shape, const void *data, bool writable);

/* A C-contiguous array of this kind with the value's elements, converted where nothing is lost but precision: any real numbers for
 * f32 and f64, any integers in range for the integers; u8 stays u8. Checks ndim and shape (-1: any; filled with what was found).
 * `what` names the argument in errors ("Run.forward: pixels"). New reference, NULL with TypeError or ValueError. */
PyObject *array_take(PyObject *value, const char *what, array_kind kind, int ndim, Py_ssize_t *shape, const void **data);
/* The same for a list of numbers, (n), and for numbers in any shape. n: wanted or -1, filled with what was found. */
PyObject *array_take_list(PyObject *value, const char *what, array_kind kind, Py_ssize_t *n, const void **data);
PyObject *array_take_flat(PyObject *value, const char *what, array_kind kind, Py_ssize_t *n, const void **data);
int check_size(const char *what, Py_ssize_t want, Py_ssize_t found); /* -1 with ValueError */

/* ---- tensor.c -------------------------------------------------------------------------------------------------------------- */

#define TENSOR_MAX_DIM 8

/* Borrows the memory of obj: C-contiguous, aligned, of this kind, n elements (-1: any). Released by PyBuffer_Release. -1 with TypeError or ValueError. */
int borrow_buffer(Py_buffer *view, PyObject *obj, const char *what, array_kind kind, Py_ssize_t n, bool writable);
bool buffer_kind(const Py_buffer *view, array_kind *kind); /* false: none of ours */

/* ---- model.c --------------------------------------------------------------------------------------------------------------- */

typedef struct model_object {
    PyObject_HEAD stv_model *model; /* NULL: closed */
    core_state *state;              /* of `module`, which the model keeps: at Python's end types lose theirs before the last instances go */
    PyObject *module;               /* not traversed, so that it is never garbage before the model */
    stv_model_config config;
    stv_dtype dtype;
    PyObject *bindings;  /* {name: Tensor that borrows what was bound} */
    Py_ssize_t exports;  /* live buffers on memory of the core's */
    Py_ssize_t users;    /* live runs and generators */
    uint64_t generation; /* counts what moves memory: views of an older one are stale */
    PyThread_type_lock lock;
    unsigned long owner; /* thread that has the lock, 0: none; read and written with the GIL */
    int depth;
    bool in_handler; /* the owner's call waits while a signal handler runs */
    int n_forks;     /* when the lock was last looked at */
} model_object;

static inline model_object *model_ref(model_object *model) { return (model_object *)Py_NewRef((PyObject *)model); }

/* Takes the lock; -1 with an exception when the model is closed, or in a signal handler that interrupts a call on it. model_leave gives it
 * back; both with the GIL. */
int model_enter(model_object *self);
void model_leave(model_object *self);
void model_lock(model_object *self); /* closed or not: for deallocation */

/* In a forked child, calls of the parent's threads never end: they are forgotten. What such a call was writing (its run, its model's gradient)
 * is undefined there; a new run of the model is not. */
void count_forks(void);
int forks_counted(void);
void forget_calls_before_fork(core_state *state);

/* A Tensor on memory that a model's lock and generation guard, or that `holder` keeps alive (holder NULL: the core's own). */
PyObject *tensor_view_new(model_object *model, PyObject *holder, PyObject *name, const stv_tensor_info *info);
/* A Tensor on the values of a weight, of any type that the model's dtype holds exactly. */
PyObject *tensor_borrow(core_state *state, PyObject *obj, const char *what, stv_dtype dtype, stv_stored *values, Py_ssize_t *n);

/* ---- watched.c ------------------------------------------------------------------------------------------------------------- */

/* Between begin and end the core computes without the GIL. On Python's main thread signals are handled meanwhile; when a handler raises, the core
 * stops, the status is STV_ERR_INTERRUPTED and the exception is set. */
typedef struct watched {
    model_object *model; /* entered */
    PyThreadState *thread;
    stv_watch watch, *outer;
} watched;

void watched_begin(watched *self, model_object *model);
void watched_end(watched *self);

/* ---- batch.c, forward.c ---------------------------------------------------------------------------------------------------- */

typedef struct batch_object {
    PyObject_HEAD model_object *model;
    stv_batch *batch;
} batch_object;

/* The core's forward options and the Python objects whose memory they borrow. */
typedef struct forward_call {
    stv_forward_options options;
    PyObject *pixels, *features; /* arrays, or NULL */
    Py_buffer theta;             /* obj NULL: none */
} forward_call;

int64_t feature_width(const model_object *model); /* D of projected features */

/* As parsed: borrowed references, NULL or None where not given. */
typedef struct forward_values {
    PyObject *pixels, *features, *theta;
} forward_values;

/* Converts pixels (n,3,S,S) and features (n*T*D) and borrows theta, of the model's dtype; n_images -1: as many as pixels has. -1 on error. */
int forward_take(forward_call *call, model_object *model, const char *what, forward_values values, int64_t n_images);
/* With the lock: theta has as many elements as the model trains. -1 on error. */
int forward_check_theta(const forward_call *call, model_object *model, const char *what);
void forward_drop(forward_call *call); /* takes a zeroed one */
int forward_traverse(const forward_call *call, visitproc visit, void *arg);

#endif
