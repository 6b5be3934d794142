#include "infer/kv_cache.h"

#include <string.h>

static bool alloc_rows(stv_kv_cache *cache, const stv_decoder_config *c)
{
    size_t size = (size_t)c->n_layers * (size_t)(c->n_kv_heads * c->head_dim);
    if (!stv_size_mul(&size, size, (size_t)cache->rows.n_rows) || !stv_size_mul(&size, size, sizeof(real))) return false;
    cache->rows.k = stv_alloc(size);
    cache->rows.v = stv_alloc(size);
    cache->token = stv_alloc((size_t)cache->rows.n_rows * sizeof *cache->token);
    return cache->rows.k && cache->rows.v && cache->token;
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
    memcpy(cache->token, view->row_token, (size_t)view->n_rows * sizeof *cache->token);
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

static void free_rows(stv_kv_cache *cache)
{
    stv_free(cache->rows.k);
    stv_free(cache->rows.v);
    stv_free(cache->token);
}

void stv_kv_cache_free(stv_kv_cache *cache)
{
    free_rows(cache);
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

stv_status stv_kv_cache_grow(stv_kv_cache *cache, const stv_model *model, int64_t n_rows, int64_t n_keep)
{
    const stv_decoder_config *c = &model->config.decoder;
    if (n_rows <= cache->rows.n_rows) return STV_OK;
    stv_kv_cache larger = {.rows.n_rows = n_rows + n_rows / 2}; /* so that each row is moved a few times at most */
    if (!alloc_rows(&larger, c)) {
        free_rows(&larger);
        return stv_fail(STV_ERR_MEMORY, "generator: no memory for the keys and values of %lld rows", (long long)larger.rows.n_rows);
    }
    size_t width = (size_t)(c->n_kv_heads * c->head_dim), kept_bytes = (size_t)n_keep * width * sizeof(real);
    for (size_t layer = 0; layer < (size_t)c->n_layers; layer++) {
        size_t from = layer * (size_t)cache->rows.n_rows * width, to = layer * (size_t)larger.rows.n_rows * width;
        memcpy(larger.rows.k + to, cache->rows.k + from, kept_bytes);
        memcpy(larger.rows.v + to, cache->rows.v + from, kept_bytes);
    }
    memcpy(larger.token, cache->token, (size_t)n_keep * sizeof *cache->token);
    free_rows(cache);
    cache->rows = larger.rows;
    cache->token = larger.token;
    return STV_OK;
}

void stv_kv_cache_reset(stv_kv_cache *cache, int64_t n_rows)
{
    cache->n_prompt_rows = n_rows;
    cache->path[0] = (stv_attn_segment){.n_spans = 1};
    cache->path_spans[0] = (stv_span){0, n_rows};
    cache->path_position[0] = (int32_t)n_rows;
    cache->length[0] = 0;
}

static void plan_group(stv_kv_cache *cache, const int64_t *row, int64_t n_segments)
{
    cache->plan.n_segments = n_segments;
    cache->group_begin[0] = 0;
    cache->group_begin[1] = n_segments;
    cache->rows.row = row;
}

void stv_kv_cache_plan_more(stv_kv_cache *cache, int64_t n)
{
    cache->segments[0] = (stv_attn_segment){0, n, 0, 1};
    cache->spans[0] = (stv_span){0, cache->n_prompt_rows + n};
    plan_group(cache, NULL, 1);
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
    plan_group(cache, cache->row, n);
}
