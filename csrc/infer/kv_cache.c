#include "infer/kv_cache.h"

#include <string.h>

static bool alloc_rows(stv_kv_cache *cache, const stv_decoder_config *c)
{
    size_t size = (size_t)c->n_layers * (size_t)(c->n_kv_heads * c->head_dim);
    if (!stv_size_mul(&size, size, (size_t)cache->rows.n_rows) || !stv_size_mul(&size, size, sizeof(real))) return false;
    cache->rows.k = stv_alloc(size);
    cache->rows.v = stv_alloc(size);
    return cache->rows.k && cache->rows.v;
}

static bool alloc_plans(stv_kv_cache *cache, int64_t n_sequences, int64_t n_path_spans)
{
    size_t n = (size_t)cache->n, q = (size_t)n_sequences, spans_size;
    if (!stv_size_mul(&spans_size, (size_t)cache->n_per_sequence, (size_t)n_path_spans) || !stv_size_add(&spans_size, spans_size, n) ||
        !stv_size_mul(&spans_size, spans_size, sizeof *cache->spans))
        return false;
    cache->path = stv_alloc(q * sizeof *cache->path);
    cache->path_spans = stv_alloc((size_t)n_path_spans * sizeof *cache->path_spans);
    cache->path_position = stv_alloc(q * sizeof *cache->path_position);
    cache->length = stv_alloc_zero(n * sizeof *cache->length);
    cache->segments = stv_alloc(n * sizeof *cache->segments);
    cache->spans = stv_alloc(spans_size);
    cache->row = stv_alloc(n * sizeof *cache->row);
    cache->position = stv_alloc(n * sizeof *cache->position);
    return cache->path && cache->path_spans && cache->path_position && cache->length && cache->segments && cache->spans && cache->row &&
           cache->position;
}

stv_status stv_kv_cache_create(stv_kv_cache *cache, const stv_model *model, const stv_batch *batch, int64_t n_per_sequence, int64_t max_new)
{
    const stv_batch_view *view = &batch->view;
    int64_t n_path_spans = 0;
    for (int64_t q = 0; q < view->n_sequences; q++) n_path_spans += batch->plan.segments[view->sequence_leaf[q]].n_spans;
    *cache =
        (stv_kv_cache){.n = view->n_sequences * n_per_sequence, .n_per_sequence = n_per_sequence, .max_new = max_new, .n_prompt_rows = view->n_rows};
    cache->rows.n_rows = view->n_rows + cache->n * max_new;
    if (!alloc_rows(cache, &model->config.decoder) || !alloc_plans(cache, view->n_sequences, n_path_spans))
        return stv_fail(STV_ERR_MEMORY,
                        "generator: no memory for the keys and values of %lld rows (%lld prompt rows, %lld continuations of up to %lld tokens)",
                        (long long)cache->rows.n_rows, (long long)view->n_rows, (long long)cache->n, (long long)max_new);
    n_path_spans = 0;
    for (int64_t q = 0; q < view->n_sequences; q++) {
        stv_attn_segment leaf = batch->plan.segments[view->sequence_leaf[q]];
        memcpy(cache->path_spans + n_path_spans, batch->plan.spans + leaf.i_span, (size_t)leaf.n_spans * sizeof *cache->path_spans);
        cache->path[q] = (stv_attn_segment){.i_span = n_path_spans, .n_spans = leaf.n_spans};
        cache->path_position[q] = view->row_position[batch->sequence_last_row[q]] + 1;
        n_path_spans += leaf.n_spans;
    }
    cache->plan = (stv_attn_plan){.segments = cache->segments,
                                  .spans = cache->spans,
                                  .group_begin = cache->group_begin,
                                  .n_groups = 1,
                                  .causal = true,
                                  .window = batch->plan.window};
    return STV_OK;
}

void stv_kv_cache_free(stv_kv_cache *cache)
{
    stv_free(cache->rows.k);
    stv_free(cache->rows.v);
    stv_free(cache->path);
    stv_free(cache->path_spans);
    stv_free(cache->path_position);
    stv_free(cache->length);
    stv_free(cache->segments);
    stv_free(cache->spans);
    stv_free(cache->row);
    stv_free(cache->position);
    *cache = (stv_kv_cache){0};
}

void stv_kv_cache_plan(stv_kv_cache *cache, const int64_t *continuation, int64_t n)
{
    int64_t n_spans = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t q = continuation[i] / cache->n_per_sequence, length = cache->length[continuation[i]];
        int64_t first = cache->n_prompt_rows + continuation[i] * cache->max_new;
        stv_attn_segment path = cache->path[q];
        cache->segments[i] = (stv_attn_segment){i, 1, n_spans, path.n_spans + 1};
        memcpy(cache->spans + n_spans, cache->path_spans + path.i_span, (size_t)path.n_spans * sizeof *cache->spans);
        n_spans += path.n_spans;
        cache->spans[n_spans++] = (stv_span){first, length + 1};
        cache->row[i] = first + length;
        cache->position[i] = cache->path_position[q] + (int32_t)length;
    }
    cache->plan.n_segments = n;
    cache->group_begin[0] = 0;
    cache->group_begin[1] = n;
    cache->rows.row = cache->row;
}
