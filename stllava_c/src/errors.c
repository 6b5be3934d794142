/* errors.c - the core's status and message become Python exceptions here, and nowhere else. */
#include "binding.h"

#include <stdarg.h>

static const char *status_code(stv_status status)
{
    switch (status) {
    case STV_OK: break;
    case STV_ERR_ARGUMENT: return "argument";
    case STV_ERR_SHAPE: return "shape";
    case STV_ERR_DTYPE: return "dtype";
    case STV_ERR_NAME: return "name";
    case STV_ERR_STATE: return "state";
    case STV_ERR_INTERRUPTED: return "interrupted";
    case STV_ERR_MEMORY: return "memory";
    case STV_ERR_FILE: return "file";
    case STV_ERR_FORMAT: return "format";
    case STV_ERR_NUMERIC: return "numeric";
    case STV_ERR_DEVICE: return "device";
    case STV_ERR_UNSUPPORTED: return "unsupported";
    case STV_ERR_INTERNAL: break;
    }
    return "internal";
}

static void raise_with_code(PyObject *type, PyObject *message, const char *code)
{
    PyObject *error = message ? PyObject_CallFunctionObjArgs(type, message, NULL) : NULL;
    PyObject *text = error ? PyUnicode_FromString(code) : NULL;
    if (text && PyObject_SetAttrString(error, "code", text) == 0) PyErr_SetObject(type, error);
    Py_XDECREF(text);
    Py_XDECREF(error);
    Py_XDECREF(message);
}

PyObject *raise_status(core_state *state, stv_status status)
{
    const char *message = stv_last_error();
    switch (status) {
    case STV_ERR_ARGUMENT:
    case STV_ERR_SHAPE:
    case STV_ERR_DTYPE:
    case STV_ERR_NAME: PyErr_SetString(PyExc_ValueError, message); break;
    case STV_ERR_MEMORY: PyErr_SetString(PyExc_MemoryError, message); break;
    case STV_ERR_INTERRUPTED: break; /* a signal handler's exception stands */
    case STV_ERR_FILE: PyErr_SetString(PyExc_OSError, message); break;
    case STV_ERR_NUMERIC: raise_with_code(state->numeric_error, PyUnicode_FromString(message), status_code(status)); break;
    default: raise_with_code(state->error, PyUnicode_FromString(message), status_code(status)); break;
    }
    return NULL;
}

PyObject *raise_state(core_state *state, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *message = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    raise_with_code(state->error, message, status_code(STV_ERR_STATE));
    return NULL;
}

int errors_init(PyObject *module, core_state *state)
{
    PyObject *members = Py_BuildValue("{ss}", "code", status_code(STV_ERR_INTERNAL));
    if (!members) return -1;
    state->error = PyErr_NewExceptionWithDoc(
        "stllava_c.Error",
        "What no builtin exception describes. `code` says which: \"state\" (right call, wrong moment), \"format\" (damaged bytes),\n"
        "\"unsupported\", \"numeric\", \"device\" or \"internal\". Wrong arguments are ValueError or TypeError.",
        NULL, members);
    Py_DECREF(members);
    if (!state->error || PyModule_AddObjectRef(module, "Error", state->error) < 0) return -1;

    PyObject *bases = PyTuple_Pack(2, state->error, PyExc_ArithmeticError);
    if (!bases) return -1;
    state->numeric_error = PyErr_NewExceptionWithDoc("stllava_c.NumericError", "NaN or infinity where a number is needed.", bases, NULL);
    Py_DECREF(bases);
    return state->numeric_error ? PyModule_AddObjectRef(module, "NumericError", state->numeric_error) : -1;
}
