/* Trees against what one reads off the drawing in check_model.h, and every input that must be refused. */
#include "check_model.h"
#include "model/batch.h"

static stv_context *context;
static stv_model *model;
static stv_batch *batch;

static void open_model(stv_model_config config)
{
    CHECK_OK(stv_context_create(&context, 1));
    CHECK_OK(stv_model_create(&model, context, &config, STV_REAL_DTYPE));
}

static void close_all(void)
{
    stv_batch_free(batch);
    stv_model_free(model);
    stv_context_free(context);
    batch = NULL;
}

static void check_list(const char *what, const int64_t *got, const int64_t *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!check_int(got[i], want[i], what, __FILE__, __LINE__)) printf("    at %lld\n", (long long)i);
}

static void check_list32(const char *what, const int32_t *got, const int32_t *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (!check_int(got[i], want[i], what, __FILE__, __LINE__)) printf("    at %lld\n", (long long)i);
}

/* rows: 0..5 = 5 <0> 7 | 6 7 = 3 9 | 8 9 10 = 4 11 2 | 11 = 6 | 12..17 = <1> 8 1 | 18..21 = 1 2 3 4 | 22..32 = <1> 3 <0> 2 30 */
static void rows_of_trees(void)
{
    open_model(tiny_config());
    stv_batch_spec spec = tree_spec();
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    stv_batch_view v = stv_batch_get(batch);
    CHECK_INT(v.n_rows, 33);
    CHECK_INT(v.n_segments, 7);
    CHECK_INT(v.n_sequences, 5);
    CHECK_INT(v.n_images, 2);
    check_list("segment_row", v.segment_row, (int64_t[]){0, 6, 8, 11, 12, 18, 22, 33}, 8);
    check_list32("row_token", v.row_token, (int32_t[]){5, -1, -1, -1, -1, 7, 3, 9, 4, 11, 2, 6, -1, -1, -1, -1, 8, 1, 1, 2, 3, 4}, 22);
    check_list("row_feature", v.row_feature + 12, (int64_t[]){4, 5, 6, 7, -1, -1, -1, -1, -1, -1, 4, 5, 6, 7, -1, 0, 1, 2, 3, -1, -1}, 21);
    check_list32("row_position", v.row_position,
                 (int32_t[]){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 8, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 33);
    for (int64_t r = 0; r < 33; r++) CHECK_INT(v.row_sample[r], r < 18 ? 40 : r < 22 ? 41 : 42);
    CHECK_INT(batch->image_sample[0], 40); /* the first segment that shows it */
    CHECK_INT(batch->image_sample[1], 40);
    close_all();
}

static void sequences_and_targets(void)
{
    open_model(tiny_config());
    stv_batch_spec spec = tree_spec();
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    stv_batch_view v = stv_batch_get(batch);
    check_list32("sequence_leaf", v.sequence_leaf, (int32_t[]){2, 3, 4, 5, 6}, 5);
    check_list("sequence_begin", v.sequence_begin, (int64_t[]){0, 5, 8, 10, 13, 15}, 6);
    CHECK_INT(v.n_targets, 15);
    check_list32("target_token", v.target_token, (int32_t[]){7, 9, 4, 11, 2, 7, 9, 6, 7, 8, 2, 3, 4, 3, 30}, 15);
    check_list("label_row", v.label_row, (int64_t[]){5, 7, 8, 9, 10, 5, 7, 11, 5, 16, 19, 20, 21, 26, 32}, 15);
    check_list("target_row", v.target_row, (int64_t[]){4, 6, 7, 8, 9, 4, 6, 7, 4, 15, 18, 19, 20, 25, 31}, 15);
    check_list("sequence_last_row", batch->sequence_last_row, (int64_t[]){10, 11, 17, 21, 32}, 5);
    CHECK_INT(batch->targets.n_rows, 11);
    CHECK_INT(batch->n_head_rows, 18);
    check_list("head_row", batch->head_row, (int64_t[]){4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 18, 19, 20, 21, 25, 26, 31, 32}, 18);
    check_list("predicting", batch->predicting, (int64_t[]){0, 2, 3, 4, 5, 8, 10, 11, 12, 14, 16}, 11);
    check_list("label", batch->label, (int64_t[]){1, 3, 4, 5, 6, 1, 3, 7, 1, 9, 11, 12, 13, 15, 17}, 15);
    check_list("row_begin", batch->targets.row_begin, (int64_t[]){0, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15}, 12);
    check_list("order", batch->targets.order, (int64_t[]){0, 5, 8, 1, 6, 2, 7, 3, 4, 9, 10, 11, 12, 13, 14}, 15);
    close_all();
}

static void spans_of_trees(void)
{
    open_model(tiny_config());
    stv_batch_spec spec = tree_spec();
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    const stv_attn_plan *plan = &batch->plan;
    CHECK(plan->causal);
    CHECK_INT(plan->window, 7);
    CHECK_INT(plan->n_groups, 3);
    check_list("group_begin", plan->group_begin, (int64_t[]){0, 5, 6, 7}, 4);
    /* neighbours are one span: 0-1-2 lie one after another, 3 and 4 do not follow their parents */
    const int64_t n_spans[] = {1, 1, 1, 2, 2, 1, 1}, first_count[] = {6, 8, 11, 8, 6, 4, 11};
    for (int s = 0; s < 7; s++) {
        CHECK_INT(plan->segments[s].n_spans, n_spans[s]);
        CHECK_INT(plan->spans[plan->segments[s].i_span].count, first_count[s]);
        CHECK_INT(plan->segments[s].q_row, stv_batch_get(batch).segment_row[s]);
    }
    CHECK_INT(plan->spans[plan->segments[3].i_span + 1].row, 11);
    CHECK_INT(plan->spans[plan->segments[4].i_span + 1].row, 12);
    close_all();
}

/* One sequence is the beginning of another: its leaf is a segment without tokens. And a label on a root's first token has no predictor. */
static void empty_segments_and_first_labels(void)
{
    open_model(tiny_config());
    int32_t parent[] = {-1, 0, 1, 0}, ids[] = {3, 4, 5}, labels[] = {3, 4, 5};
    int64_t begin[] = {0, 2, 2, 3, 3};
    stv_batch_spec spec = {.n_segments = 4, .parent = parent, .begin = begin, .ids = ids, .labels = labels};
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    stv_batch_view v = stv_batch_get(batch);
    CHECK_INT(v.n_sequences, 2);
    check_list("sequence_begin", v.sequence_begin, (int64_t[]){0, 2, 3}, 3);
    check_list("target_row", v.target_row, (int64_t[]){0, 1, 0}, 3);
    check_list("sequence_last_row", batch->sequence_last_row, (int64_t[]){2, 1}, 2);
    CHECK_INT(batch->plan.segments[2].n_spans, 1);
    CHECK_INT(v.row_sample[2], 2); /* no samples given: the segment's number */
    stv_batch_free(batch);
    spec.labels = NULL;
    CHECK_OK(stv_batch_create(&batch, model, &spec));
    CHECK_INT(stv_batch_get(batch).n_targets, 0);
    close_all();
}

static void hostile_input_is_refused(void)
{
    open_model(tiny_config());
    int32_t parent[7], ids[21], labels[21], image[4];
    int64_t begin[8];
#define BAD(change, code, part) \
    do { \
        stv_batch_spec s = tree_spec(); \
        memcpy(parent, s.parent, sizeof parent), memcpy(begin, s.begin, sizeof begin); \
        memcpy(ids, s.ids, sizeof ids), memcpy(labels, s.labels, sizeof labels); \
        memcpy(image, s.image, sizeof image); \
        s.parent = parent, s.begin = begin, s.ids = ids, s.labels = labels, s.image = image; \
        change; \
        CHECK_ERROR(stv_batch_create(&batch, model, &s), (code), (part)); \
        CHECK(batch == NULL); \
    } while (0)
    BAD(s.n_segments = 0, STV_ERR_ARGUMENT, "0 segments");
    BAD(s.parent = NULL, STV_ERR_ARGUMENT, "parent");
    BAD(s.ids = NULL, STV_ERR_ARGUMENT, "ids");
    BAD(parent[0] = 0, STV_ERR_ARGUMENT, "segment 0");
    BAD(parent[2] = 2, STV_ERR_ARGUMENT, "segment 2 has parent 2");
    BAD(parent[2] = -2, STV_ERR_ARGUMENT, "segment 2 has parent -2");
    BAD(parent[6] = 3, STV_ERR_ARGUMENT, "segment 6 has parent 3"); /* of an earlier tree */
    BAD(begin[0] = 1, STV_ERR_ARGUMENT, "begin[0]");
    BAD(begin[3] = 4, STV_ERR_ARGUMENT, "segment 2");
    BAD(begin[7] = INT64_MAX, STV_ERR_ARGUMENT, "segment 6");
    BAD(ids[4] = TINY_VOCAB, STV_ERR_ARGUMENT, "segment 1, token 1 has id 31");
    BAD(ids[4] = -1, STV_ERR_ARGUMENT, "has id -1");
    BAD(labels[4] = TINY_VOCAB, STV_ERR_ARGUMENT, "has label 31");
    BAD(labels[4] = -5, STV_ERR_ARGUMENT, "has label -5");
    BAD(labels[1] = 4, STV_ERR_ARGUMENT, "segment 0, token 1 is an image with label 4");
    BAD(image[2] = 2, STV_ERR_ARGUMENT, "segment 6, token 0 shows image 2");
    BAD(image[2] = -1, STV_ERR_ARGUMENT, "shows image -1");
    BAD(s.n_image_refs = 3, STV_ERR_SHAPE, "image number 3");
    BAD(ids[18] = 1, STV_ERR_SHAPE, "4 image references for 3");
    BAD(s.n_images = -1, STV_ERR_ARGUMENT, "-1 images");
    BAD(s.image = NULL, STV_ERR_ARGUMENT, "4 image references");
    BAD(s.n_segments = 1; s.n_image_refs = 0; begin[1] = 0, STV_ERR_ARGUMENT, "no tokens");
#undef BAD
    close_all();

    stv_model_config text = tiny_config();
    text.has_vision = text.has_projector = false;
    open_model(text);
    stv_batch_spec spec = tree_spec();
    CHECK_ERROR(stv_batch_create(&batch, model, &spec), STV_ERR_ARGUMENT, "no vision tower");
    close_all();
    stv_model_config pictures = tiny_config();
    pictures.has_decoder = false;
    open_model(pictures);
    CHECK_ERROR(stv_batch_create(&batch, model, &spec), STV_ERR_ARGUMENT, "no decoder");
    close_all();
}

static const check_case cases[] = {
    {"rows of trees", rows_of_trees},
    {"sequences and targets", sequences_and_targets},
    {"spans of trees", spans_of_trees},
    {"empty segments and first labels", empty_segments_and_first_labels},
    {"hostile input is refused", hostile_input_is_refused},
};

int main(int argc, char **argv) { return CHECK_RUN(cases); }
