/* batch.c - counted first (count), then laid out twice by the same function, once to measure and once for real, then filled in one walk over the
 * segments. */
#include "model/batch.h"

#include "base/alloc.h"
#include "base/arena.h"

#include <string.h>

/* What one segment adds to its parent's path. */
typedef struct node {
    int64_t row; /* first row */
    int64_t n_rows;
    int64_t last_row;  /* last row of the path, -1: none */
    int64_t path_rows; /* rows from the root to its end: the position after it */
    int64_t path_targets;
    int64_t depth;     /* segments on the path */
    int64_t image_ref; /* number of its first image token */
    int32_t child;     /* while walking a path: the next segment on it */
    bool is_leaf;
} node;

typedef struct builder {
    const stv_batch_spec *spec;
    int64_t T, V;
    node *nodes; /* (S) */
    int64_t n_rows, n_trees, n_sequences, n_targets, n_spans;
    /* the arrays of the batch, writable */
    int32_t *row_token, *row_position, *sequence_leaf, *target_token;
    int64_t *row_feature, *segment_row, *sequence_begin, *target_row, *label_row, *sequence_last_row;
    uint64_t *row_sample, *image_sample;
    stv_attn_segment *segments;
    stv_span *spans;
    int64_t *group_begin, *row_begin, *order, *row_head, *head_row, *predicting, *label;
} builder;

/* ---- checking and counting ----------------------------------------------------------------------------------------------- */

static stv_status check_spec(const stv_batch_spec *spec, const stv_model *model)
{
    if (!model->config.has_decoder) return stv_fail(STV_ERR_ARGUMENT, "batch: this model has no decoder, so there are no tokens to batch");
    if (spec->n_segments < 1 || spec->n_segments > INT32_MAX)
        return stv_fail(STV_ERR_ARGUMENT, "batch: %lld segments, want at least one", (long long)spec->n_segments);
    if (!spec->parent || !spec->begin) return stv_fail(STV_ERR_ARGUMENT, "batch: parent and begin are needed");
    if (spec->begin[0] != 0) return stv_fail(STV_ERR_ARGUMENT, "batch: begin[0] is %lld, want 0", (long long)spec->begin[0]);
    for (int64_t s = 0; s < spec->n_segments; s++)
        if (spec->begin[s + 1] < spec->begin[s] || spec->begin[s + 1] > INT32_MAX)
            return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld: begin goes from %lld to %lld", (long long)s, (long long)spec->begin[s],
                            (long long)spec->begin[s + 1]);
    if (spec->begin[spec->n_segments] > 0 && !spec->ids) return stv_fail(STV_ERR_ARGUMENT, "batch: ids are needed");
    if (spec->n_image_refs < 0 || spec->n_images < 0 || spec->n_images > INT32_MAX || (spec->n_image_refs > 0 && !spec->image))
        return stv_fail(STV_ERR_ARGUMENT, "batch: %lld images and %lld image references", (long long)spec->n_images, (long long)spec->n_image_refs);
    return STV_OK;
}

static stv_status check_parent(const builder *b, int64_t s, int64_t root)
{
    int32_t parent = b->spec->parent[s];
    if (s == 0 && parent != -1) return stv_fail(STV_ERR_ARGUMENT, "batch: segment 0 has parent %d; the first segment is a root (-1)", parent);
    if (parent != -1 && (parent < root || parent >= s))
        return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld has parent %d, want an earlier segment of its tree (%lld..%lld) or -1", (long long)s,
                        parent, (long long)root, (long long)s - 1);
    return STV_OK;
}

/* Adds the rows and targets of one token to its segment. */
static stv_status count_token(builder *b, int64_t s, int64_t i, int64_t *image_ref)
{
    const stv_batch_spec *spec = b->spec;
    node *node = &b->nodes[s];
    int32_t id = spec->ids[i], label = spec->labels ? spec->labels[i] : STV_IGNORE_INDEX;
    long long token = (long long)(i - spec->begin[s]), segment = (long long)s;
    if (id == STV_IMAGE_TOKEN) {
        if (b->T == 0)
            return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld, token %lld is an image, but the model has no vision tower", segment, token);
        if (*image_ref >= spec->n_image_refs)
            return stv_fail(STV_ERR_SHAPE, "batch: segment %lld, token %lld is image number %lld, but only %lld image references are given", segment,
                            token, (long long)*image_ref, (long long)spec->n_image_refs);
        int32_t image = spec->image[(*image_ref)++];
        if (image < 0 || image >= spec->n_images)
            return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld, token %lld shows image %d, want 0..%lld", segment, token, image,
                            (long long)spec->n_images - 1);
        if (label != STV_IGNORE_INDEX)
            return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld, token %lld is an image with label %d, want %d", segment, token, label,
                            STV_IGNORE_INDEX);
    } else if (id < 0 || id >= b->V) {
        return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld, token %lld has id %d, want 0..%lld or %d (image)", segment, token, id,
                        (long long)b->V - 1, STV_IMAGE_TOKEN);
    }
    if (label != STV_IGNORE_INDEX) {
        if (label < 0 || label >= b->V)
            return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld, token %lld has label %d, want 0..%lld or %d (no target)", segment, token, label,
                            (long long)b->V - 1, STV_IGNORE_INDEX);
        if (node->path_rows > 0) node->path_targets++; /* else a root's first token: nothing predicts it */
    }
    int64_t rows = id == STV_IMAGE_TOKEN ? b->T : 1;
    node->n_rows += rows;
    node->path_rows += rows;
    return STV_OK;
}

static stv_status count(builder *b)
{
    const stv_batch_spec *spec = b->spec;
    int64_t image_ref = 0, root = 0;
    for (int64_t s = 0; s < spec->n_segments; s++) {
        STV_TRY(check_parent(b, s, root));
        int32_t parent = spec->parent[s];
        node *node = &b->nodes[s];
        *node = (struct node){.row = b->n_rows, .last_row = -1, .depth = 1, .image_ref = image_ref, .child = -1, .is_leaf = true};
        if (parent < 0) {
            root = s;
            b->n_trees++;
        } else {
            struct node *above = &b->nodes[parent];
            above->is_leaf = false;
            node->last_row = above->last_row;
            node->path_rows = above->path_rows;
            node->path_targets = above->path_targets;
            node->depth = above->depth + 1;
        }
        for (int64_t i = spec->begin[s]; i < spec->begin[s + 1]; i++) STV_TRY(count_token(b, s, i, &image_ref));
        if (node->n_rows > 0) node->last_row = node->row + node->n_rows - 1;
        b->n_rows += node->n_rows;
        b->n_spans += node->depth;
        if (b->n_rows > INT32_MAX) return stv_fail(STV_ERR_ARGUMENT, "batch: segment %lld: more than %d rows", (long long)s, INT32_MAX);
    }
    if (image_ref != spec->n_image_refs)
        return stv_fail(STV_ERR_SHAPE, "batch: %lld image references for %lld image tokens", (long long)spec->n_image_refs, (long long)image_ref);
    if (b->n_rows == 0) return stv_fail(STV_ERR_ARGUMENT, "batch: no tokens");
    for (int64_t s = 0; s < spec->n_segments; s++)
        if (b->nodes[s].is_leaf) {
            b->n_sequences++;
            b->n_targets += b->nodes[s].path_targets;
        }
    return STV_OK;
}

/* ---- laying out ---------------------------------------------------------------------------------------------------------- */

static void lay_out(builder *b, stv_arena *arena)
{
    int64_t R = b->n_rows, S = b->spec->n_segments, Q = b->n_sequences;
#define ARRAY(name, n) b->name = stv_arena_alloc(arena, (size_t)(n) * sizeof *b->name)
    ARRAY(row_token, R);
    ARRAY(row_feature, R);
    ARRAY(row_position, R);
    ARRAY(row_sample, R);
    ARRAY(segment_row, S + 1);
    ARRAY(sequence_leaf, Q);
    ARRAY(sequence_begin, Q + 1);
    ARRAY(sequence_last_row, Q);
    ARRAY(target_row, b->n_targets);
    ARRAY(label_row, b->n_targets);
    ARRAY(target_token, b->n_targets);
    ARRAY(image_sample, b->spec->n_images);
    ARRAY(segments, S);
    ARRAY(spans, b->n_spans);
    ARRAY(group_begin, b->n_trees + 1);
    ARRAY(order, b->n_targets);
    ARRAY(row_begin, R + 1);
    ARRAY(row_head, R);
    ARRAY(head_row, R);
    ARRAY(predicting, R);
    ARRAY(label, b->n_targets);
#undef ARRAY
}

/* ---- filling ------------------------------------------------------------------------------------------------------------- */

static void fill_rows(builder *b)
{
    const stv_batch_spec *spec = b->spec;
    for (int64_t i = 0; i < spec->n_images; i++) b->image_sample[i] = (uint64_t)i;
    for (int64_t s = spec->n_segments - 1; s >= 0; s--) { /* downwards, so that the first segment that shows an image names its sample */
        const node *node = &b->nodes[s];
        uint64_t sample = spec->sample ? spec->sample[s] : (uint64_t)s;
        int64_t row = node->row, image_ref = node->image_ref;
        for (int64_t i = spec->begin[s]; i < spec->begin[s + 1]; i++) {
            bool is_image = spec->ids[i] == STV_IMAGE_TOKEN;
            int64_t image = is_image ? spec->image[image_ref++] : 0;
            if (is_image) b->image_sample[image] = sample;
            for (int64_t t = 0; t < (is_image ? b->T : 1); t++, row++) {
                b->row_token[row] = is_image ? -1 : spec->ids[i];
                b->row_feature[row] = is_image ? image * b->T + t : -1;
                b->row_position[row] = (int32_t)(node->path_rows - node->n_rows + row - node->row);
                b->row_sample[row] = sample;
            }
        }
        b->segment_row[s] = node->row;
    }
    b->segment_row[spec->n_segments] = b->n_rows;
}

/* Links the path from its root down to `leaf` through node.child, and returns the root. */
static int64_t link_path(builder *b, int64_t leaf)
{
    int32_t below = -1;
    for (int64_t s = leaf;; s = b->spec->parent[s]) {
        b->nodes[s].child = below;
        below = (int32_t)s;
        if (b->spec->parent[s] < 0) return s;
    }
}

static void fill_plan(builder *b)
{
    int64_t n_spans = 0, tree = 0;
    for (int64_t s = 0; s < b->spec->n_segments; s++) {
        if (b->spec->parent[s] < 0) b->group_begin[tree++] = s;
        int64_t first = n_spans;
        for (int64_t p = link_path(b, s); p >= 0; p = b->nodes[p].child) {
            const node *node = &b->nodes[p];
            stv_span *last = n_spans > first ? &b->spans[n_spans - 1] : NULL;
            if (node->n_rows == 0) continue;
            if (last && last->row + last->count == node->row) last->count += node->n_rows;
            else b->spans[n_spans++] = (stv_span){node->row, node->n_rows};
        }
        b->segments[s] = (stv_attn_segment){b->nodes[s].row, b->nodes[s].n_rows, first, n_spans - first};
    }
    b->group_begin[tree] = b->spec->n_segments;
}

/* The targets that segment s adds to a sequence, from number n on; `row_before` is the path's last row above it. */
static int64_t fill_segment_targets(builder *b, int64_t s, int64_t row_before, int64_t n)
{
    const stv_batch_spec *spec = b->spec;
    int64_t row = b->nodes[s].row;
    for (int64_t i = spec->begin[s]; i < spec->begin[s + 1]; i++) {
        if (spec->labels[i] != STV_IGNORE_INDEX && row_before >= 0) {
            b->target_row[n] = row_before;
            b->label_row[n] = row;
            b->target_token[n++] = spec->labels[i];
        }
        row += spec->ids[i] == STV_IMAGE_TOKEN ? b->T : 1;
        row_before = row - 1;
    }
    return n;
}

static void fill_sequences(builder *b)
{
    int64_t q = 0, n = 0;
    for (int64_t leaf = 0; leaf < b->spec->n_segments; leaf++) {
        if (!b->nodes[leaf].is_leaf) continue;
        b->sequence_leaf[q] = (int32_t)leaf;
        b->sequence_last_row[q] = b->nodes[leaf].last_row;
        b->sequence_begin[q++] = n;
        int64_t row_before = -1;
        for (int64_t s = b->spec->labels ? link_path(b, leaf) : -1; s >= 0; s = b->nodes[s].child) {
            n = fill_segment_targets(b, s, row_before, n);
            row_before = b->nodes[s].last_row;
        }
    }
    b->sequence_begin[q] = n;
}

/* Returns the number of rows that predict or hold a label. */
static int64_t fill_head_rows(builder *b)
{
    int64_t n = 0;
    memset(b->row_head, 0, (size_t)b->n_rows * sizeof *b->row_head);
    for (int64_t t = 0; t < b->n_targets; t++) b->row_head[b->target_row[t]] = b->row_head[b->label_row[t]] = 1;
    for (int64_t row = 0; row < b->n_rows; row++) {
        if (!b->row_head[row]) continue;
        b->row_head[row] = n;
        b->head_row[n++] = row;
    }
    for (int64_t t = 0; t < b->n_targets; t++) b->label[t] = b->row_head[b->label_row[t]];
    return n;
}

/* Counting sort of the targets by predicting row. Returns the number of rows that predict anything. */
static int64_t fill_groups(builder *b)
{
    int64_t *end = b->row_begin, n_rows = 0, n = 0; /* end[row+1] counts; compacted in place to one entry for each predicting row */
    memset(end, 0, (size_t)(b->n_rows + 1) * sizeof *end);
    for (int64_t t = 0; t < b->n_targets; t++) end[b->target_row[t] + 1]++;
    for (int64_t row = 0; row < b->n_rows; row++) end[row + 1] += end[row];
    for (int64_t t = 0; t < b->n_targets; t++) b->order[end[b->target_row[t]]++] = t;
    for (int64_t row = 0; row < b->n_rows; row++) { /* end[row] is now where row's group ends */
        if (end[row] == n) continue;
        b->predicting[n_rows] = b->row_head[row];
        n = end[row];
        b->row_begin[n_rows++] = n;
    }
    memmove(b->row_begin + 1, b->row_begin, (size_t)n_rows * sizeof *b->row_begin);
    b->row_begin[0] = 0;
    return n_rows;
}

/* ---- the batch ----------------------------------------------------------------------------------------------------------- */

static stv_status build(stv_batch *batch, builder *b, int64_t window)
{
    stv_arena arena;
    STV_TRY(count(b));
    stv_arena_init_measuring(&arena);
    lay_out(b, &arena);
    if (stv_arena_create(&arena, arena.peak) != STV_OK)
        return stv_fail(STV_ERR_MEMORY, "batch: no memory for %lld rows and %lld targets", (long long)b->n_rows, (long long)b->n_targets);
    lay_out(b, &arena);
    batch->memory = arena;
    fill_rows(b);
    fill_plan(b);
    fill_sequences(b);
    int64_t n_head_rows = fill_head_rows(b), n_predicting = fill_groups(b);

    batch->view = (stv_batch_view){
        .n_rows = b->n_rows,
        .n_segments = b->spec->n_segments,
        .n_sequences = b->n_sequences,
        .n_targets = b->n_targets,
        .n_images = b->spec->n_images,
        .row_token = b->row_token,
        .row_feature = b->row_feature,
        .row_position = b->row_position,
        .row_sample = b->row_sample,
        .segment_row = b->segment_row,
        .sequence_leaf = b->sequence_leaf,
        .sequence_begin = b->sequence_begin,
        .target_row = b->target_row,
        .label_row = b->label_row,
        .target_token = b->target_token,
    };
    batch->plan = (stv_attn_plan){.segments = b->segments,
                                  .spans = b->spans,
                                  .group_begin = b->group_begin,
                                  .n_segments = b->spec->n_segments,
                                  .n_groups = b->n_trees,
                                  .causal = true,
                                  .window = window};
    batch->targets =
        (stv_targets){.n_rows = n_predicting, .n_targets = b->n_targets, .row_begin = b->row_begin, .order = b->order, .token = b->target_token};
    batch->head_row = b->head_row;
    batch->n_head_rows = n_head_rows;
    batch->predicting = b->predicting;
    batch->label = b->label;
    batch->sequence_last_row = b->sequence_last_row;
    batch->image_sample = b->image_sample;
    return STV_OK;
}

stv_status stv_batch_create(stv_batch **out, const stv_model *model, const stv_batch_spec *spec)
{
    *out = NULL;
    STV_TRY(check_spec(spec, model));
    stv_batch *batch = stv_alloc_zero(sizeof *batch);
    builder b = {.spec = spec, .T = stv_model_tokens_per_image(model), .V = model->config.decoder.vocab_size};
    b.nodes = stv_alloc((size_t)spec->n_segments * sizeof *b.nodes);
    if (batch) batch->model = model;
    stv_status status = batch && b.nodes ? build(batch, &b, model->config.decoder.sliding_window)
                                         : stv_fail(STV_ERR_MEMORY, "batch: no memory for %lld segments", (long long)spec->n_segments);
    stv_free(b.nodes);
    if (status != STV_OK) stv_batch_free(batch);
    else *out = batch;
    return status;
}

void stv_batch_free(stv_batch *batch)
{
    if (!batch) return;
    stv_arena_free(&batch->memory);
    stv_free(batch);
}

stv_batch_view stv_batch_get(const stv_batch *batch) { return batch->view; }
