#include "model/inputs.h"

#include "base/alloc.h"

static stv_status check_merged(const stv_model *model, const stv_forward_options *options)
{
    if (options->train) STV_TRY(stv_params_check_unmerged(model, "forward with train"));
    if (options->theta) STV_TRY(stv_params_check_unmerged(model, "forward with another theta"));
    return STV_OK;
}

stv_status stv_inputs_check_images(const stv_model *model, const stv_forward_options *options, unsigned parts, bool all_layers)
{
    const stv_model_config *config = &model->config;
    if (!config->has_vision) return stv_fail(STV_ERR_ARGUMENT, "images, but the model has no vision tower");
    if ((parts & STV_PART_PROJECTOR) && !config->has_projector) return stv_fail(STV_ERR_ARGUMENT, "image features, but the model has no projector");
    if (options->n_images < 1 || options->n_images > 1 << 20)
        return stv_fail(STV_ERR_ARGUMENT, "n_images is %lld, want 1..%d", (long long)options->n_images, 1 << 20);
    if (!options->pixels) return stv_fail(STV_ERR_ARGUMENT, "no pixels for %lld images", (long long)options->n_images);
    STV_TRY(check_merged(model, options));
    return stv_params_check_bound(model, parts, options->adapters, all_layers);
}

stv_status stv_inputs_check(const stv_model *model, const stv_batch *batch, const stv_forward_options *options)
{
    if (batch->model != model) return stv_fail(STV_ERR_ARGUMENT, "the batch was made for another model");
    int64_t n_images = batch->view.n_images;
    if (n_images > 0) {
        if (options->n_images != n_images)
            return stv_fail(STV_ERR_SHAPE, "the batch shows %lld images, the options bring %lld", (long long)n_images, (long long)options->n_images);
        if (options->pixels && options->features)
            return stv_fail(STV_ERR_ARGUMENT, "both pixels and features of %lld images, want one", (long long)n_images);
        if (!options->features) STV_TRY(stv_inputs_check_images(model, options, STV_PART_VISION | STV_PART_PROJECTOR, false));
    }
    STV_TRY(check_merged(model, options));
    return stv_params_check_bound(model, STV_PART_DECODER, options->adapters, false);
}

static bool reserve(stv_image_rows *rows, int64_t n_images, int64_t rows_per_image)
{
    if (n_images <= rows->capacity) return true;
    stv_image_rows_free(rows);
    size_t n = (size_t)n_images, n_rows = n * (size_t)rows_per_image;
    rows->segments = stv_alloc(n * sizeof *rows->segments);
    rows->spans = stv_alloc(n * sizeof *rows->spans);
    rows->group_begin = stv_alloc((n + 1) * sizeof *rows->group_begin);
    rows->selected = stv_alloc(n_rows * sizeof *rows->selected);
    rows->class_row = stv_alloc(n * sizeof *rows->class_row);
    rows->row_sample = stv_alloc(n_rows * sizeof *rows->row_sample);
    rows->row_position = stv_alloc(n_rows * sizeof *rows->row_position);
    bool complete = rows->segments && rows->spans && rows->group_begin && rows->selected && rows->class_row && rows->row_sample && rows->row_position;
    if (complete) rows->capacity = n_images;
    else stv_image_rows_free(rows);
    return complete;
}

stv_status stv_image_rows_set(stv_image_rows *rows, const stv_vision_config *vision, int64_t n_images, const uint64_t *image_sample)
{
    int64_t per_image = stv_config_n_patches(vision) + 1, skipped = vision->select_class ? 0 : 1, n_selected = 0;
    if (!reserve(rows, n_images, per_image)) return stv_fail(STV_ERR_MEMORY, "no memory for the rows of %lld images", (long long)n_images);
    rows->n_images = n_images;
    rows->n_rows = n_images * per_image;
    for (int64_t i = 0; i < n_images; i++) {
        int64_t first = i * per_image;
        rows->segments[i] = (stv_attn_segment){first, per_image, i, 1};
        rows->spans[i] = (stv_span){first, per_image};
        rows->group_begin[i] = i;
        rows->class_row[i] = first;
        for (int64_t r = 0; r < per_image; r++) {
            rows->row_sample[first + r] = image_sample ? image_sample[i] : (uint64_t)i;
            rows->row_position[first + r] = (int32_t)r;
            if (r >= skipped) rows->selected[n_selected++] = first + r;
        }
    }
    if (n_images) rows->group_begin[n_images] = n_images;
    rows->plan = (stv_attn_plan){
        .segments = rows->segments, .spans = rows->spans, .group_begin = rows->group_begin, .n_segments = n_images, .n_groups = n_images};
    return STV_OK;
}

void stv_image_rows_free(stv_image_rows *rows)
{
    stv_free(rows->segments);
    stv_free(rows->spans);
    stv_free(rows->group_begin);
    stv_free(rows->selected);
    stv_free(rows->class_row);
    stv_free(rows->row_sample);
    stv_free(rows->row_position);
    *rows = (stv_image_rows){0};
}
