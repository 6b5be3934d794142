/* The sampling filters: against a literal sort-based version, ties, limits, draws. */
#include "check.h"
#include "infer/sampler.h"

enum { V = 97 };

/* temperature, top-k with ties kept, nucleus from the tail, softmax: as the words say, with no cleverness. */
static void literal(double *p, const double *logits, stv_sampling s)
{
    bool keep[V];
    double q[V], sum = 0;
    for (int i = 0; i < V; i++) {
        int larger = 0;
        for (int j = 0; j < V; j++) larger += logits[j] > logits[i];
        keep[i] = s.top_k == 0 || larger < s.top_k;
        q[i] = keep[i] ? exp(logits[i] / s.temperature) : 0;
        sum += q[i];
    }
    if (s.top_p < 1)
        for (int i = 0; i < V; i++) { /* cumulative probability of everything at or below i, in ascending order, later index first on ties */
            double tail = 0;
            bool largest = true;
            for (int j = 0; j < V; j++) {
                bool below = logits[j] < logits[i] || (logits[j] == logits[i] && j >= i);
                tail += below ? q[j] / sum : 0;
                if (keep[j] && !below) largest = false;
            }
            if (tail <= 1 - s.top_p && !largest) keep[i] = false;
        }
    sum = 0;
    for (int i = 0; i < V; i++) sum += keep[i] ? q[i] : 0;
    for (int i = 0; i < V; i++) p[i] = keep[i] ? q[i] / sum : 0;
}

static void equals_literal(void)
{
    static const stv_sampling settings[] = {{1.2, 0, 1}, {1.2, 10, 0.95}, {0.7, 0, 0.9}, {1, 300, 0.5}, {1.2, 1, 0.95}, {1.2, 10, 0.01}, {2, 5, 1}};
    double logits[V], got[V], want[V];
    for (int k = 0; k < 7; k++)
        for (uint64_t seed = 0; seed < 20; seed++) {
            check_fill(logits, V, seed);
            for (int i = 0; i < V; i++) logits[i] *= 4;
            if (seed % 2)
                for (int i = 0; i < V; i++) logits[i] = round(logits[i]); /* many ties */
            CHECK(stv_sampling_probabilities(got, logits, V, &settings[k]) == STV_OK);
            literal(want, logits, settings[k]);
            CHECK_MREL("probabilities", got, want, V, 1e-12);
        }
}

static void greedy_and_draws(void)
{
    double logits[V], p[V];
    for (int i = 0; i < V; i++) logits[i] = i == 20 || i == 40 ? 3 : 0;
    stv_sampling greedy = {0, 0, 1};
    CHECK(stv_sampling_probabilities(p, logits, V, &greedy) == STV_OK);
    CHECK(p[20] == 1 && p[40] == 0); /* the first of equals */
    double q[4] = {0.25, 0, 0.5, 0.25};
    CHECK_INT(stv_sample_token(q, 4, 0), 0);
    CHECK_INT(stv_sample_token(q, 4, 0.2499), 0);
    CHECK_INT(stv_sample_token(q, 4, 0.25), 2);
    CHECK_INT(stv_sample_token(q, 4, 0.76), 3);
    double short_sum[3] = {0.3, 0.3, 0}; /* rounding may leave the sum below u: the last possible token, never an impossible one */
    CHECK_INT(stv_sample_token(short_sum, 3, 0.9999), 1);
    double huge[2] = {4000, -4000};
    stv_sampling plain = {0.2, 0, 1};
    CHECK(stv_sampling_probabilities(p, huge, 2, &plain) == STV_OK);
    CHECK(p[0] == 1 && p[1] == 0);
}

static void bad_input(void)
{
    double logits[3] = {0, NAN, 1}, p[3];
    stv_sampling s = {1, 0, 1};
    CHECK_INT(stv_sampling_probabilities(p, logits, 3, &s), STV_ERR_NUMERIC);
    logits[1] = INFINITY;
    CHECK_INT(stv_sampling_probabilities(p, logits, 3, &s), STV_ERR_NUMERIC);
    logits[1] = -INFINITY;
    CHECK_INT(stv_sampling_probabilities(p, logits, 3, &s), STV_OK);
    CHECK(p[1] == 0);
    CHECK_INT(stv_sampling_probabilities(p, logits, 0, &s), STV_ERR_ARGUMENT);
    CHECK_INT(stv_sampling_check(&(stv_sampling){-1, 0, 1}), STV_ERR_ARGUMENT);
    CHECK_INT(stv_sampling_check(&(stv_sampling){1, -1, 1}), STV_ERR_ARGUMENT);
    CHECK_INT(stv_sampling_check(&(stv_sampling){1, 0, 0}), STV_ERR_ARGUMENT);
    CHECK_INT(stv_sampling_check(&(stv_sampling){NAN, 0, 1}), STV_ERR_ARGUMENT);
}

int main(int argc, char **argv)
{
    static const check_case cases[] = {{"equals literal", equals_literal}, {"greedy and draws", greedy_and_draws}, {"bad input", bad_input}};
    return CHECK_RUN(cases);
}
