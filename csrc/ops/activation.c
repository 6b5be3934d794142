#include "ops/activation.h"

#include "ops/fastmath.h"
#include "ops/split.h"

enum { GRAIN = 1 << 12 }; /* elements with an exponential each that are worth a task */

#if STV_REAL_BITS == 32
#define ERFC erfcf
#else
#define ERFC erfc
#endif

static const real quick = STV_REAL(1.702);

/* Phi(x), the normal distribution. erfc keeps the digits of the left tail that 1 + erf would cancel. */
static inline real normal_cdf(real x) { return STV_REAL(0.5) * ERFC(-x * STV_REAL(0.70710678118654752440)); }
static inline real normal_density(real x) { return STV_REAL(0.39894228040143267794) * exp_real(STV_REAL(-0.5) * x * x); }

typedef struct activation_args {
    real *y; /* or din */
    const real *dy, *in;
} activation_args;

static void gelu_forward(const void *arg, int64_t begin, int64_t end)
{
    const activation_args *a = arg;
    for (int64_t i = begin; i < end; i++) a->y[i] = a->in[i] * normal_cdf(a->in[i]);
}

static void gelu_backward(const void *arg, int64_t begin, int64_t end)
{
    const activation_args *a = arg;
    for (int64_t i = begin; i < end; i++) {
        real in = a->in[i];
        a->y[i] = a->dy[i] * (normal_cdf(in) + in * normal_density(in));
    }
}

STV_CLONES static void quick_gelu_forward(const void *arg, int64_t begin, int64_t end)
{
    const activation_args *a = arg;
    for (int64_t i = begin; i < end; i++) a->y[i] = a->in[i] * sigmoid(quick * a->in[i]);
}

STV_CLONES static void quick_gelu_backward(const void *arg, int64_t begin, int64_t end)
{
    const activation_args *a = arg;
    for (int64_t i = begin; i < end; i++) {
        real in = a->in[i], s = sigmoid(quick * in);
        a->y[i] = a->dy[i] * (s + quick * in * s * (1 - s));
    }
}

void stv_activation_forward(stv_exec *x, real *y, const real *in, int64_t n, stv_activation kind)
{
    if (stv_measuring(x)) return;
    activation_args args = {y, NULL, in};
    stv_split(x, n, GRAIN, kind == STV_GELU ? gelu_forward : quick_gelu_forward, &args);
}

void stv_activation_backward(stv_exec *x, real *din, const real *dy, const real *in, int64_t n, stv_activation kind)
{
    if (stv_measuring(x)) return;
    activation_args args = {din, dy, in};
    stv_split(x, n, GRAIN, kind == STV_GELU ? gelu_backward : quick_gelu_backward, &args);
}

typedef struct swiglu_args {
    real *y, *dgate, *dup;
    const real *dy, *gate, *up;
} swiglu_args;

STV_CLONES static void swiglu_forward(const void *arg, int64_t begin, int64_t end)
{
    const swiglu_args *a = arg;
    for (int64_t i = begin; i < end; i++) a->y[i] = a->gate[i] * sigmoid(a->gate[i]) * a->up[i];
}

STV_CLONES static void swiglu_backward(const void *arg, int64_t begin, int64_t end)
{
    const swiglu_args *a = arg;
    real *restrict dgate = a->dgate, *restrict dup = a->dup;
    for (int64_t i = begin; i < end; i++) {
        real g = a->gate[i], s = sigmoid(g);
        dup[i] = a->dy[i] * g * s;
        dgate[i] = a->dy[i] * a->up[i] * (s + g * s * (1 - s));
    }
}

void stv_swiglu_forward(stv_exec *x, real *y, const real *gate, const real *up, int64_t n)
{
    if (stv_measuring(x)) return;
    swiglu_args args = {.y = y, .gate = gate, .up = up};
    stv_split(x, n, GRAIN, swiglu_forward, &args);
}

void stv_swiglu_backward(stv_exec *x, real *dgate, real *dup, const real *dy, const real *gate, const real *up, int64_t n)
{
    if (stv_measuring(x)) return;
    swiglu_args args = {.dgate = dgate, .dup = dup, .dy = dy, .gate = gate, .up = up};
    stv_split(x, n, GRAIN, swiglu_backward, &args);
}
