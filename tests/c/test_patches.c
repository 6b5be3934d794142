#include "check_exec.h"
#include "check_real.h"
#include "ops/patches.h"

typedef struct run {
    int64_t n, size, patch, T, D;
    real *pixels, *patches, *rows, *class_embedding, *positions, *out, *dout;
    stv_class_token_grads grads;
} run;

static run new_run(int64_t n, int64_t size, int64_t patch, int64_t D)
{
    int64_t side = size / patch, T = side * side;
    run r = {n,
             size,
             patch,
             T,
             D,
             check_random_reals(n * 3 * size * size, 1),
             check_reals(n * T * 3 * patch * patch),
             check_random_reals(n * T * D, 2),
             check_random_reals(D, 3),
             check_random_reals((T + 1) * D, 4),
             check_reals(n * (T + 1) * D),
             check_random_reals(n * (T + 1) * D, 5),
             {check_reals(n * T * D), check_random_reals(D, 6), check_random_reals((T + 1) * D, 7)}};
    return r;
}

static void patchify(stv_exec *x, void *context)
{
    run *r = context;
    stv_patchify(x, r->patches, r->pixels, r->n, r->size, r->patch);
}

static void class_token(stv_exec *x, void *context)
{
    run *r = context;
    stv_class_token_forward(x, r->out, r->rows, stv_stored_reals(r->class_embedding), stv_stored_reals(r->positions), r->n, r->T, r->D);
    stv_class_token_backward(x, r->grads, r->dout, r->n, r->T, r->D);
}

static const int64_t shapes[][4] = {{1, 1, 1, 1}, {2, 6, 3, 5}, {3, 14, 7, 33}, {2, 64, 8, 24}, {0, 6, 3, 5}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static void patch_rows(void)
{
    for (int s = 0; s < N_SHAPES; s++)
        for (int n_threads = 1; n_threads <= 4; n_threads *= 2) {
            run r = new_run(shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3]);
            int64_t P = r.patch, side = r.size / P;
            check_exec(n_threads, patchify, &r);
            bool right = true;
            for (int64_t image = 0; image < r.n; image++)
                for (int64_t c = 0; c < 3; c++)
                    for (int64_t y = 0; y < side * P; y++)
                        for (int64_t x = 0; x < side * P; x++) {
                            int64_t row = image * r.T + y / P * side + x / P, column = (c * P + y % P) * P + x % P;
                            right &= r.patches[row * 3 * P * P + column] == r.pixels[((image * 3 + c) * r.size + y) * r.size + x];
                        }
            CHECK(right);
        }
}

/* Sums written out in image order: the bits must agree. */
static void class_tokens(void)
{
    for (int s = 0; s < N_SHAPES; s++)
        for (int n_threads = 1; n_threads <= 4; n_threads *= 2) {
            run r = new_run(shapes[s][0], shapes[s][1], shapes[s][2], shapes[s][3]);
            int64_t T = r.T, D = r.D;
            real *dclass = check_copy_reals(r.grads.dclass_embedding, D), *dpositions = check_copy_reals(r.grads.dpositions, (T + 1) * D);
            check_exec(n_threads, class_token, &r);
            bool right = true;
            for (int64_t image = 0; image < r.n; image++)
                for (int64_t t = 0; t <= T; t++)
                    for (int64_t c = 0; c < D; c++) {
                        int64_t at = (image * (T + 1) + t) * D + c;
                        real in = t ? r.rows[(image * T + t - 1) * D + c] : r.class_embedding[c];
                        right &= r.out[at] == in + r.positions[t * D + c];
                        if (t) right &= r.grads.dpatches[(image * T + t - 1) * D + c] == r.dout[at];
                        else dclass[c] += r.dout[at];
                        dpositions[t * D + c] += r.dout[at];
                    }
            CHECK(right);
            CHECK_SAME_BITS("dclass", r.grads.dclass_embedding, dclass, (size_t)D * sizeof(real));
            CHECK_SAME_BITS("dpositions", r.grads.dpositions, dpositions, (size_t)((T + 1) * D) * sizeof(real));
        }
}

static void frozen(void)
{
    run r = new_run(2, 6, 3, 5);
    r.grads = (stv_class_token_grads){r.grads.dpatches, NULL, NULL};
    check_exec(1, class_token, &r);
    CHECK_SAME_BITS("dpatches", r.grads.dpatches, r.dout + 5, 4 * 5 * sizeof(real));
    run none = new_run(2, 6, 3, 5);
    none.grads.dpatches = NULL;
    check_exec(1, class_token, &none);
}

static const check_case cases[] = {{"patch rows", patch_rows}, {"class tokens", class_tokens}, {"frozen", frozen}};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
