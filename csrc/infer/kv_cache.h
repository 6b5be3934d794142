/* kv_cache.h - keys and values of the prompts, once, and of every continuation behind them.
 *
 *   rows of each layer:  | prompts: the batch's packed rows | continuation 0: max_new | continuation 1: max_new | ...
 *
 * A continuation sees the spans of its sequence's path and its own rows so far. All memory is taken at creation, or when rows are added: those of a
 * single continuation then count as prompt. */
#ifndef STV_INFER_KV_CACHE_H
#define STV_INFER_KV_CACHE_H

#include "model/batch.h"
#include "model/decoder.h"

#define stv_kv_cache_create STV_TYPED(stv_kv_cache_create)
#define stv_kv_cache_free STV_TYPED(stv_kv_cache_free)
#define stv_kv_cache_grow STV_TYPED(stv_kv_cache_grow)
#define stv_kv_cache_reset STV_TYPED(stv_kv_cache_reset)
#define stv_kv_cache_plan_more STV_TYPED(stv_kv_cache_plan_more)
#define stv_kv_cache_plan STV_TYPED(stv_kv_cache_plan)

typedef struct stv_kv_cache {
    stv_decoder_cache rows; /* owned; .row is where the next pass writes (NULL: prefill) */
    int32_t *token;         /* (rows.n_rows) id of each row, -1: of an image */
    int64_t n, n_per_sequence, max_new;
    int64_t n_prompt_rows;
    stv_attn_segment *path; /* (Q) spans of each sequence's path in path_spans */
    stv_span *path_spans;
    int32_t *path_position; /* (Q) position after the prompt */
    int64_t *length;        /* (n) own rows so far */
    /* the next pass: one row of each continuation asked for */
    stv_attn_plan plan;
    stv_attn_segment *segments; /* (n) */
    stv_span *spans;
    int64_t *row;      /* (n) */
    int32_t *position; /* (n) */
    int64_t group_begin[2];
} stv_kv_cache;

/* Errors: memory. The caller's struct is filled; free it also after an error. */
stv_status stv_kv_cache_create(stv_kv_cache *cache, const stv_model *model, const stv_batch *batch, int64_t n_per_sequence, int64_t max_new);
void stv_kv_cache_free(stv_kv_cache *cache);
/* For one continuation: makes room for n_rows, and keeps what is in the first n_keep. Errors: memory (nothing has changed). */
stv_status stv_kv_cache_grow(stv_kv_cache *cache, const stv_model *model, int64_t n_rows, int64_t n_keep);
/* For one continuation: the first n_rows are its prompt, and it has no rows of its own. */
void stv_kv_cache_reset(stv_kv_cache *cache, int64_t n_rows);
/* For one continuation: plans n more rows behind its prompt at once; rows.row is left to the caller. */
void stv_kv_cache_plan_more(stv_kv_cache *cache, int64_t n);
/* Plans one more row for each of these n continuations; lengths are the caller's to advance. */
void stv_kv_cache_plan(stv_kv_cache *cache, const int64_t *continuation, int64_t n);

#endif
