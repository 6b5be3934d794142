/* Preference losses: the golden table of spec 1.5, gradients by central differences for every type, extremes, identities, bad input. */
#include "check.h"
#include "stllava.h"

enum { N = 7 };

typedef struct setting {
    stv_loss_type types[3];
    double weights[3];
    int64_t n_losses;
    double label_smoothing;
    stv_f_divergence divergence;
    bool reference_free;
} setting;

static double arrays[6][N]; /* policy chosen, rejected, reference chosen, rejected, token counts */
static double dchosen[N], drejected[N], per_pair[3 * N];

static stv_preference_config config_of(const setting *s)
{
    return (stv_preference_config){.n_losses = s->n_losses,
                                   .types = s->types,
                                   .weights = s->weights,
                                   .beta = 0.3,
                                   .label_smoothing = s->label_smoothing,
                                   .discopop_tau = 0.05,
                                   .f_divergence = s->divergence,
                                   .alpha = 0.5,
                                   .reference_free = s->reference_free};
}

static stv_preference_input input_of(const setting *s)
{
    return (stv_preference_input){N,         arrays[0], arrays[1], s->reference_free ? NULL : arrays[2], s->reference_free ? NULL : arrays[3],
                                  arrays[4], arrays[5]};
}

static double loss_of(void *context)
{
    const setting *s = context;
    stv_preference_config c = config_of(s);
    stv_preference_input in = input_of(s);
    double loss = NAN, scratch[5 * N];
    CHECK(stv_preference_loss(&loss, scratch, scratch + 3 * N, scratch + 4 * N, &c, &in) == STV_OK);
    return loss;
}

static void fill(void)
{
    for (int k = 0; k < 4; k++) {
        check_fill(arrays[k], N, 10 + (uint64_t)k);
        for (int i = 0; i < N; i++) arrays[k][i] = -6 + 3 * arrays[k][i];
    }
    for (int i = 0; i < N; i++) {
        arrays[4][i] = 1 + i;
        arrays[5][i] = 2 + (3 * i) % 5;
    }
}

static void gradient_of(setting s, const char *what)
{
    fill();
    stv_preference_config c = config_of(&s);
    stv_preference_input in = input_of(&s);
    double loss;
    CHECK(stv_preference_loss(&loss, per_pair, dchosen, drejected, &c, &in) == STV_OK);
    check_gradient(what, loss_of, &s, arrays[0], dchosen, N, 1e-6);
    if (s.types[0] != STV_LOSS_SFT) check_gradient(what, loss_of, &s, arrays[1], drejected, N, 1e-6);
}

static void every_gradient(void)
{
    for (int type = 0; type < STV_LOSS_COUNT; type++) gradient_of((setting){{type}, {1}, 1, 0, STV_REVERSE_KL, false}, stv_loss_name(type));
    for (int type = 0; type < STV_LOSS_COUNT; type++) gradient_of((setting){{type}, {1}, 1, 0.1, STV_REVERSE_KL, false}, stv_loss_name(type));
    for (int f = STV_FORWARD_KL; f <= STV_ALPHA_DIVERGENCE; f++) gradient_of((setting){{STV_LOSS_SIGMOID}, {1}, 1, 0, f, false}, "f-divergence");
    gradient_of((setting){{STV_LOSS_SIGMOID, STV_LOSS_AOT, STV_LOSS_SFT}, {0.7, 0.2, 1.5}, 3, 0.05, STV_REVERSE_KL, false}, "mixture");
    gradient_of((setting){{STV_LOSS_SIGMOID}, {1}, 1, 0, STV_REVERSE_KL, true}, "reference free");
}

/* spec 1.5, beta 0.1: loss and d loss / d chosen to 1e-12 relative; the last row needs a stable softplus. */
static void golden_table(void)
{
    static const double rows[4][6] = {{-10, -12, -11, -11.5, 0.6209570477895321, -0.04625701546562505},
                                      {-50, -40, -50, -40, 0.6931471805599453, -0.05},
                                      {-120, -100, -100, -130, 5.006715348489118, -0.09933071490757153},
                                      {-30, -300, -40, -100, 7.582560425037146e-10, -7.582560422162386e-11}};
    stv_loss_type type = STV_LOSS_SIGMOID;
    double weight = 1, one = 1;
    stv_preference_config c = {.n_losses = 1, .types = &type, .weights = &weight, .beta = 0.1, .discopop_tau = 0.05};
    for (int i = 0; i < 4; i++) {
        const double *r = rows[i];
        stv_preference_input in = {1, r, r + 1, r + 2, r + 3, &one, &one};
        double loss, pair, dc, dr;
        CHECK(stv_preference_loss(&loss, &pair, &dc, &dr, &c, &in) == STV_OK);
        CHECK_MREL("loss", &loss, r + 4, 1, 1e-12);
        CHECK_MREL("dchosen", &dc, r + 5, 1, 1e-12);
        double minus = -dr;
        CHECK_MREL("drejected", &minus, r + 5, 1, 1e-12);
        double shifted[2] = {r[0] + 17, r[1] + 17}, again;
        in.policy_chosen = shifted, in.policy_rejected = shifted + 1;
        CHECK(stv_preference_loss(&again, &pair, &dc, &dr, &c, &in) == STV_OK); /* a constant on both sides changes nothing */
        CHECK_MREL("shifted", &again, &loss, 1, 1e-9);
    }
}

/* Differences of thousands: everything stays finite, discopop included. */
static void extremes(void)
{
    double chosen[2] = {-1500, -1}, rejected[2] = {-2, -2900}, reference[2] = {-1, -1500}, other[2] = {-1400, -3}, tokens[2] = {5, 9}, weight = 1;
    for (stv_loss_type type = 0; type < STV_LOSS_COUNT; type++) {
        stv_preference_config c = {.n_losses = 1, .types = &type, .weights = &weight, .beta = 0.5, .label_smoothing = 0.01, .discopop_tau = 0.05};
        stv_preference_input in = {2, chosen, rejected, reference, other, tokens, tokens};
        double loss, pair[2], dc[2], dr[2];
        CHECK(stv_preference_loss(&loss, pair, dc, dr, &c, &in) == STV_OK);
        CHECK(isfinite(loss) && isfinite(dc[0]) && isfinite(dc[1]) && isfinite(dr[0]) && isfinite(dr[1]));
    }
    CHECK(stv_loss_name(STV_LOSS_COUNT) == NULL);
}

static stv_status status_of(setting s, double beta)
{
    stv_preference_config c = config_of(&s);
    stv_preference_input in = input_of(&s);
    double loss;
    c.beta = beta;
    return stv_preference_loss(&loss, per_pair, dchosen, drejected, &c, &in);
}

static void bad_input(void)
{
    setting good = {{STV_LOSS_SIGMOID}, {1}, 1, 0, STV_REVERSE_KL, false}, s = good;
    fill();
    CHECK_INT(status_of(good, 0.1), STV_OK);
    CHECK_INT(status_of(good, 0), STV_ERR_ARGUMENT);
    s.label_smoothing = 0.5;
    CHECK_INT(status_of(s, 0.1), STV_ERR_ARGUMENT);
    s = good, s.types[0] = STV_LOSS_COUNT;
    CHECK_INT(status_of(s, 0.1), STV_ERR_ARGUMENT);
    s = good, s.types[0] = STV_LOSS_AOT, s.divergence = STV_FORWARD_KL;
    CHECK_INT(status_of(s, 0.1), STV_ERR_UNSUPPORTED);
    arrays[0][3] = NAN;
    CHECK_INT(status_of(good, 0.1), STV_ERR_NUMERIC);
    CHECK(strstr(stv_last_error(), "pair 3") != NULL);
    fill();
    arrays[5][2] = 0;
    CHECK_INT(status_of(good, 0.1), STV_ERR_ARGUMENT);
    CHECK(strstr(stv_last_error(), "pair 2") != NULL);
}

int main(int argc, char **argv)
{
    static const check_case cases[] = {
        {"golden table", golden_table}, {"every gradient", every_gradient}, {"extremes", extremes}, {"bad input", bad_input}};
    return CHECK_RUN(cases);
}
