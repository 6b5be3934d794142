/* watched.c - a long call and the signals that arrive during it. Python runs signal handlers on its main thread, between byte codes; that thread is
 * inside the core, so the core's poll runs them. */
#include "binding.h"

static bool run_handlers(void *arg)
{
    watched *self = arg;
    PyEval_RestoreThread(self->thread);
    self->model->in_handler = true;
    bool stop = PyErr_CheckSignals() < 0;
    self->model->in_handler = false;
    self->thread = PyEval_SaveThread();
    return stop;
}

void watched_begin(watched *self, model_object *model)
{
    *self = (watched){.model = model, .watch = {.poll = run_handlers, .arg = self, .interval_ns = 50000000}};
    self->outer = stv_watch_set(&self->watch);
    self->thread = PyEval_SaveThread();
}

void watched_end(watched *self)
{
    PyEval_RestoreThread(self->thread);
    stv_watch_set(self->outer);
}
