/* attention.c - scores, softmax and values for blocks of queries; backward from the saved log-sum-exp.
 *
 *     plan                    scratch                        block of 32 queries of one head
 *     spans of key rows  -->  K transposed (head_dim, rows)  S = q K^T span by span, columns = key numbers of the segment
 *                             V padded     (rows, head_dim)  P = softmax of each row over the keys it sees, 0 elsewhere
 *                                                            out = P V
 *
 * K and V are rearranged once for all segments that share them; spans then only say which columns to use, so a shared prefix costs nothing
 * extra. A segment of one query (decoding) reads K and V where they lie: rearranging them would cost more than using them. A whole row of scores
 * is kept instead of a running maximum: its length is the context, a few thousand at most, and the softmax stays two plain passes.
 *
 * Keys that a row of a block does not see enter its sums with weight exactly 0. */
#include "ops/attention.h"

#include "base/cpu.h"
#include "base/watch.h"
#include "ops/attention_kernel.h"
#include "ops/reduce.h"
#include "ops/rows.h"
#include "ops/split.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum {
    BLOCK = 32,        /* queries */
    GATHER_ROWS = 64,  /* key rows rearranged by one task */
    MIN_WORK = 1 << 17 /* multiply-adds below which waking threads costs more than it brings */
};

static const stv_attn_kernel *choose_kernel(void)
{
#if defined(__x86_64__)
    if (stv_cpu() == STV_CPU_AVX512) return &stv_attn_avx512;
    if (stv_cpu() == STV_CPU_AVX2) return &stv_attn_avx2;
#endif
    return &stv_attn_portable;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t round_up(int64_t n) { return (n + STV_ATTN_PAD - 1) / STV_ATTN_PAD * STV_ATTN_PAD; }

/* Row stride of a matrix whose rows are long: room for a product's overrun, and an odd number of cache lines, so that a column does not fall
 * into one cache set. */
static int64_t long_stride(int64_t n) { return (round_up(n) / STV_ATTN_PAD | 1) * STV_ATTN_PAD + STV_ATTN_PAD * 2; }

/* ---- reading a plan ------------------------------------------------------------------------------------------------------ */

static int64_t count_keys(const stv_attn_plan *plan, const stv_attn_segment *segment)
{
    int64_t n = 0;
    for (int64_t i = 0; i < segment->n_spans; i++) n += plan->spans[segment->i_span + i].count;
    return n;
}

static int64_t count_blocks(const stv_attn_segment *segment) { return (segment->q_count + BLOCK - 1) / BLOCK; }

typedef struct range {
    int64_t begin, end;
} range;

/* The keys that query i of a segment sees. */
static range visible_keys(const stv_attn_plan *plan, const stv_attn_segment *segment, int64_t n_keys, int64_t i)
{
    if (!plan->causal) return (range){0, n_keys};
    int64_t end = n_keys - segment->q_count + i + 1;
    return (range){plan->window && end > plan->window ? end - plan->window : 0, end};
}

static range visible_to_block(const stv_attn_plan *plan, const stv_attn_segment *segment, int64_t n_keys, int64_t i0, int64_t n)
{
    return (range){visible_keys(plan, segment, n_keys, i0).begin, visible_keys(plan, segment, n_keys, i0 + n - 1).end};
}

/* Walks the pieces of spans that make up a range of key numbers: for (walk w = walk_keys(...); next_piece(&w);) w.key, w.row, w.count. */
typedef struct walk {
    const stv_span *span, *last;
    range keys;
    int64_t n_before; /* keys in the spans before this one */
    int64_t key, row, count;
} walk;

static walk walk_keys(const stv_attn_plan *plan, const stv_attn_segment *segment, range keys)
{
    const stv_span *span = plan->spans + segment->i_span;
    return (walk){.span = span, .last = span + segment->n_spans, .keys = keys};
}

static bool next_piece(walk *w)
{
    while (w->span < w->last) {
        const stv_span *span = w->span++;
        int64_t begin = max64(w->keys.begin, w->n_before), end = min64(w->keys.end, w->n_before + span->count);
        w->key = begin;
        w->row = span->row + begin - w->n_before;
        w->count = end - begin;
        w->n_before += span->count;
        if (w->count > 0) return true;
    }
    return false;
}

/* The smallest range of buffer rows with all keys of the segments in [begin,end) that have at least min_queries queries. */
static range key_rows(const stv_attn_plan *plan, int64_t begin, int64_t end, int64_t min_queries)
{
    range rows = {INT64_MAX, 0};
    for (int64_t s = begin; s < end; s++) {
        const stv_attn_segment *segment = &plan->segments[s];
        if (segment->q_count < min_queries) continue;
        for (int64_t i = 0; i < segment->n_spans; i++) {
            stv_span span = plan->spans[segment->i_span + i];
            if (span.count == 0) continue;
            rows.begin = min64(rows.begin, span.row);
            rows.end = max64(rows.end, span.row + span.count);
        }
    }
    return rows.end > rows.begin ? rows : (range){0, 0};
}

static void mark_rows(unsigned char *used, range rows, const stv_attn_plan *plan, int64_t begin, int64_t end)
{
    memset(used, 0, (size_t)(rows.end - rows.begin));
    for (int64_t s = begin; s < end; s++)
        for (int64_t i = 0; i < plan->segments[s].n_spans; i++) {
            stv_span span = plan->spans[plan->segments[s].i_span + i];
            memset(used + span.row - rows.begin, 1, (size_t)span.count);
        }
}

/* ---- rearranging rows ---------------------------------------------------------------------------------------------------- */

/* to (head_dim, stride) = from (n, from_row)^T */
static void transpose(real *to, int64_t stride, const real *from, int64_t from_row, int64_t n, int64_t head_dim)
{
    for (int64_t r = 0; r < n; r += STV_ATTN_PAD) /* a cache line of every row of `to` at a time */
        for (int64_t d = 0; d < head_dim; d++)
            for (int64_t i = r; i < min64(r + STV_ATTN_PAD, n); i++) to[d * stride + i] = from[i * from_row + d];
}

/* to (n, stride) = scale * from (n, from_row), zero beyond head_dim */
static void pad_rows(real *to, int64_t stride, const real *from, int64_t from_row, int64_t n, int64_t head_dim, real scale)
{
    for (int64_t i = 0; i < n; i++) {
        for (int64_t d = 0; d < head_dim; d++) to[i * stride + d] = from[i * from_row + d] * scale;
        for (int64_t d = head_dim; d < stride; d++) to[i * stride + d] = 0;
    }
}

/* ---- forward ------------------------------------------------------------------------------------------------------------- */

typedef struct forward_args {
    real *out, *lse;
    const real *q, *k, *v;
    const stv_attn_plan *plan;
    stv_attn_shape shape;
    const stv_attn_kernel *kernel;
    real scale;
    int64_t width; /* head_dim padded */
    range rows;    /* of the keys that were rearranged */
    int64_t k_stride, s_stride;
    real *k_transposed;   /* (n_kv_heads, head_dim, k_stride) */
    real *v_padded;       /* (n_kv_heads, rows, width) */
    int64_t *block_begin; /* (n_segments+1) first block of each segment */
    real *scratch;        /* (workers, scratch_size) */
    int64_t scratch_size;
} forward_args;

static void gather_task(void *arg, int64_t i_task, int i_worker)
{
    (void)i_worker;
    const forward_args *a = arg;
    int64_t hd = a->shape.head_dim, n_kv = a->shape.n_kv_heads, n_rows = a->rows.end - a->rows.begin;
    int64_t head = i_task % n_kv, first = i_task / n_kv * GATHER_ROWS, n = min64(GATHER_ROWS, n_rows - first);
    int64_t from = ((a->rows.begin + first) * n_kv + head) * hd;
    transpose(a->k_transposed + head * hd * a->k_stride + first, a->k_stride, a->k + from, n_kv * hd, n, hd);
    pad_rows(a->v_padded + (head * n_rows + first) * a->width, a->width, a->v + from, n_kv * hd, n, hd, 1);
}

static const stv_attn_segment *find_block(const forward_args *a, int64_t i_block, int64_t *first_query)
{
    int64_t low = 0, high = a->plan->n_segments; /* the segment is in [low,high) */
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (a->block_begin[middle] <= i_block) low = middle;
        else high = middle;
    }
    *first_query = (i_block - a->block_begin[low]) * BLOCK;
    return &a->plan->segments[low];
}

static void forward_task(void *arg, int64_t i_task, int i_worker)
{
    const forward_args *a = arg;
    int64_t n_heads = a->shape.n_heads, n_kv = a->shape.n_kv_heads, hd = a->shape.head_dim, width = a->width;
    int64_t head = i_task % n_heads, kv_head = head / (n_heads / n_kv), kv_row = n_kv * hd, i0;
    const stv_attn_segment *segment = find_block(a, i_task / n_heads, &i0);
    int64_t n = min64(BLOCK, segment->q_count - i0), n_keys = count_keys(a->plan, segment);
    range block = visible_to_block(a->plan, segment, n_keys, i0, n);
    bool in_place = segment->q_count == 1;

    real *q = a->scratch + i_worker * a->scratch_size, *out = q + BLOCK * width, *s = out + BLOCK * width;
    int64_t q_offset = ((segment->q_row + i0) * n_heads + head) * hd;
    pad_rows(q, width, a->q + q_offset, n_heads * hd, n, hd, a->scale);

    const real *k_transposed = a->k_transposed + kv_head * hd * a->k_stride;
    for (walk w = walk_keys(a->plan, segment, block); next_piece(&w);)
        if (in_place) a->kernel->scores(s + w.key, q, a->k + w.row * kv_row + kv_head * hd, kv_row, w.count, hd);
        else
            a->kernel->product(s + w.key, a->s_stride, (stv_attn_left){q, width, 1}, k_transposed + w.row - a->rows.begin, a->k_stride,
                               (stv_attn_extent){n, w.count, hd}, false);

    double sum[BLOCK];
    for (int64_t i = 0; i < n; i++) {
        real *row = s + i * a->s_stride;
        range keys = visible_keys(a->plan, segment, n_keys, i0 + i);
        real max = a->kernel->softmax(&sum[i], row, keys.begin, keys.end);
        for (int64_t j = block.begin; j < keys.begin; j++) row[j] = 0;
        for (int64_t j = keys.end; j < block.end; j++) row[j] = 0;
        a->lse[(segment->q_row + i0 + i) * n_heads + head] = (real)((double)max + log(sum[i]));
    }

    memset(out, 0, (size_t)(n * width) * sizeof(real));
    const real *v_padded = a->v_padded + kv_head * (a->rows.end - a->rows.begin) * width;
    for (walk w = walk_keys(a->plan, segment, block); next_piece(&w);)
        if (in_place) a->kernel->values(out, s + w.key, a->v + w.row * kv_row + kv_head * hd, kv_row, w.count, hd);
        else
            a->kernel->product(out, width, (stv_attn_left){s + w.key, a->s_stride, 1}, v_padded + (w.row - a->rows.begin) * width, width,
                               (stv_attn_extent){n, hd, w.count}, true);

    for (int64_t i = 0; i < n; i++) {
        real *to = a->out + q_offset + i * n_heads * hd, inverse = (real)(1 / sum[i]);
        for (int64_t d = 0; d < hd; d++) to[d] = out[i * width + d] * inverse;
    }
}

void stv_attention_forward(stv_exec *x, real *out, real *lse, const real *q, const real *k, const real *v, const stv_attn_plan *plan,
                           stv_attn_shape shape)
{
    size_t mark = stv_arena_mark(x->arena);
    int64_t hd = shape.head_dim, n_kv = shape.n_kv_heads, max_keys = 0, n_blocks = 0, work = 0;
    for (int64_t s = 0; s < plan->n_segments; s++) {
        int64_t n_keys = count_keys(plan, &plan->segments[s]);
        assert(plan->segments[s].q_count == 0 || n_keys >= (plan->causal ? plan->segments[s].q_count : 1));
        max_keys = max64(max_keys, n_keys);
        n_blocks += count_blocks(&plan->segments[s]);
        work += plan->segments[s].q_count * n_keys * shape.n_heads * hd * 2;
    }
    forward_args a = {.out = out,
                      .lse = lse,
                      .q = q,
                      .k = k,
                      .v = v,
                      .plan = plan,
                      .shape = shape,
                      .kernel = choose_kernel(),
                      .scale = (real)(1 / sqrt((double)hd)),
                      .width = round_up(hd),
                      .rows = key_rows(plan, 0, plan->n_segments, 2)};
    int64_t n_rows = a.rows.end - a.rows.begin;
    a.k_stride = long_stride(n_rows);
    a.s_stride = long_stride(max_keys);
    a.scratch_size = BLOCK * (2 * a.width + a.s_stride);
    a.k_transposed = stv_arena_alloc(x->arena, (size_t)(n_rows ? n_kv * hd * a.k_stride : 0) * sizeof(real));
    a.v_padded = stv_arena_alloc(x->arena, (size_t)(n_kv * n_rows * a.width) * sizeof(real));
    a.block_begin = stv_arena_alloc(x->arena, (size_t)(plan->n_segments + 1) * sizeof(int64_t));
    a.scratch = stv_arena_alloc(x->arena, (size_t)(stv_pool_n_threads(x->pool) * a.scratch_size) * sizeof(real));
    if (!stv_measuring(x)) {
        a.block_begin[0] = 0;
        for (int64_t s = 0; s < plan->n_segments; s++) a.block_begin[s + 1] = a.block_begin[s] + count_blocks(&plan->segments[s]);
        stv_pool_run(x->pool, (n_rows + GATHER_ROWS - 1) / GATHER_ROWS * n_kv, gather_task, &a);
        if (work >= MIN_WORK) stv_pool_run(x->pool, n_blocks * shape.n_heads, forward_task, &a);
        else
            for (int64_t i = 0; i < n_blocks * shape.n_heads; i++) forward_task(&a, i, 0);
    }
    stv_arena_release(x->arena, mark);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

typedef struct backward_args {
    real *dq, *dk, *dv;
    const real *dout;
    const stv_attn_saved *saved;
    const stv_attn_plan *plan;
    stv_attn_shape shape;
    const stv_attn_kernel *kernel;
    real scale;
    int64_t width, s_stride;
    int64_t max_rows, max_stride; /* key rows of the largest group, and their stride when transposed */
    char *scratch;                /* (workers, scratch_size) */
    size_t scratch_size;
} backward_args;

/* One worker's memory: the keys of one group and kv head, rearranged, with their gradients; and one block of queries. */
typedef struct backward_scratch {
    real *k_transposed, *v_transposed; /* (head_dim, max_stride) */
    real *k, *dk, *dv;                 /* (max_rows, width) */
    real *q, *dout, *dq;               /* (BLOCK, width) */
    real *s, *ds;                      /* (BLOCK, s_stride) */
    unsigned char *used;               /* (max_rows) */
} backward_scratch;

static real *take(uintptr_t *cursor, int64_t n)
{
    real *p = (real *)*cursor;
    *cursor += (uintptr_t)round_up(n) * sizeof(real);
    return p;
}

static backward_scratch lay_out_scratch(const backward_args *a, uintptr_t *cursor)
{
    int64_t hd = a->shape.head_dim;
    backward_scratch w;
    w.k_transposed = take(cursor, hd * a->max_stride);
    w.v_transposed = take(cursor, hd * a->max_stride);
    w.k = take(cursor, a->max_rows * a->width);
    w.dk = take(cursor, a->max_rows * a->width);
    w.dv = take(cursor, a->max_rows * a->width);
    w.q = take(cursor, BLOCK * a->width);
    w.dout = take(cursor, BLOCK * a->width);
    w.dq = take(cursor, BLOCK * a->width);
    w.s = take(cursor, BLOCK * a->s_stride);
    w.ds = take(cursor, BLOCK * a->s_stride);
    w.used = (unsigned char *)take(cursor, a->max_rows);
    return w;
}

/* With p = exp(s - lse):  dv += p^T dout,  ds = p (dout v^T - delta), delta = dout . out,  dq = scale ds k,  dk += ds^T (scale q). */
static void backward_block(const backward_args *a, const backward_scratch *b, range rows, const stv_attn_segment *segment, int64_t i0, int64_t head)
{
    const stv_attn_saved *saved = a->saved;
    int64_t n_heads = a->shape.n_heads, hd = a->shape.head_dim, width = a->width;
    int64_t n = min64(BLOCK, segment->q_count - i0), n_keys = count_keys(a->plan, segment);
    range block = visible_to_block(a->plan, segment, n_keys, i0, n);
    int64_t offset = ((segment->q_row + i0) * n_heads + head) * hd;
    stv_attn_left q = {b->q, width, 1}, dout = {b->dout, width, 1};
    pad_rows(b->q, width, saved->q + offset, n_heads * hd, n, hd, a->scale);
    pad_rows(b->dout, width, a->dout + offset, n_heads * hd, n, hd, 1);

    for (walk w = walk_keys(a->plan, segment, block); next_piece(&w);) {
        stv_attn_extent extent = {n, w.count, hd};
        int64_t column = w.row - rows.begin;
        a->kernel->product(b->s + w.key, a->s_stride, q, b->k_transposed + column, a->max_stride, extent, false);
        a->kernel->product(b->ds + w.key, a->s_stride, dout, b->v_transposed + column, a->max_stride, extent, false);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t row_offset = offset + i * n_heads * hd;
        real *s = b->s + i * a->s_stride, *ds = b->ds + i * a->s_stride;
        range keys = visible_keys(a->plan, segment, n_keys, i0 + i);
        real delta = (real)stv_row_dot(a->dout + row_offset, saved->out + row_offset, hd);
        a->kernel->softmax_backward(s, ds, keys.begin, keys.end, saved->lse[(segment->q_row + i0 + i) * n_heads + head], delta);
        for (int64_t j = block.begin; j < keys.begin; j++) s[j] = ds[j] = 0;
        for (int64_t j = keys.end; j < block.end; j++) s[j] = ds[j] = 0;
    }
    memset(b->dq, 0, (size_t)(n * width) * sizeof(real));
    for (walk w = walk_keys(a->plan, segment, block); next_piece(&w);) {
        int64_t key_offset = (w.row - rows.begin) * width;
        stv_attn_left p_transposed = {b->s + w.key, 1, a->s_stride}, ds_transposed = {b->ds + w.key, 1, a->s_stride};
        stv_attn_extent extent = {w.count, hd, n};
        a->kernel->product(b->dq, width, (stv_attn_left){b->ds + w.key, a->s_stride, 1}, b->k + key_offset, width, (stv_attn_extent){n, hd, w.count},
                           true);
        a->kernel->product(b->dk + key_offset, width, ds_transposed, b->q, width, extent, true);
        a->kernel->product(b->dv + key_offset, width, p_transposed, b->dout, width, extent, true);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < hd; d++) a->dq[offset + i * n_heads * hd + d] = a->scale * b->dq[i * width + d];
}

static void backward_task(void *arg, int64_t i_task, int i_worker)
{
    const backward_args *a = arg;
    int64_t hd = a->shape.head_dim, n_kv = a->shape.n_kv_heads, width = a->width, n_rep = a->shape.n_heads / n_kv;
    int64_t group = i_task / n_kv, kv_head = i_task % n_kv;
    int64_t begin = a->plan->group_begin[group], end = a->plan->group_begin[group + 1];
    range rows = key_rows(a->plan, begin, end, 1);
    int64_t n_rows = rows.end - rows.begin, row_step = n_kv * hd, first = rows.begin * row_step + kv_head * hd;
    uintptr_t cursor = (uintptr_t)a->scratch + (uintptr_t)i_worker * a->scratch_size;
    backward_scratch b = lay_out_scratch(a, &cursor);

    transpose(b.k_transposed, a->max_stride, a->saved->k + first, row_step, n_rows, hd);
    transpose(b.v_transposed, a->max_stride, a->saved->v + first, row_step, n_rows, hd);
    pad_rows(b.k, width, a->saved->k + first, row_step, n_rows, hd, 1);
    memset(b.dk, 0, (size_t)(n_rows * width) * sizeof(real));
    memset(b.dv, 0, (size_t)(n_rows * width) * sizeof(real));
    for (int64_t s = begin; s < end; s++)
        for (int64_t i0 = 0; i0 < a->plan->segments[s].q_count && !stv_stopped(); i0 += BLOCK)
            for (int64_t r = 0; r < n_rep; r++) backward_block(a, &b, rows, &a->plan->segments[s], i0, kv_head * n_rep + r);

    mark_rows(b.used, rows, a->plan, begin, end); /* rows between them may belong to another group */
    for (int64_t r = 0; r < n_rows; r++) {
        if (!b.used[r]) continue;
        memcpy(a->dk + first + r * row_step, b.dk + r * width, (size_t)hd * sizeof(real));
        memcpy(a->dv + first + r * row_step, b.dv + r * width, (size_t)hd * sizeof(real));
    }
}

void stv_attention_backward(stv_exec *x, real *dq, real *dk, real *dv, const real *dout, const stv_attn_saved *saved, const stv_attn_plan *plan,
                            stv_attn_shape shape, int64_t n_key_rows)
{
    size_t mark = stv_arena_mark(x->arena);
    int64_t hd = shape.head_dim, max_keys = 0;
    backward_args a = {.dq = dq,
                       .dk = dk,
                       .dv = dv,
                       .dout = dout,
                       .saved = saved,
                       .plan = plan,
                       .shape = shape,
                       .kernel = choose_kernel(),
                       .scale = (real)(1 / sqrt((double)hd)),
                       .width = round_up(hd)};
    for (int64_t s = 0; s < plan->n_segments; s++) max_keys = max64(max_keys, count_keys(plan, &plan->segments[s]));
    for (int64_t g = 0; g < plan->n_groups; g++) {
        range rows = key_rows(plan, plan->group_begin[g], plan->group_begin[g + 1], 1);
        a.max_rows = max64(a.max_rows, rows.end - rows.begin);
    }
    a.s_stride = long_stride(max_keys);
    a.max_stride = long_stride(a.max_rows);
    uintptr_t size = 0; /* laid out at address 0, the end is the size */
    lay_out_scratch(&a, &size);
    a.scratch_size = size;
    a.scratch = stv_arena_alloc(x->arena, (size_t)stv_pool_n_threads(x->pool) * a.scratch_size);
    if (!stv_measuring(x)) {
        stv_zero(x, dk, n_key_rows * shape.n_kv_heads * hd);
        stv_zero(x, dv, n_key_rows * shape.n_kv_heads * hd);
        stv_pool_run(x->pool, plan->n_groups * shape.n_kv_heads, backward_task, &a);
    }
    stv_arena_release(x->arena, mark);
}
