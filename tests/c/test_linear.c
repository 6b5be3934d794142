#include "ops/linear.h"

#include "base/alloc.h"
#include "check_exec.h"

typedef struct setup {
    int64_t rows, K, N, rank;
    bool bias, drop, dora;
} setup;

/* One layer with everything trainable, its input, an upstream gradient, and every output. */
typedef struct layer {
    stv_linear lin;
    int64_t rows;
    real *in, *dy, *y, *u, *din;
    real *weight, *bias, *a, *b, *magnitude, *norm; /* what lin points to, writable */
    uint64_t *sample;
    int32_t *position;
    stv_dropout dropout;
    const stv_dropout *drop;
} layer;

static real *new_reals(int64_t n, uint64_t seed)
{
    real *p = check_new((size_t)n * sizeof *p);
    if (seed) check_fill(p, n, seed);
    return p;
}

static real *new_zeros(int64_t n) { return memset(new_reals(n, 0), 0, (size_t)n * sizeof(real)); }

static void find_norms(stv_exec *x, void *context)
{
    layer *l = context;
    stv_linear_norms(x, l->norm, &l->lin);
}

static void make_dora(layer *l, setup s)
{
    l->magnitude = new_reals(s.N, 7), l->norm = new_reals(s.N, 0);
    for (int64_t n = 0; n < s.N; n++) l->magnitude[n] += 2;
    l->lin.lora.magnitude = stv_stored_reals(l->magnitude);
    l->lin.lora.dmagnitude = new_zeros(s.N);
    l->lin.lora.norm = l->norm;
    check_exec(2, find_norms, l);
}

static layer make_layer(setup s)
{
    layer l = {.rows = s.rows};
    l.weight = new_reals(s.N * s.K, 1), l.bias = new_reals(s.N, 2);
    l.a = new_reals(s.rank * s.K, 3), l.b = new_reals(s.N * s.rank, 4);
    l.in = new_reals(s.rows * s.K, 5), l.dy = new_reals(s.rows * s.N, 6);
    l.y = new_reals(s.rows * s.N, 0), l.u = s.rank ? new_reals(s.rows * (s.rank + s.dora * s.N), 0) : NULL, l.din = new_reals(s.rows * s.K, 0);
    l.lin = (stv_linear){.weight = stv_stored_reals(l.weight), .bias = stv_stored_reals(s.bias ? l.bias : NULL), .n_in = s.K, .n_out = s.N};
    l.lin.dweight = new_zeros(s.N * s.K), l.lin.dbias = s.bias ? new_zeros(s.N) : NULL;
    if (s.rank)
        l.lin.lora = (stv_lora){.a = stv_stored_reals(l.a),
                                .b = stv_stored_reals(l.b),
                                .da = new_zeros(s.rank * s.K),
                                .db = new_zeros(s.N * s.rank),
                                .rank = s.rank,
                                .scale = STV_REAL(0.75),
                                .dropout = 0.3f,
                                .module_id = 17};
    l.sample = check_new((size_t)s.rows * sizeof *l.sample), l.position = check_new((size_t)s.rows * sizeof *l.position);
    for (int64_t i = 0; i < s.rows; i++) l.sample[i] = (uint64_t)i / 3, l.position[i] = (int32_t)(i % 3);
    l.dropout = (stv_dropout){.seed = 99, .step = 7, .row_sample = l.sample, .row_position = l.position};
    if (s.dora) make_dora(&l, s);
    return l;
}

/* The layer may be copied, so the borrowed dropout is pointed to here. */
static void with_dropout(layer *l, bool on) { l->drop = on ? &l->dropout : NULL; }

static void forward(stv_exec *x, void *context)
{
    layer *l = context;
    stv_linear_forward(x, l->y, l->u, l->in, &l->lin, l->rows, l->drop);
}

static void forward_u(stv_exec *x, void *context)
{
    layer *l = context;
    stv_linear_forward_u(x, l->u, l->in, &l->lin, l->rows, l->drop);
}

static void backward(stv_exec *x, void *context)
{
    layer *l = context;
    stv_linear_backward(x, l->din, l->dy, l->in, l->u, &l->lin, l->rows, l->drop);
}

static void backward_add(stv_exec *x, void *context)
{
    layer *l = context;
    stv_linear_backward_add(x, l->din, l->dy, l->in, l->u, &l->lin, l->rows, l->drop);
}

typedef struct dropping {
    real *y;
    const layer *l;
} dropping;

static void apply_dropout(stv_exec *x, void *context)
{
    dropping *d = context;
    const layer *l = d->l;
    stv_dropout_apply(x, d->y, d->y, l->rows, l->lin.n_in, l->lin.lora.dropout, l->lin.lora.module_id, l->drop);
}

/* mask (rows,K) = keep / (1-p): dropout of ones. */
static real *mask_of(const layer *l)
{
    int64_t n = l->rows * l->lin.n_in;
    real *mask = new_reals(n, 0);
    for (int64_t i = 0; i < n; i++) mask[i] = 1;
    check_exec(1, apply_dropout, &(dropping){mask, l});
    return mask;
}

static const setup setups[] = {
    {1, 1, 1, 0, false, false, false},  {1, 1, 1, 1, true, true, false},    {5, 7, 3, 0, true, false, false},    {13, 17, 11, 2, false, false, false},
    {13, 17, 11, 2, true, true, false}, {33, 64, 48, 8, true, true, false}, {70, 41, 130, 5, true, true, false}, {3, 300, 5, 4, false, true, false},
    {1, 1, 1, 1, false, false, true},   {13, 17, 11, 2, true, false, true}, {13, 17, 11, 2, true, true, true},   {9, 20, 300, 4, false, true, true},
};
enum { N_SETUPS = sizeof setups / sizeof *setups };

/* f32: chains of at most 300 products, seen 5e-7; f64: the plain loops below are no better, seen 1.2e-15. */
static const double tolerance = STV_REAL_BITS == 32 ? 3e-6 : 4e-15;

/* The lengths of the rows of W + s B A, and m by them: 1 without DoRA. */
static void find_gains(double *norm, double *gain, const layer *l, setup s)
{
    for (int64_t n = 0; n < s.N; n++) {
        norm[n] = 0;
        for (int64_t k = 0; k < s.K; k++) {
            double v = l->weight[n * s.K + k];
            for (int64_t r = 0; r < s.rank; r++) v += (double)l->lin.lora.scale * l->b[n * s.rank + r] * l->a[r * s.K + k];
            norm[n] += v * v;
        }
        norm[n] = sqrt(norm[n]);
        gain[n] = s.dora ? l->magnitude[n] / norm[n] : 1;
    }
}

/* In PEFT's words: the base's result, (gain - 1) times that of dropped input, and gain times the low rank's. */
static void values_and_gradients_by_plain_loops(void)
{
    for (int i_setup = 0; i_setup < N_SETUPS; i_setup++) {
        setup s = setups[i_setup];
        layer l = make_layer(s);
        with_dropout(&l, s.drop);
        char what[80];
        snprintf(what, sizeof what, "rows %d K %d N %d rank %d dropout %d dora %d", (int)s.rows, (int)s.K, (int)s.N, (int)s.rank, s.drop, s.dora);
        real *mask = mask_of(&l);
        double scale = (double)l.lin.lora.scale;
        size_t size = sizeof(double);
        double *u = memset(check_new((size_t)(s.rows * s.rank) * size), 0, (size_t)(s.rows * s.rank) * size);
        double *du = memset(check_new((size_t)(s.rows * s.rank) * size), 0, (size_t)(s.rows * s.rank) * size);
        double *y = check_new((size_t)(s.rows * s.N) * size);
        double *din = memset(check_new((size_t)(s.rows * s.K) * size), 0, (size_t)(s.rows * s.K) * size);
        double *dw = memset(check_new((size_t)(s.N * s.K) * size), 0, (size_t)(s.N * s.K) * size);
        double *dbias = memset(check_new((size_t)s.N * size), 0, (size_t)s.N * size);
        double *da = memset(check_new((size_t)(s.rank * s.K) * size), 0, (size_t)(s.rank * s.K) * size);
        double *db = memset(check_new((size_t)(s.N * s.rank) * size), 0, (size_t)(s.N * s.rank) * size);
        double *dm = memset(check_new((size_t)s.N * size), 0, (size_t)s.N * size);
        double *norm = check_new((size_t)s.N * size), *gain = check_new((size_t)s.N * size);
        find_gains(norm, gain, &l, s);
        for (int64_t i = 0; i < s.rows; i++) {
            for (int64_t r = 0; r < s.rank; r++)
                for (int64_t k = 0; k < s.K; k++) u[i * s.rank + r] += scale * l.in[i * s.K + k] * mask[i * s.K + k] * l.a[r * s.K + k];
            for (int64_t n = 0; n < s.N; n++) {
                double g = l.dy[i * s.N + n], sum = s.bias ? l.bias[n] : 0, of_dropped = 0, of_u = 0;
                dbias[n] += g;
                for (int64_t k = 0; k < s.K; k++) {
                    double in = l.in[i * s.K + k], dropped = in * mask[i * s.K + k], beyond = gain[n] - 1;
                    sum += in * l.weight[n * s.K + k];
                    of_dropped += dropped * l.weight[n * s.K + k];
                    dw[n * s.K + k] += g * (in + beyond * dropped);
                    din[i * s.K + k] += g * l.weight[n * s.K + k] * (1 + beyond * mask[i * s.K + k]);
                }
                for (int64_t r = 0; r < s.rank; r++) {
                    of_u += u[i * s.rank + r] * l.b[n * s.rank + r];
                    db[n * s.rank + r] += gain[n] * g * u[i * s.rank + r];
                    du[i * s.rank + r] += scale * gain[n] * g * l.b[n * s.rank + r];
                }
                dm[n] += g * (of_dropped + of_u) / norm[n];
                y[i * s.N + n] = sum + (gain[n] - 1) * of_dropped + gain[n] * of_u;
            }
            for (int64_t r = 0; r < s.rank; r++)
                for (int64_t k = 0; k < s.K; k++) {
                    da[r * s.K + k] += du[i * s.rank + r] * l.in[i * s.K + k] * mask[i * s.K + k];
                    din[i * s.K + k] += du[i * s.rank + r] * l.a[r * s.K + k] * mask[i * s.K + k];
                }
        }
        check_exec(2, forward, &l);
        CHECK_MREL(what, l.y, y, s.rows * s.N, tolerance);
        if (s.rank) CHECK_MREL(what, l.u, u, s.rows * s.rank, tolerance);
        check_exec(2, backward, &l);
        CHECK_MREL(what, l.din, din, s.rows * s.K, tolerance);
        CHECK_MREL(what, l.lin.dweight, dw, s.N * s.K, tolerance);
        if (s.bias) CHECK_MREL(what, l.lin.dbias, dbias, s.N, tolerance);
        if (s.rank) CHECK_MREL(what, l.lin.lora.da, da, s.rank * s.K, tolerance);
        if (s.rank) CHECK_MREL(what, l.lin.lora.db, db, s.N * s.rank, tolerance);
        if (s.dora) CHECK_MREL(what, l.norm, norm, s.N, tolerance);
        if (s.dora) CHECK_MREL(what, l.lin.lora.dmagnitude, dm, s.N, tolerance);
        check_release_buffers();
    }
}

#if STV_REAL_BITS == 64
/* L = sum dy * y: the gradients backward must give. */
static double weighted_sum(void *context)
{
    layer *l = context;
    double sum = 0;
    check_exec(1, forward, l);
    for (int64_t i = 0; i < l->rows * l->lin.n_out; i++) sum += l->dy[i] * l->y[i];
    return sum;
}

/* DoRA's norms stay those of make_layer, constants as in backward. */
static void gradients_by_central_differences(void)
{
    static const setup small[] = {{4, 5, 3, 0, true, false, false},
                                  {4, 5, 3, 2, true, false, false},
                                  {6, 7, 5, 3, true, true, false},
                                  {4, 5, 3, 2, true, false, true},
                                  {6, 7, 5, 3, true, true, true}};
    for (int i = 0; i < 5; i++) {
        setup s = small[i];
        layer l = make_layer(s);
        with_dropout(&l, s.drop);
        check_exec(1, forward, &l);
        check_exec(1, backward, &l);
        check_gradient("din", weighted_sum, &l, l.in, l.din, s.rows * s.K, 1e-6);
        check_gradient("dweight", weighted_sum, &l, l.weight, l.lin.dweight, s.N * s.K, 1e-6);
        check_gradient("dbias", weighted_sum, &l, l.bias, l.lin.dbias, s.N, 1e-6);
        if (!s.rank) continue;
        check_gradient("da", weighted_sum, &l, l.a, l.lin.lora.da, s.rank * s.K, 1e-6);
        check_gradient("db", weighted_sum, &l, l.b, l.lin.lora.db, s.N * s.rank, 1e-6);
        if (s.dora) check_gradient("dmagnitude", weighted_sum, &l, l.magnitude, l.lin.lora.dmagnitude, s.N, 1e-6);
    }
}
#endif

static void check_frozen_parts_and_adding(bool dora)
{
    setup s = {9, 20, 12, 3, true, true, dora};
    layer full = make_layer(s), frozen = make_layer(s);
    with_dropout(&full, true);
    with_dropout(&frozen, true);
    frozen.lin.dweight = frozen.lin.dbias = frozen.lin.lora.da = frozen.lin.lora.db = frozen.lin.lora.dmagnitude = NULL;
    check_exec(1, forward, &full);
    check_exec(1, forward, &frozen);
    check_exec(1, backward, &full);
    check_exec(1, backward, &frozen);
    CHECK_SAME_BITS("y does not depend on what trains", full.y, frozen.y, (size_t)(s.rows * s.N) * sizeof(real));
    CHECK_SAME_BITS("din does not depend on what trains", full.din, frozen.din, (size_t)(s.rows * s.K) * sizeof(real));

    /* A second backward: parameter gradients double, din is overwritten; the _add form doubles din. */
    real *din = new_reals(s.rows * s.K, 0), *da = new_reals(s.rank * s.K, 0), *dweight = new_reals(s.N * s.K, 0);
    for (int64_t i = 0; i < s.rows * s.K; i++) din[i] = 2 * full.din[i];
    for (int64_t i = 0; i < s.rank * s.K; i++) da[i] = 2 * full.lin.lora.da[i];
    for (int64_t i = 0; i < s.N * s.K; i++) dweight[i] = 2 * full.lin.dweight[i];
    check_exec(1, backward_add, &full);
    CHECK_MREL("din added to", full.din, din, s.rows * s.K, tolerance);
    CHECK_MREL("da added to", full.lin.lora.da, da, s.rank * s.K, tolerance);
    CHECK_MREL("dweight added to", full.lin.dweight, dweight, s.N * s.K, tolerance);

    /* No input gradient wanted: the first trainable layer. */
    layer first = make_layer(s);
    with_dropout(&first, true);
    check_exec(1, forward, &first);
    first.din = NULL;
    check_exec(1, backward, &first);
    for (int64_t i = 0; i < s.rank * s.K; i++) da[i] = first.lin.lora.da[i] * 2;
    CHECK_MREL("da without din", full.lin.lora.da, da, s.rank * s.K, tolerance);
}

static void frozen_parts_and_adding(void)
{
    check_frozen_parts_and_adding(false);
    check_frozen_parts_and_adding(true);
}

static void adapter_identities(void)
{
    setup s = {10, 33, 21, 4, true, false, false};
    layer l = make_layer(s), base = make_layer((setup){10, 33, 21, 0, true, false, false});
    int64_t n = s.rows * s.N;
    check_exec(1, forward, &base);
    real *kept = new_reals(s.N * s.rank, 4);
    memset(l.b, 0, (size_t)(s.N * s.rank) * sizeof(real));
    check_exec(1, forward, &l);
    CHECK_SAME_BITS("B = 0 is the base layer", l.y, base.y, (size_t)n * sizeof(real));

    memcpy(l.b, kept, (size_t)(s.N * s.rank) * sizeof(real));
    check_exec(1, forward, &l);
    CHECK(memcmp(l.y, base.y, (size_t)n * sizeof(real)) != 0);

    layer dora = make_layer((setup){10, 33, 21, 4, false, false, true}), bare = make_layer((setup){10, 33, 21, 0, false, false, false});
    memset(dora.b, 0, (size_t)(s.N * s.rank) * sizeof(real));
    check_exec(1, find_norms, &dora);
    memcpy(dora.magnitude, dora.norm, (size_t)s.N * sizeof(real));
    check_exec(1, forward, &dora);
    check_exec(1, forward, &bare);
    CHECK_SAME_BITS("B = 0 and m = |W| is the base layer", dora.y, bare.y, (size_t)n * sizeof(real));
}

typedef struct merging {
    real *merged;
    const stv_linear *lin;
} merging;

static void merge(stv_exec *x, void *context) { stv_linear_merge(x, ((merging *)context)->merged, ((merging *)context)->lin); }

static void check_merged_equals_unmerged(bool dora)
{
    setup s = {10, 33, 21, 4, true, false, dora};
    layer l = make_layer(s);
    check_exec(1, forward, &l);
    real *merged = new_reals(s.N * s.K, 0), *y = new_reals(s.rows * s.N, 0);
    check_exec(1, merge, &(merging){merged, &l.lin});
    layer plain = make_layer((setup){10, 33, 21, 0, true, false, false});
    plain.lin.weight = stv_stored_reals(merged);
    plain.y = y;
    check_exec(1, forward, &plain);
    CHECK_MREL("merged", y, l.y, s.rows * s.N, tolerance);

    real *same = new_reals(s.N * s.K, 0);
    plain.lin.weight = stv_stored_reals(l.weight);
    check_exec(1, merge, &(merging){same, &plain.lin});
    CHECK_SAME_BITS("rank 0", same, l.weight, (size_t)(s.N * s.K) * sizeof(real));
}

static void merged_equals_unmerged(void)
{
    check_merged_equals_unmerged(false);
    check_merged_equals_unmerged(true);
}

static void check_u_alone(bool dora)
{
    setup s = {70, 41, 130, 5, true, true, dora};
    layer l = make_layer(s), again = make_layer(s);
    with_dropout(&l, true);
    with_dropout(&again, true);
    check_exec(2, forward, &l);
    check_exec(1, forward_u, &again);
    CHECK_SAME_BITS("u", again.u, l.u, (size_t)(s.rows * stv_linear_u_width(&l.lin)) * sizeof(real));
}

static void u_alone(void)
{
    check_u_alone(false);
    check_u_alone(true);
}

static void check_a_row_does_not_see_its_batch(bool dora)
{
    setup s = {40, 70, 50, 6, true, true, dora};
    layer all = make_layer(s);
    with_dropout(&all, true);
    check_exec(4, forward, &all);
    for (int64_t row = 0; row < s.rows; row += 13) {
        layer one = make_layer((setup){1, 70, 50, 6, true, true, dora});
        with_dropout(&one, true);
        memcpy(one.in, all.in + row * s.K, (size_t)s.K * sizeof(real));
        one.sample[0] = all.sample[row], one.position[0] = all.position[row];
        check_exec(1, forward, &one);
        CHECK_SAME_BITS("one row alone", one.y, all.y + row * s.N, (size_t)s.N * sizeof(real));
    }
}

static void a_row_does_not_see_its_batch(void)
{
    check_a_row_does_not_see_its_batch(false);
    check_a_row_does_not_see_its_batch(true);
}

/* More rows than the norms are found for at once, and than one thread takes. */
static void dora_is_the_same_on_any_threads_and_from_bf16(void)
{
    setup s = {70, 41, 300, 5, true, true, true};
    layer one = make_layer(s), many = make_layer(s), stored = make_layer(s);
    uint16_t *bits = check_new((size_t)(s.N * s.K) * sizeof *bits);
    for (int64_t i = 0; i < s.N * s.K; i++) {
        float value = (float)one.weight[i];
        uint32_t whole;
        memcpy(&whole, &value, sizeof whole);
        bits[i] = (uint16_t)(whole >> 16);
        one.weight[i] = many.weight[i] = (real)stv_widen_bf16(bits[i]);
    }
    stored.lin.weight = (stv_stored){bits, STV_DTYPE_BF16};
    layer *layers[] = {&one, &many, &stored};
    for (int i = 0; i < 3; i++) {
        int n_threads = i == 1 ? 4 : 1;
        with_dropout(layers[i], true);
        check_exec(n_threads, find_norms, layers[i]);
        check_exec(n_threads, forward, layers[i]);
        check_exec(n_threads, backward, layers[i]);
        CHECK_SAME_BITS("norm", layers[i]->norm, one.norm, (size_t)s.N * sizeof(real));
        CHECK_SAME_BITS("y", layers[i]->y, one.y, (size_t)(s.rows * s.N) * sizeof(real));
        CHECK_SAME_BITS("din", layers[i]->din, one.din, (size_t)(s.rows * s.K) * sizeof(real));
        CHECK_SAME_BITS("dmagnitude", layers[i]->lin.lora.dmagnitude, one.lin.lora.dmagnitude, (size_t)s.N * sizeof(real));
        CHECK_SAME_BITS("da", layers[i]->lin.lora.da, one.lin.lora.da, (size_t)(s.rank * s.K) * sizeof(real));
    }
}

static void check_steady_step_allocates_nothing(bool dora)
{
    layer l = make_layer((setup){50, 60, 70, 4, true, true, dora});
    with_dropout(&l, true);
    stv_pool *pool;
    stv_arena arena;
    if (!CHECK(stv_pool_create(&pool, 2) == STV_OK)) return;
    stv_arena_init_measuring(&arena);
    stv_exec x = {pool, &arena};
    forward(&x, &l);
    backward(&x, &l);
    if (!CHECK(stv_arena_create(&arena, arena.peak) == STV_OK)) return;
    uint64_t before = stv_alloc_count();
    forward(&x, &l);
    backward(&x, &l);
    CHECK_INT(stv_alloc_count(), before);
    stv_arena_free(&arena);
    stv_pool_free(pool);
}

static void steady_step_allocates_nothing(void)
{
    check_steady_step_allocates_nothing(false);
    check_steady_step_allocates_nothing(true);
}

static const check_case cases[] = {
    {"values and gradients by plain loops", values_and_gradients_by_plain_loops},
#if STV_REAL_BITS == 64
    {"gradients by central differences", gradients_by_central_differences},
#endif
    {"frozen parts and adding", frozen_parts_and_adding},
    {"adapter identities", adapter_identities},
    {"merged equals unmerged", merged_equals_unmerged},
    {"u alone", u_alone},
    {"a row does not see its batch", a_row_does_not_see_its_batch},
    {"DoRA is the same on any threads and from bf16", dora_is_the_same_on_any_threads_and_from_bf16},
    {"steady step allocates nothing", steady_step_allocates_nothing},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
