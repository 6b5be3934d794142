#include "infer/sampler.h"

#include "base/alloc.h"

#include <math.h>

stv_status stv_sampling_check(const stv_sampling *s)
{
    if (!(s->temperature >= 0) || !isfinite(s->temperature))
        return stv_fail(STV_ERR_ARGUMENT, "sampling: temperature must be a finite number >= 0, got %g", s->temperature);
    if (s->top_k < 0) return stv_fail(STV_ERR_ARGUMENT, "sampling: top_k must be >= 0 (0 = off), got %lld", (long long)s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1)) return stv_fail(STV_ERR_ARGUMENT, "sampling: top_p must be in (0, 1], got %g", s->top_p);
    return STV_OK;
}

/* Heap order on (logit ascending, then token descending), so that popping gives the largest logit first, ties by smaller token. */
static int before(const double *logits, int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); }

static void sift(int32_t *heap, int64_t n, int64_t i, const double *logits)
{
    for (;;) {
        int64_t best = i, left = 2 * i + 1, right = left + 1;
        if (left < n && before(logits, heap[left], heap[best])) best = left;
        if (right < n && before(logits, heap[right], heap[best])) best = right;
        if (best == i) return;
        int32_t t = heap[i];
        heap[i] = heap[best];
        heap[best] = t;
        i = best;
    }
}

void stv_sampling_filter(double *p, int32_t *order, const double *logits, int64_t V, const stv_sampling *s)
{
    int64_t first = 0;
    for (int64_t i = 1; i < V; i++)
        if (logits[i] > logits[first]) first = i;
    for (int64_t i = 0; i < V; i++) p[i] = 0;
    if (s->temperature == 0) {
        p[first] = 1;
        return;
    }
    for (int64_t i = 0; i < V; i++) order[i] = (int32_t)i;
    for (int64_t i = V / 2; i-- > 0;) sift(order, V, i, logits);

    /* Pop in descending order. Popped tokens gather at the end of `order`, largest last. Top-k keeps ties with the k-th. */
    int64_t heap = V, limit = s->top_k > 0 && s->top_k < V ? s->top_k : V;
    double peak = logits[first] / s->temperature, total = 0;
    while (heap > 0) {
        int32_t token = order[0];
        if (V - heap >= limit && logits[token] < logits[order[heap]]) break;
        order[0] = order[--heap];
        order[heap] = token;
        sift(order, heap, 0, logits);
        p[token] = exp(logits[token] / s->temperature - peak);
        total += p[token];
    }
    /* Nucleus: from the smallest kept token upwards, drop while the cumulative probability is <= 1 - top_p; keep at least one. */
    double tail = 0, kept = 0;
    for (int64_t i = heap; s->top_p < 1 && i < V - 1; i++) {
        tail += p[order[i]] / total;
        if (tail > 1 - s->top_p) break;
        p[order[i]] = 0;
    }
    for (int64_t i = V; i-- > heap;) kept += p[order[i]];
    for (int64_t i = heap; i < V; i++) p[order[i]] /= kept;
}

int32_t stv_sample_token(const double *p, int64_t V, double u)
{
    double sum = 0;
    int32_t last = 0;
    for (int64_t i = 0; i < V; i++) {
        if (p[i] == 0) continue;
        sum += p[i];
        last = (int32_t)i;
        if (sum > u) break;
    }
    return last;
}

stv_status stv_sampling_probabilities(double *p, const double *logits, int64_t V, const stv_sampling *sampling)
{
    STV_TRY(stv_sampling_check(sampling));
    if (V < 1) return stv_fail(STV_ERR_ARGUMENT, "sampling: an empty vocabulary");
    for (int64_t i = 0; i < V; i++)
        if (isnan(logits[i]) || logits[i] == (double)INFINITY) /* minus infinity is a token that cannot come */
            return stv_fail(STV_ERR_NUMERIC, "sampling: logit %lld is %g", (long long)i, logits[i]);
    int32_t *order = stv_alloc((size_t)V * sizeof *order);
    if (!order) return stv_fail(STV_ERR_MEMORY, "sampling: no memory for %lld logits", (long long)V);
    stv_sampling_filter(p, order, logits, V, sampling);
    stv_free(order);
    return STV_OK;
}
