/* model_config.c - the dictionary of Model(config) <-> stv_model_config. Which values fit together is the core's to say; here only keys and types. */
#include "model.h"

#include <string.h>

typedef enum field_type { FIELD_INT, FIELD_REAL, FIELD_BOOL, FIELD_CHOICE, FIELD_CHOICE_BOOL, FIELD_UNUSED } field_type;

typedef struct field {
    const char *key;
    field_type type;
    bool required;
    size_t offset; /* in its part */
    const char *choices[5];
} field;

typedef struct part {
    const char *key;
    size_t offset, has_offset; /* in stv_model_config */
    const field *fields;
} part;

#define V(name) offsetof(stv_vision_config, name)
static const field vision_fields[] = {
    {"image_size", FIELD_INT, true, V(image_size), {0}},
    {"patch_size", FIELD_INT, true, V(patch_size), {0}},
    {"hidden_size", FIELD_INT, true, V(hidden_size), {0}},
    {"n_layers", FIELD_INT, true, V(n_layers), {0}},
    {"n_heads", FIELD_INT, true, V(n_heads), {0}},
    {"intermediate_size", FIELD_INT, true, V(intermediate_size), {0}},
    {"activation", FIELD_CHOICE, true, V(activation), {"gelu", "quick_gelu"}},
    {"layer_norm_eps", FIELD_REAL, true, V(layer_norm_eps), {0}},
    {"select_layer", FIELD_INT, false, V(select_layer), {0}},
    {"select_feature", FIELD_CHOICE_BOOL, false, V(select_class), {"patch", "cls_patch"}},
    {0},
};

#define P(name) offsetof(stv_projector_config, name)
static const field projector_fields[] = {
    {"kind", FIELD_CHOICE, true, P(kind), {"identity", "linear", "mlp", "cluster"}},
    {"in_size", FIELD_INT, true, P(in_size), {0}},
    {"out_size", FIELD_INT, true, P(out_size), {0}},
    {"depth", FIELD_INT, false, P(depth), {0}},
    {"n_centers", FIELD_INT, false, P(n_centers), {0}},
    {"n_rounds", FIELD_INT, false, P(n_rounds), {0}},
    {0},
};

#define D(name) offsetof(stv_decoder_config, name)
static const field decoder_fields[] = {
    {"vocab_size", FIELD_INT, true, D(vocab_size), {0}},
    {"hidden_size", FIELD_INT, true, D(hidden_size), {0}},
    {"n_layers", FIELD_INT, true, D(n_layers), {0}},
    {"n_heads", FIELD_INT, true, D(n_heads), {0}},
    {"n_kv_heads", FIELD_INT, true, D(n_kv_heads), {0}},
    {"head_dim", FIELD_INT, true, D(head_dim), {0}},
    {"intermediate_size", FIELD_INT, true, D(intermediate_size), {0}},
    {"rms_norm_eps", FIELD_REAL, true, D(rms_norm_eps), {0}},
    {"rope_theta", FIELD_REAL, true, D(rope_theta), {0}},
    {"sliding_window", FIELD_INT, false, D(sliding_window), {0}},
    {"tie_word_embeddings", FIELD_BOOL, false, D(tie_word_embeddings), {0}},
    {"max_position_embeddings", FIELD_UNUSED, false, 0, {0}}, /* RoPE has no table to outgrow */
    {0},
};

static const part parts[] = {
    {"vision", offsetof(stv_model_config, vision), offsetof(stv_model_config, has_vision), vision_fields},
    {"projector", offsetof(stv_model_config, projector), offsetof(stv_model_config, has_projector), projector_fields},
    {"decoder", offsetof(stv_model_config, decoder), offsetof(stv_model_config, has_decoder), decoder_fields},
};
enum { N_PARTS = sizeof parts / sizeof *parts };

/* ---- dictionary -> struct ------------------------------------------------------------------------------------------------------ */

static int take_choice(const part *p, const field *f, PyObject *value, int *chosen)
{
    const char *text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, NULL) : NULL;
    if (PyErr_Occurred()) return -1;
    for (*chosen = 0; text && f->choices[*chosen]; ++*chosen)
        if (!strcmp(f->choices[*chosen], text)) return 0;
    PyObject *known = PyUnicode_FromString("");
    for (int i = 0; known && f->choices[i]; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U%s'%s'", known, i ? ", " : "", f->choices[i]);
        Py_DECREF(known);
        known = longer;
    }
    if (known) PyErr_Format(PyExc_ValueError, "Model: config: %s.%s is %R, supported: %U", p->key, f->key, value, known);
    Py_XDECREF(known);
    return -1;
}

static int take_field(const part *p, const field *f, PyObject *value, char *to)
{
    int chosen;
    switch (f->type) {
    case FIELD_UNUSED: return 0;
    case FIELD_BOOL:
        if (!PyBool_Check(value)) break;
        *(bool *)to = value == Py_True;
        return 0;
    case FIELD_REAL:
        if (!PyFloat_Check(value) && !PyLong_Check(value)) break;
        *(double *)to = PyFloat_AsDouble(value);
        return PyErr_Occurred() ? -1 : 0;
    case FIELD_INT:
        if (!PyLong_Check(value) || PyBool_Check(value)) break;
        *(int64_t *)to = PyLong_AsLongLong(value);
        return PyErr_Occurred() ? -1 : 0;
    case FIELD_CHOICE:
        if (take_choice(p, f, value, &chosen) < 0) return -1;
        *(int *)to = chosen;
        return 0;
    case FIELD_CHOICE_BOOL:
        if (take_choice(p, f, value, &chosen) < 0) return -1;
        *(bool *)to = chosen;
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "Model: config: %s.%s is %R, want %s", p->key, f->key, value,
                 f->type == FIELD_BOOL  ? "True or False"
                 : f->type == FIELD_INT ? "an integer"
                                        : "a number");
    return -1;
}

/* Takes the fields out of a copy of the dictionary; what is left over is unknown. */
static int take_part(const part *p, PyObject *values, char *to)
{
    if (!PyDict_Check(values)) {
        PyErr_Format(PyExc_TypeError, "Model: config: %s is %R, want a dict or None", p->key, values);
        return -1;
    }
    PyObject *rest = PyDict_Copy(values);
    if (!rest) return -1;
    for (const field *f = p->fields; f->key && !PyErr_Occurred(); f++) {
        PyObject *value;
        if (find_item(values, f->key, &value) < 0) break;
        if (!value && f->required) PyErr_Format(PyExc_ValueError, "Model: config: %s lacks '%s'", p->key, f->key);
        if (value && take_field(p, f, value, to + f->offset) == 0) PyDict_DelItemString(rest, f->key);
    }
    PyObject *unknown, *unused;
    Py_ssize_t at = 0;
    if (!PyErr_Occurred() && PyDict_Next(rest, &at, &unknown, &unused))
        PyErr_Format(PyExc_ValueError, "Model: config: %s has the unknown key %R", p->key, unknown);
    Py_DECREF(rest);
    return PyErr_Occurred() ? -1 : 0;
}

int model_config_take(stv_model_config *config, PyObject *values)
{
    *config = (stv_model_config){.vision.select_layer = -2};
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(values, &at, &key, &value)) {
        int i = 0;
        while (i < N_PARTS && !(PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, parts[i].key) == 0)) i++;
        if (i == N_PARTS) {
            PyErr_Format(PyExc_ValueError, "Model: config has the unknown part %R, supported: vision, projector, decoder", key);
            return -1;
        }
        if (value == Py_None) continue;
        if (take_part(&parts[i], value, (char *)config + parts[i].offset) < 0) return -1;
        *((bool *)((char *)config + parts[i].has_offset)) = true;
    }
    return 0;
}

/* ---- struct -> dictionary ------------------------------------------------------------------------------------------------------ */

static PyObject *give_field(const field *f, const char *from)
{
    switch (f->type) {
    case FIELD_INT: return PyLong_FromLongLong(*(const int64_t *)from);
    case FIELD_REAL: return PyFloat_FromDouble(*(const double *)from);
    case FIELD_BOOL: return PyBool_FromLong(*(const bool *)from);
    case FIELD_CHOICE: return PyUnicode_FromString(f->choices[*(const int *)from]);
    case FIELD_CHOICE_BOOL: return PyUnicode_FromString(f->choices[*(const bool *)from]);
    case FIELD_UNUSED: break;
    }
    return NULL;
}

static PyObject *give_part(const part *p, const char *from)
{
    PyObject *values = PyDict_New();
    for (const field *f = p->fields; values && f->key; f++) {
        if (f->type == FIELD_UNUSED) continue;
        PyObject *value = give_field(f, from + f->offset);
        if (!value || PyDict_SetItemString(values, f->key, value) < 0) Py_CLEAR(values);
        Py_XDECREF(value);
    }
    return values;
}

PyObject *model_config_give(const stv_model_config *config)
{
    PyObject *result = PyDict_New();
    for (int i = 0; result && i < N_PARTS; i++) {
        bool has = *(const bool *)((const char *)config + parts[i].has_offset);
        PyObject *values = has ? give_part(&parts[i], (const char *)config + parts[i].offset) : Py_NewRef(Py_None);
        if (!values || PyDict_SetItemString(result, parts[i].key, values) < 0) Py_CLEAR(result);
        Py_XDECREF(values);
    }
    return result;
}
