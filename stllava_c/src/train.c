/* train.c - functions of a training step: preference losses, AdamW, gradient norm, schedule; and the sampler's probabilities. */
#include "binding.h"

#include <string.h>

static core_state *module_state(PyObject *module) { return PyModule_GetState(module); }

/* Index of a str among names, -1 with ValueError when it is none of them. */
static int take_name(PyObject *value, const char *what, const char *const *names)
{
    const char *text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, NULL) : NULL;
    if (PyErr_Occurred()) return -1;
    for (int i = 0; text && names[i]; i++)
        if (!strcmp(names[i], text)) return i;
    PyObject *known = PyUnicode_FromString(names[0]);
    for (int i = 1; known && names[i]; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U, %s", known, names[i]);
        Py_DECREF(known);
        known = longer;
    }
    if (known) PyErr_Format(PyExc_ValueError, "%s is %R, supported: %U", what, value, known);
    Py_XDECREF(known);
    return -1;
}

/* ---- preference losses --------------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    preference_loss_doc,
    "preference_loss(*, loss_types, weights=None, beta=0.1, label_smoothing=0.0, discopop_tau=0.05, f_divergence='reverse_kl', alpha=0.5, "
    "reference_free=False, policy_chosen, policy_rejected, reference_chosen=None, reference_rejected=None, chosen_tokens, rejected_tokens)\n--\n\n"
    "Mixture of preference losses over n_pairs pairs: sum of weights[k] * mean over pairs of loss k. Log-probabilities are sums over a\n"
    "sequence's targets, (n_pairs,) real numbers, computed in float64.\n\n"
    "Args:\n"
    "    loss_types: sequence of str from LOSS_TYPES. weights: one float each; None: all 1.\n"
    "    beta: float > 0. label_smoothing: float in [0, 0.5). discopop_tau: float > 0.\n"
    "    f_divergence: \"reverse_kl\", \"forward_kl\", \"js_divergence\" or \"alpha_divergence\" (with alpha).\n"
    "    reference_free: bool, reference log-probabilities count as 0 and are not given.\n"
    "    chosen_tokens, rejected_tokens: (n_pairs,) numbers of targets.\n\n"
    "Returns:\n"
    "    (loss, per_pair, dchosen, drejected): float; ndarray (n_losses, n_pairs), unweighted; ndarrays (n_pairs,), d loss / d policy\n"
    "    log-probability.\n\n"
    "Raises:\n"
    "    ValueError, TypeError: what does not fit.\n\n"
    "Source: TRL's DPOTrainer (dpo_loss); the sources of each loss are in csrc/train/preference.c.");

static int take_loss_types(PyObject *value, stv_loss_type **types, Py_ssize_t *n)
{
    const char *names[STV_LOSS_COUNT + 1] = {0};
    for (int i = 0; i < STV_LOSS_COUNT; i++) names[i] = stv_loss_name((stv_loss_type)i);
    PyObject *tuple = PyUnicode_Check(value) ? PyTuple_Pack(1, value) : PySequence_Tuple(value);
    if (!tuple) return -1;
    *n = PyTuple_Size(tuple);
    *types = PyMem_Calloc(*n ? (size_t)*n : 1, sizeof **types);
    if (!*types) PyErr_NoMemory();
    for (Py_ssize_t i = 0; *types && i < *n && !PyErr_Occurred(); i++)
        (*types)[i] = (stv_loss_type)take_name(PyTuple_GetItem(tuple, i), "preference_loss: loss_types", names);
    Py_DECREF(tuple);
    return PyErr_Occurred() ? -1 : 0;
}

enum { POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS, N_COLUMNS };

typedef struct columns {
    PyObject *object[N_COLUMNS];
    const void *data[N_COLUMNS];
    Py_ssize_t n_pairs;
} columns;

static const char *const column_names[] = {"policy_chosen",      "policy_rejected", "reference_chosen",
                                           "reference_rejected", "chosen_tokens",   "rejected_tokens"};

static int take_columns(columns *c, PyObject *const values[N_COLUMNS], bool reference_free)
{
    c->n_pairs = -1;
    for (int i = 0; i < N_COLUMNS; i++) {
        bool given = values[i] && values[i] != Py_None;
        if (i == REFERENCE_CHOSEN || i == REFERENCE_REJECTED) {
            if (given == reference_free) {
                PyErr_Format(PyExc_ValueError,
                             reference_free ? "preference_loss: %s is given, but reference_free is True"
                                            : "preference_loss: %s is missing; give it or set reference_free=True",
                             column_names[i]);
                return -1;
            }
            if (!given) continue;
        } else if (check_given(values[i], "preference_loss", column_names[i]) < 0) {
            return -1;
        }
        if (!(c->object[i] = array_take_list(values[i], column_names[i], KIND_F64, &c->n_pairs, &c->data[i]))) return -1;
    }
    return 0;
}

static PyObject *preference_loss(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"loss_types",      "weights",          "beta",
                            "label_smoothing", "discopop_tau",     "f_divergence",
                            "alpha",           "reference_free",   "policy_chosen",
                            "policy_rejected", "reference_chosen", "reference_rejected",
                            "chosen_tokens",   "rejected_tokens",  NULL};
    static const char *const divergences[] = {[STV_REVERSE_KL] = "reverse_kl",
                                              [STV_FORWARD_KL] = "forward_kl",
                                              [STV_JS_DIVERGENCE] = "js_divergence",
                                              [STV_ALPHA_DIVERGENCE] = "alpha_divergence",
                                              NULL};
    PyObject *types_value = NULL, *weights_value = NULL, *divergence = NULL, *values[N_COLUMNS] = {0};
    stv_preference_config config = {.beta = 0.1, .discopop_tau = 0.05, .f_divergence = STV_REVERSE_KL, .alpha = 0.5};
    int reference_free = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOdddOdpOOOOOO:preference_loss", names, &types_value, &weights_value, &config.beta,
                                     &config.label_smoothing, &config.discopop_tau, &divergence, &config.alpha, &reference_free, &values[0],
                                     &values[1], &values[2], &values[3], &values[4], &values[5]))
        return NULL;
    if (check_given(types_value, "preference_loss", "loss_types") < 0) return NULL;

    stv_loss_type *types = NULL;
    Py_ssize_t n_losses = 0;
    columns c = {0};
    PyObject *weights = NULL, *per_pair = NULL, *dchosen = NULL, *drejected = NULL, *result = NULL;
    double *ones = NULL;
    if (take_loss_types(types_value, &types, &n_losses) < 0) goto done;
    if (divergence) {
        int chosen = take_name(divergence, "preference_loss: f_divergence", divergences);
        if (chosen < 0) goto done;
        config.f_divergence = (stv_f_divergence)chosen;
    }
    if (weights_value && weights_value != Py_None) {
        const void *data;
        if (!(weights = array_take_list(weights_value, "preference_loss: weights", KIND_F64, &n_losses, &data))) goto done;
        config.weights = data;
    } else {
        if (!(ones = PyMem_Calloc(n_losses ? (size_t)n_losses : 1, sizeof *ones))) {
            PyErr_NoMemory();
            goto done;
        }
        for (Py_ssize_t i = 0; i < n_losses; i++) ones[i] = 1;
        config.weights = ones;
    }
    if (take_columns(&c, values, reference_free) < 0) goto done;
    config.n_losses = n_losses;
    config.types = types;
    config.reference_free = reference_free;

    void *per_pair_data, *dchosen_data, *drejected_data;
    per_pair = array_new(KIND_F64, 2, (Py_ssize_t[]){n_losses, c.n_pairs}, &per_pair_data);
    dchosen = array_new(KIND_F64, 1, &c.n_pairs, &dchosen_data);
    drejected = array_new(KIND_F64, 1, &c.n_pairs, &drejected_data);
    if (!per_pair || !dchosen || !drejected) goto done;
    stv_preference_input input = {c.n_pairs, c.data[0], c.data[1], c.data[2], c.data[3], c.data[4], c.data[5]};
    double loss;
    stv_status status = stv_preference_loss(&loss, per_pair_data, dchosen_data, drejected_data, &config, &input);
    result = status == STV_OK ? Py_BuildValue("dOOO", loss, per_pair, dchosen, drejected) : raise_status(module_state(module), status);
done:
    PyMem_Free(types);
    PyMem_Free(ones);
    for (int i = 0; i < N_COLUMNS; i++) Py_XDECREF(c.object[i]);
    Py_XDECREF(weights);
    Py_XDECREF(per_pair);
    Py_XDECREF(dchosen);
    Py_XDECREF(drejected);
    return result;
}

/* ---- optimiser ----------------------------------------------------------------------------------------------------------------- */

/* A sequence of (begin, end, lr, weight_decay); freed with PyMem_Free. NULL on error. */
static stv_adamw_range *take_ranges(PyObject *value, const char *what, Py_ssize_t *n)
{
    PyObject *rows = PySequence_Tuple(value);
    if (!rows) return NULL;
    *n = PyTuple_Size(rows);
    stv_adamw_range *ranges = PyMem_Calloc(*n ? (size_t)*n : 1, sizeof *ranges);
    if (!ranges) PyErr_NoMemory();
    for (Py_ssize_t i = 0; ranges && i < *n; i++) {
        PyObject *row = PySequence_Tuple(PyTuple_GetItem(rows, i));
        long long begin, end;
        bool fits = row && PyTuple_Size(row) == 4 && PyArg_ParseTuple(row, "LLdd", &begin, &end, &ranges[i].lr, &ranges[i].weight_decay);
        if (fits) {
            ranges[i].begin = begin;
            ranges[i].end = end;
        } else {
            if (!PyErr_Occurred() || !PyErr_ExceptionMatches(PyExc_MemoryError)) {
                PyErr_Clear();
                PyErr_Format(PyExc_TypeError, "%s: ranges[%zd]: want (begin: int, end: int, lr: float, weight_decay: float), got %R", what, i,
                             PyTuple_GetItem(rows, i));
            }
            PyMem_Free(ranges);
            ranges = NULL;
        }
        Py_XDECREF(row);
    }
    Py_DECREF(rows);
    return ranges;
}

PyDoc_STRVAR(adamw_step_doc,
             "adamw_step(model, m, v, ranges, *, beta1=0.9, beta2=0.999, eps=1e-08, step, grad_scale=1.0)\n--\n\n"
             "One update in place of the model's trainable values; elements outside every range stay untouched.\n\n"
             "Args:\n"
             "    model: Model in which something trains.\n"
             "    m, v: writable buffers (n_trainable,) of the model's dtype: first and second moments.\n"
             "    ranges: sequence of (begin, end, lr, weight_decay): elements [begin, end) of the flat buffer, ascending, none twice.\n"
             "    step: int >= 1, number of this update.\n"
             "    grad_scale: float, gradients are multiplied by it first.\n\n"
             "Raises:\n"
             "    ValueError, TypeError: what does not fit. Error (\"state\"): nothing trains.\n\n"
             "Source: Loshchilov & Hutter, arXiv 1711.05101, in torch.optim.AdamW's order of operations.");

static PyObject *adamw_step(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "m", "v", "ranges", "beta1", "beta2", "eps", "step", "grad_scale", NULL};
    core_state *state = module_state(module);
    PyObject *model_value, *m_value, *v_value, *ranges_value, *step_value = NULL;
    stv_adamw_config config = {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .grad_scale = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!OOO|$dddOd:adamw_step", names, state->model, &model_value, &m_value, &v_value, &ranges_value,
                                     &config.beta1, &config.beta2, &config.eps, &step_value, &config.grad_scale))
        return NULL;
    if (check_given(step_value, "adamw_step", "step") < 0) return NULL;
    config.step = PyNumber_AsSsize_t(step_value, PyExc_ValueError);
    if (PyErr_Occurred()) return NULL;

    model_object *model = (model_object *)model_value;
    array_kind kind = kind_of(model->dtype);
    Py_ssize_t n_ranges;
    Py_buffer m = {0}, v = {0};
    stv_adamw_range *ranges = take_ranges(ranges_value, "adamw_step", &n_ranges);
    if (ranges && borrow_buffer(&m, m_value, "adamw_step: m", kind, -1, true) == 0 &&
        borrow_buffer(&v, v_value, "adamw_step: v", kind, -1, true) == 0 && model_enter(model) == 0) {
        Py_ssize_t n = (Py_ssize_t)stv_model_n_trainable(model->model);
        if (check_size("adamw_step: m", n, m.len / m.itemsize) == 0 && check_size("adamw_step: v", n, v.len / v.itemsize) == 0) {
            stv_status status;
            Py_BEGIN_ALLOW_THREADS
            status = stv_adamw_step(model->model, m.buf, v.buf, ranges, n_ranges, &config);
            Py_END_ALLOW_THREADS
            if (status != STV_OK) raise_status(state, status);
        }
        model_leave(model);
    }
    PyBuffer_Release(&m);
    PyBuffer_Release(&v);
    PyMem_Free(ranges);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(grad_norm_doc, "grad_norm(model, ranges)\n--\n\n"
                            "Square root of the sum of squares of the gradients inside the ranges, in float64; NaN and infinity show through.\n\n"
                            "Args:\n"
                            "    model: Model. ranges: as in adamw_step; lr and weight_decay are not looked at.\n\n"
                            "Raises:\n"
                            "    ValueError, TypeError: what does not fit.");

static PyObject *grad_norm(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "ranges", NULL};
    core_state *state = module_state(module);
    PyObject *model_value, *ranges_value, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O:grad_norm", names, state->model, &model_value, &ranges_value)) return NULL;
    model_object *model = (model_object *)model_value;
    Py_ssize_t n_ranges;
    stv_adamw_range *ranges = take_ranges(ranges_value, "grad_norm", &n_ranges);
    if (ranges && model_enter(model) == 0) {
        double norm;
        stv_status status;
        Py_BEGIN_ALLOW_THREADS
        status = stv_grad_norm(model->model, ranges, n_ranges, &norm);
        Py_END_ALLOW_THREADS
        model_leave(model);
        result = status == STV_OK ? PyFloat_FromDouble(norm) : raise_status(state, status);
    }
    PyMem_Free(ranges);
    return result;
}

PyDoc_STRVAR(schedule_doc, "schedule(kind, step, warmup, total, floor=0.0)\n--\n\n"
                           "Multiplier of the learning rate at an update: step / warmup while warming up, then the curve down to floor at total.\n\n"
                           "Args:\n"
                           "    kind: \"constant\", \"linear\" or \"cosine\".\n"
                           "    step: int >= 0, number of the update. warmup, total: int, updates.\n"
                           "    floor: float, the multiplier at the end.\n\n"
                           "Raises:\n"
                           "    ValueError: an unknown kind, or a negative number.");

static PyObject *schedule(PyObject *module, PyObject *args, PyObject *kwargs)
{
    (void)module;
    static char *names[] = {"kind", "step", "warmup", "total", "floor", NULL};
    static const char *const kinds[] = {
        [STV_SCHEDULE_CONSTANT] = "constant", [STV_SCHEDULE_LINEAR] = "linear", [STV_SCHEDULE_COSINE] = "cosine", NULL};
    PyObject *kind_value;
    long long step, warmup, total;
    double floor = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OLLL|d:schedule", names, &kind_value, &step, &warmup, &total, &floor)) return NULL;
    int kind = take_name(kind_value, "schedule: kind", kinds);
    if (kind < 0) return NULL;
    if (step < 0 || warmup < 0 || total < 0)
        return PyErr_Format(PyExc_ValueError, "schedule: step %lld, warmup %lld, total %lld: want at least 0 each", step, warmup, total);
    return PyFloat_FromDouble(stv_schedule((stv_schedule_kind)kind, step, warmup, total, floor));
}

/* ---- sampling ------------------------------------------------------------------------------------------------------------------ */

PyDoc_STRVAR(sampling_probabilities_doc,
             "sampling_probabilities(logits, *, temperature, top_k, top_p)\n--\n\n"
             "What a generator draws from: temperature, then top-k (ties with the k-th kept), then top-p, then softmax.\n\n"
             "Args:\n"
             "    logits: (vocab_size,) real numbers.\n"
             "    temperature: float >= 0; 0: all on the likeliest. top_k: int >= 0; 0: off. top_p: float in (0, 1]; 1: off.\n\n"
             "Returns:\n"
             "    ndarray (vocab_size,) float64.\n\n"
             "Raises:\n"
             "    ValueError, TypeError: what does not fit.\n\n"
             "Source: transformers 4.31, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper.");

static PyObject *sampling_probabilities(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"logits", "temperature", "top_k", "top_p", NULL};
    PyObject *logits_value, *values[3] = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$OOO:sampling_probabilities", names, &logits_value, &values[0], &values[1], &values[2]))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (check_given(values[i], "sampling_probabilities", names[i + 1]) < 0) return NULL;
    stv_sampling sampling = {.temperature = PyFloat_AsDouble(values[0])};
    if (!PyErr_Occurred()) sampling.top_k = PyNumber_AsSsize_t(values[1], PyExc_ValueError);
    if (!PyErr_Occurred()) sampling.top_p = PyFloat_AsDouble(values[2]);
    if (PyErr_Occurred()) return NULL;

    Py_ssize_t n = -1;
    const void *logits_data;
    void *data;
    PyObject *logits = array_take_list(logits_value, "sampling_probabilities: logits", KIND_F64, &n, &logits_data);
    PyObject *probabilities = logits ? array_new(KIND_F64, 1, &n, &data) : NULL;
    if (probabilities) {
        stv_status status = stv_sampling_probabilities(data, logits_data, n, &sampling);
        if (status != STV_OK) {
            Py_CLEAR(probabilities);
            raise_status(module_state(module), status);
        }
    }
    Py_XDECREF(logits);
    return probabilities;
}

PyMethodDef train_functions[] = {
    {"preference_loss", KEYWORDS(preference_loss), preference_loss_doc},
    {"adamw_step", KEYWORDS(adamw_step), adamw_step_doc},
    {"grad_norm", KEYWORDS(grad_norm), grad_norm_doc},
    {"schedule", KEYWORDS(schedule), schedule_doc},
    {"sampling_probabilities", KEYWORDS(sampling_probabilities), sampling_probabilities_doc},
    {NULL, NULL, 0, NULL},
};
