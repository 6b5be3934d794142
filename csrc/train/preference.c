/* preference.c - every DPO-type loss as one number per sequence: d loss / d log-prob.
 *
 * With rc, rr the policy-minus-reference log-probs of chosen and rejected, s = f(r) their scores (f = identity for reverse KL) and
 * z = beta (sc - sr), each loss is a function of a few numbers per pair, so the decoder never needs to know which one trains it.
 * Sources: DPO arXiv 2305.18290, cDPO (Mitchell 2023), robust 2403.00409, IPO 2310.12036, hinge SLiC 2305.10425, EXO 2402.00856,
 * NCA 2402.05369, BCO 2404.04656, SPPO 2405.00675, AOT 2406.05882, APO 2408.06266, DiscoPOP 2406.08414, f-DPO 2309.16240; names and
 * conventions as in TRL's DPOTrainer. One difference: discopop's modulated exponential is computed as exp(log m - z), which
 * stays finite where m e^-z is 0 * inf. */
#include "stllava.h"

#include "base/alloc.h"

#include <math.h>
#include <stdlib.h>

static const char *const loss_names[STV_LOSS_COUNT] = {
    "sigmoid", "hinge",        "ipo",      "exo_pair", "nca_pair", "robust", "bco_pair",     "sppo_hard",
    "aot",     "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",    "sigmoid_norm",
};

const char *stv_loss_name(stv_loss_type type) { return type < STV_LOSS_COUNT ? loss_names[type] : NULL; }

/* -log sigmoid(-x), exact for large |x|. */
static double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

/* A value and its derivatives by the chosen and the rejected score. */
typedef struct term {
    double value, dchosen, drejected;
} term;

/* The losses that see only z, with d value / d z. */
static double of_margin(stv_loss_type type, double z, const stv_preference_config *c, double *dz)
{
    double e = c->label_smoothing;
    switch (type) {
    case STV_LOSS_HINGE: *dz = z < 1 ? -1 : 0; return z < 1 ? 1 - z : 0;
    case STV_LOSS_ROBUST:
        *dz = (-(1 - e) * sigmoid(-z) - e * sigmoid(z)) / (1 - 2 * e);
        return ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e);
    case STV_LOSS_EXO_PAIR: {
        /* KL of (sigmoid z, sigmoid -z) against (1-e, e); without smoothing it is infinite, so TRL puts 1e-3 there. */
        if (e == 0) e = 1e-3;
        double p = sigmoid(z), q = sigmoid(-z);
        *dz = p * q * (z - log(1 - e) + log(e));
        return p * (-softplus(-z) - log(1 - e)) + q * (-softplus(z) - log(e));
    }
    case STV_LOSS_DISCOPOP: {
        double t = z / c->discopop_tau, m = sigmoid(t);
        double modulated = exp(-softplus(-t) - z); /* m e^-z */
        *dz = -m * (1 - m) / c->discopop_tau * softplus(-z) - (1 - m) * sigmoid(-z) + modulated * ((1 - m) / c->discopop_tau - 1);
        return (1 - m) * softplus(-z) + modulated;
    }
    default: /* sigmoid, and the sorted margins of aot */
        *dz = -(1 - e) * sigmoid(-z) + e * sigmoid(z);
        return (1 - e) * softplus(-z) + e * softplus(z);
    }
}

static term of_pair(stv_loss_type type, double sc, double sr, double nc, double nr, const stv_preference_config *c)
{
    double beta = c->beta, half = 1 / (2 * beta), dz;
    term t;
    switch (type) {
    case STV_LOSS_IPO: {
        double d = sc / nc - sr / nr - half;
        return (term){d * d, 2 * d / nc, -2 * d / nr};
    }
    case STV_LOSS_SIGMOID_NORM: {
        double z = beta * (sc / nc - sr / nr);
        return (term){softplus(-z), -beta * sigmoid(-z) / nc, beta * sigmoid(-z) / nr};
    }
    case STV_LOSS_NCA_PAIR: {
        double a = beta * sc, b = beta * sr;
        t.value = softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b);
        t.dchosen = beta * (-sigmoid(-a) + 0.5 * sigmoid(a));
        t.drejected = beta * 0.5 * sigmoid(b);
        return t;
    }
    case STV_LOSS_BCO_PAIR: {
        double a = beta * sc, b = beta * sr;
        return (term){softplus(-a) + softplus(b), -beta * sigmoid(-a), beta * sigmoid(b)};
    }
    case STV_LOSS_SPPO_HARD: return (term){(sc - half) * (sc - half) + (sr + half) * (sr + half), 2 * (sc - half), 2 * (sr + half)};
    case STV_LOSS_APO_ZERO: {
        double p = sigmoid(beta * sc), q = sigmoid(beta * sr);
        return (term){sigmoid(-beta * sc) + q, -beta * p * sigmoid(-beta * sc), beta * q * sigmoid(-beta * sr)};
    }
    case STV_LOSS_APO_DOWN: {
        double z = beta * (sc - sr), p = sigmoid(beta * sc);
        double dp = beta * p * sigmoid(-beta * sc), dm = beta * sigmoid(z) * sigmoid(-z);
        return (term){p + sigmoid(-z), dp - dm, dm};
    }
    default:
        t.value = of_margin(type, beta * (sc - sr), c, &dz);
        t.dchosen = beta * dz;
        t.drejected = -beta * dz;
        return t;
    }
}

/* Score of a log-ratio and its slope (f-DPO, table 1). */
static double score(double r, const stv_preference_config *c, double *slope)
{
    switch (c->f_divergence) {
    case STV_FORWARD_KL: *slope = exp(-r); return -exp(-r);
    case STV_JS_DIVERGENCE: *slope = sigmoid(-r); return -softplus(-r);
    case STV_ALPHA_DIVERGENCE: *slope = exp((c->alpha - 1) * r); return *slope / (c->alpha - 1);
    default: *slope = 1; return r;
    }
}

typedef struct ranked {
    double value;
    int64_t pair;
} ranked;

static int by_value(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->value != y->value) return x->value < y->value ? -1 : 1;
    return x->pair < y->pair ? -1 : x->pair > y->pair;
}

/* What every loss type of a call sees, and adds to. */
typedef struct losses {
    const stv_preference_config *config;
    const stv_preference_input *in;
    double *dchosen, *drejected; /* (n_pairs) */
    ranked *ranks;               /* (2,n_pairs) scratch */
} losses;

static void add_pairs(const losses *l, stv_loss_type type, double *per_pair, double weight)
{
    const stv_preference_input *in = l->in;
    for (int64_t i = 0; i < in->n_pairs; i++) {
        double slope_c, slope_r;
        double sc = score(in->policy_chosen[i] - (in->reference_chosen ? in->reference_chosen[i] : 0), l->config, &slope_c);
        double sr = score(in->policy_rejected[i] - (in->reference_rejected ? in->reference_rejected[i] : 0), l->config, &slope_r);
        term t = of_pair(type, sc, sr, in->chosen_tokens[i], in->rejected_tokens[i], l->config);
        per_pair[i] = t.value;
        l->dchosen[i] += weight / (double)in->n_pairs * t.dchosen * slope_c;
        l->drejected[i] += weight / (double)in->n_pairs * t.drejected * slope_r;
    }
}

/* aot: policy margins and reference margins, each sorted, matched by rank. aot_unpaired: chosen and rejected log-ratios likewise. */
static void add_ranks(const losses *l, stv_loss_type type, double *per_pair, double weight)
{
    const stv_preference_input *in = l->in;
    int64_t n = in->n_pairs;
    ranked *a = l->ranks, *b = l->ranks + n;
    for (int64_t i = 0; i < n; i++) {
        double rc = in->reference_chosen ? in->reference_chosen[i] : 0, rr = in->reference_rejected ? in->reference_rejected[i] : 0;
        a[i].pair = b[i].pair = i;
        a[i].value = type == STV_LOSS_AOT ? in->policy_chosen[i] - in->policy_rejected[i] : in->policy_chosen[i] - rc;
        b[i].value = type == STV_LOSS_AOT ? rc - rr : in->policy_rejected[i] - rr;
    }
    qsort(a, (size_t)n, sizeof *a, by_value);
    qsort(b, (size_t)n, sizeof *b, by_value);
    for (int64_t i = 0; i < n; i++) {
        double dz;
        per_pair[i] = of_margin(STV_LOSS_SIGMOID, l->config->beta * (a[i].value - b[i].value), l->config, &dz);
        double d = weight / (double)n * l->config->beta * dz;
        l->dchosen[a[i].pair] += d;
        l->drejected[type == STV_LOSS_AOT ? a[i].pair : b[i].pair] -= d;
    }
}

/* sft: one mean over all chosen tokens of the batch, the same number for every pair. */
static void add_tokens(const losses *l, double *per_pair, double weight)
{
    double sum = 0, n_tokens = 0;
    for (int64_t i = 0; i < l->in->n_pairs; i++) {
        sum += l->in->policy_chosen[i];
        n_tokens += l->in->chosen_tokens[i];
    }
    for (int64_t i = 0; i < l->in->n_pairs; i++) {
        per_pair[i] = -sum / n_tokens;
        l->dchosen[i] -= weight / n_tokens;
    }
}

static stv_status check(const stv_preference_config *c, const stv_preference_input *in)
{
    if (in->n_pairs < 1) return stv_fail(STV_ERR_ARGUMENT, "preference loss: at least one pair is needed, got %lld", (long long)in->n_pairs);
    if (c->n_losses < 1) return stv_fail(STV_ERR_ARGUMENT, "preference loss: no loss type given");
    if (!(c->beta > 0)) return stv_fail(STV_ERR_ARGUMENT, "preference loss: beta must be > 0, got %g", c->beta);
    if (!(c->label_smoothing >= 0 && c->label_smoothing < 0.5))
        return stv_fail(STV_ERR_ARGUMENT, "preference loss: label_smoothing must be in [0, 0.5), got %g", c->label_smoothing);
    if (!(c->discopop_tau > 0)) return stv_fail(STV_ERR_ARGUMENT, "preference loss: discopop_tau must be > 0, got %g", c->discopop_tau);
    if (c->f_divergence == STV_ALPHA_DIVERGENCE && c->alpha == 1)
        return stv_fail(STV_ERR_ARGUMENT, "preference loss: alpha = 1 is reverse_kl; name that divergence instead");
    if (!c->reference_free && (!in->reference_chosen || !in->reference_rejected))
        return stv_fail(STV_ERR_ARGUMENT, "preference loss: reference log-probs are missing and reference_free is off");
    if (c->reference_free && (in->reference_chosen || in->reference_rejected))
        return stv_fail(STV_ERR_ARGUMENT, "preference loss: reference_free is on, but reference log-probs were given");
    for (int64_t k = 0; k < c->n_losses; k++) {
        if (c->types[k] >= STV_LOSS_COUNT) return stv_fail(STV_ERR_ARGUMENT, "preference loss: unknown loss type %d", (int)c->types[k]);
        if (!isfinite(c->weights[k])) return stv_fail(STV_ERR_ARGUMENT, "preference loss: weight %lld is not finite", (long long)k);
        if ((c->types[k] == STV_LOSS_AOT || c->types[k] == STV_LOSS_AOT_UNPAIRED) && c->f_divergence != STV_REVERSE_KL)
            return stv_fail(STV_ERR_UNSUPPORTED, "preference loss: %s is defined for reverse_kl only", loss_names[c->types[k]]);
    }
    for (int64_t i = 0; i < in->n_pairs; i++) {
        double sum = in->policy_chosen[i] + in->policy_rejected[i];
        if (in->reference_chosen) sum += in->reference_chosen[i] + in->reference_rejected[i];
        if (!isfinite(sum)) return stv_fail(STV_ERR_NUMERIC, "preference loss: pair %lld has a log-prob that is not finite", (long long)i);
        if (!(in->chosen_tokens[i] >= 1) || !(in->rejected_tokens[i] >= 1))
            return stv_fail(STV_ERR_ARGUMENT, "preference loss: pair %lld has a side without target tokens", (long long)i);
    }
    return STV_OK;
}

stv_status stv_preference_loss(double *loss, double *per_pair, double *dchosen, double *drejected, const stv_preference_config *c,
                               const stv_preference_input *in)
{
    STV_TRY(check(c, in));
    int64_t n = in->n_pairs;
    ranked *ranks = stv_alloc(2 * (size_t)n * sizeof *ranks);
    if (!ranks) return stv_fail(STV_ERR_MEMORY, "preference loss: no memory for %lld pairs", (long long)n);
    *loss = 0;
    for (int64_t i = 0; i < n; i++) dchosen[i] = drejected[i] = 0;
    losses l = {.config = c, .in = in, .dchosen = dchosen, .drejected = drejected, .ranks = ranks};
    for (int64_t k = 0; k < c->n_losses; k++) {
        double *row = per_pair + k * n, weight = c->weights[k], sum = 0;
        switch (c->types[k]) {
        case STV_LOSS_AOT:
        case STV_LOSS_AOT_UNPAIRED: add_ranks(&l, c->types[k], row, weight); break;
        case STV_LOSS_SFT: add_tokens(&l, row, weight); break;
        default: add_pairs(&l, c->types[k], row, weight); break;
        }
        for (int64_t i = 0; i < n; i++) sum += row[i];
        *loss += weight / (double)n * sum;
    }
    stv_free(ranks);
    return STV_OK;
}
