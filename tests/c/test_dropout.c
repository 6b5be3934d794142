#include "ops/dropout.h"

#include "check_exec.h"
#include "check_real.h"

typedef struct dropping {
    real *y;
    const real *in;
    int64_t rows, n;
    float p;
    uint32_t module_id;
    const stv_dropout *drop;
} dropping;

static void apply(stv_exec *x, void *context)
{
    dropping *d = context;
    stv_dropout_apply(x, d->y, d->in, d->rows, d->n, d->p, d->module_id, d->drop);
}

static void values(void)
{
    enum { ROWS = 60, N = 1001 };
    static uint64_t sample[ROWS];
    static int32_t position[ROWS];
    for (int i = 0; i < ROWS; i++) sample[i] = (uint64_t)i, position[i] = i;
    stv_dropout drop = {5, 6, sample, position};
    real *in = check_random_reals(ROWS * N, 1), *y = check_reals(ROWS * N), *threaded = check_random_reals(ROWS * N, 1);
    const float p = 0.1f;
    check_exec(1, apply, &(dropping){y, in, ROWS, N, p, 3, &drop});
    int64_t n_kept = 0;
    for (int64_t i = 0; i < ROWS * N; i++) {
        real kept = in[i] * (real)(1 / (1 - (double)p));
        CHECK(y[i] == 0 || y[i] == kept);
        n_kept += y[i] != 0;
    }
    /* 60060 draws: standard deviation 0.0012. */
    CHECK(fabs((double)n_kept / (ROWS * N) - 0.9) < 0.006);

    /* In place, and in four threads: check_exec applies only once, because the measuring pass touches nothing. */
    check_exec(4, apply, &(dropping){threaded, threaded, ROWS, N, p, 3, &drop});
    CHECK_SAME_BITS("in place, four threads", threaded, y, ROWS * N * sizeof *y);
    check_exec(1, apply, &(dropping){y, in, ROWS, N, p, 3, NULL});
    CHECK_SAME_BITS("evaluation", y, in, ROWS * N * sizeof *y);
    check_exec(1, apply, &(dropping){y, in, ROWS, N, 0, 3, &drop});
    CHECK_SAME_BITS("p = 0", y, in, ROWS * N * sizeof *y);
}

static int compare_masks(const void *a, const void *b) { return memcmp(a, b, sizeof(uint64_t)); }

/* Every field of the place matters, in its low and its high bits, and no two places of a grid share a mask. */
static void places_are_distinct(void)
{
    enum { N = 64, N_VALUES = 7, N_PLACES = N_VALUES * N_VALUES * 3 * 3 * 3 };
    static const uint64_t extremes[N_VALUES] = {0, 1, 2, 7, (uint64_t)1 << 32, ((uint64_t)1 << 32) + 1, ~(uint64_t)0};
    static uint64_t masks[N_PLACES];
    real *ones = check_reals(N), *y = check_reals(N);
    for (int i = 0; i < N; i++) ones[i] = 1;
    for (int place = 0; place < N_PLACES; place++) {
        int rest = place;
        uint64_t step = extremes[rest % N_VALUES], sample = extremes[(rest /= N_VALUES) % N_VALUES];
        int32_t position = (rest /= N_VALUES) % 3;
        uint32_t module_id = (uint32_t)((rest /= 3) % 3);
        stv_dropout drop = {(uint64_t)(rest / 3), step, &sample, &position};
        check_exec(1, apply, &(dropping){y, ones, 1, N, 0.5f, module_id, &drop});
        masks[place] = 0;
        for (int i = 0; i < N; i++) masks[place] |= (uint64_t)(y[i] != 0) << i;
    }
    qsort(masks, N_PLACES, sizeof *masks, compare_masks);
    for (int i = 1; i < N_PLACES; i++) CHECK(masks[i] != masks[i - 1]);
}

static const check_case cases[] = {
    {"values", values},
    {"places are distinct", places_are_distinct},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
