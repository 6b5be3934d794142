#include "ops/rope.h"

#include "ops/split.h"

#include <math.h>

typedef struct angle_args {
    real *angles;
    const int32_t *position;
    int64_t half;
    double theta;
} angle_args;

static void angle_rows(const void *arg, int64_t begin, int64_t end)
{
    const angle_args *a = arg;
    for (int64_t i = 0; i < a->half; i++) {
        double frequency = pow(a->theta, -(double)i / (double)a->half);
        for (int64_t r = begin; r < end; r++) {
            real *out = a->angles + (r * a->half + i) * 2;
            out[0] = (real)cos((double)a->position[r] * frequency);
            out[1] = (real)sin((double)a->position[r] * frequency);
        }
    }
}

void stv_rope_angles(stv_exec *x, real *angles, const int32_t *position, int64_t rows, int64_t head_dim, double theta)
{
    if (stv_measuring(x)) return;
    angle_args args = {angles, position, head_dim / 2, theta};
    stv_split(x, rows, stv_row_grain(32 * head_dim), angle_rows, &args);
}

typedef struct rotate_args {
    real *qk;
    const real *angles;
    int64_t n_heads, half;
    real sign; /* -1: the inverse rotation */
} rotate_args;

static void rotate_rows(const void *arg, int64_t begin, int64_t end)
{
    const rotate_args *args = arg;
    int64_t half = args->half;
    for (int64_t r = begin; r < end; r++) {
        const real *angle = args->angles + r * half * 2;
        for (int64_t h = 0; h < args->n_heads; h++) {
            real *restrict a = args->qk + (r * args->n_heads + h) * 2 * half, *restrict b = a + half;
            for (int64_t i = 0; i < half; i++) {
                real c = angle[2 * i], s = args->sign * angle[2 * i + 1], ai = a[i], bi = b[i];
                a[i] = ai * c - bi * s;
                b[i] = bi * c + ai * s;
            }
        }
    }
}

void stv_rope_forward(stv_exec *x, real *qk, const real *angles, int64_t rows, int64_t n_heads, int64_t head_dim)
{
    if (stv_measuring(x)) return;
    rotate_args args = {qk, angles, n_heads, head_dim / 2, 1};
    stv_split(x, rows, stv_row_grain(n_heads * head_dim), rotate_rows, &args);
}

void stv_rope_backward(stv_exec *x, real *dqk, const real *angles, int64_t rows, int64_t n_heads, int64_t head_dim)
{
    if (stv_measuring(x)) return;
    rotate_args args = {dqk, angles, n_heads, head_dim / 2, -1};
    stv_split(x, rows, stv_row_grain(n_heads * head_dim), rotate_rows, &args);
}
