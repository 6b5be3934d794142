#include "ops/patches.h"

#include "ops/rows.h"
#include "ops/split.h"

#include <string.h>

typedef struct patchify_args {
    real *patches;
    const real *pixels;
    int64_t size, patch;
} patchify_args;

static void patchify_rows(const void *arg, int64_t begin, int64_t end)
{
    const patchify_args *a = arg;
    int64_t P = a->patch, size = a->size, side = size / P, T = side * side;
    real *to = a->patches + begin * 3 * P * P;
    for (int64_t row = begin; row < end; row++) {
        int64_t image = row / T, y0 = row % T / side * P, x0 = row % side * P;
        for (int64_t channel = 0; channel < 3; channel++)
            for (int64_t y = 0; y < P; y++, to += P)
                memcpy(to, a->pixels + ((image * 3 + channel) * size + y0 + y) * size + x0, (size_t)P * sizeof(real));
    }
}

void stv_patchify(stv_exec *x, real *patches, const real *pixels, int64_t n_images, int64_t size, int64_t patch)
{
    if (stv_measuring(x)) return;
    int64_t side = size / patch;
    patchify_args args = {patches, pixels, size, patch};
    stv_split(x, n_images * side * side, stv_row_grain(3 * patch * patch), patchify_rows, &args);
}

typedef struct forward_args {
    real *out;
    const real *patches, *class_embedding;
    stv_stored positions;
    int64_t T, D;
} forward_args;

static void add_row(real *y, const real *in, int64_t D)
{
    for (int64_t i = 0; i < D; i++) y[i] += in[i];
}

static void forward_rows(const void *arg, int64_t begin, int64_t end)
{
    const forward_args *a = arg;
    int64_t T = a->T, D = a->D;
    for (int64_t row = begin; row < end; row++) {
        int64_t image = row / (T + 1), t = row % (T + 1);
        real *out = a->out + row * D;
        stv_widen(out, stv_stored_from(a->positions, t * D), D);
        add_row(out, t ? a->patches + (image * T + t - 1) * D : a->class_embedding, D);
    }
}

void stv_class_token_forward(stv_exec *x, real *out, const real *patches, stv_stored class_embedding, stv_stored positions, int64_t n_images,
                             int64_t T, int64_t D)
{
    size_t mark = stv_arena_mark(x->arena);
    forward_args args = {out, patches, stv_widened(x, class_embedding, D), positions, T, D};
    if (!stv_measuring(x)) stv_split(x, n_images * (T + 1), stv_row_grain(D), forward_rows, &args);
    stv_arena_release(x->arena, mark);
}

typedef struct backward_args {
    stv_class_token_grads grads;
    const real *dout;
    int64_t n_images, T, D;
} backward_args;

/* Tasks are token numbers, so that each sum over the images has one owner. */
static void backward_tokens(const void *arg, int64_t begin, int64_t end)
{
    const backward_args *a = arg;
    const stv_class_token_grads *g = &a->grads;
    int64_t T = a->T, D = a->D;
    for (int64_t t = begin; t < end; t++)
        for (int64_t image = 0; image < a->n_images; image++) {
            const real *dout = a->dout + (image * (T + 1) + t) * D;
            if (t && g->dpatches) memcpy(g->dpatches + (image * T + t - 1) * D, dout, (size_t)D * sizeof(real));
            if (!t && g->dclass_embedding) add_row(g->dclass_embedding, dout, D);
            if (g->dpositions) add_row(g->dpositions + t * D, dout, D);
        }
}

void stv_class_token_backward(stv_exec *x, stv_class_token_grads grads, const real *dout, int64_t n_images, int64_t T, int64_t D)
{
    if (stv_measuring(x)) return;
    backward_args args = {grads, dout, n_images, T, D};
    stv_split(x, T + 1, stv_row_grain(n_images * D), backward_tokens, &args);
}
