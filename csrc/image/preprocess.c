/* preprocess.c - decoded picture -> what the vision tower reads: pad to a square or not, resize the shorter edge, cut the
 * centre, scale, normalise.
 *
 * Source: LLaVA expand2square; Transformers 4.31 CLIPImageProcessor (resize, center_crop, rescale, normalize). Unlike the
 * latter, a picture is always (height, width, 3): heights 1 and 3 are not mistaken for channels. */
#include "stllava.h"

#include "image/decode.h"
#include "image/resize.h"

#include <math.h>
#include <string.h>

static stv_status check(int width_px, int height_px, const stv_image_options *options)
{
    if (width_px < 1 || height_px < 1 || width_px > STV_IMAGE_MAX_SIDE_PX || height_px > STV_IMAGE_MAX_SIDE_PX)
        return stv_fail(STV_ERR_ARGUMENT, "image: width and height want 1..%d pixels, found %dx%d", STV_IMAGE_MAX_SIDE_PX, width_px, height_px);
    if (options->size_px < 1 || options->size_px > STV_IMAGE_MAX_SIZE_PX)
        return stv_fail(STV_ERR_ARGUMENT, "image: size wants 1..%d pixels, found %d", STV_IMAGE_MAX_SIZE_PX, options->size_px);
    return STV_OK;
}

/* The shorter edge becomes `size`, the longer one is truncated; the centre is rounded up-left. */
static stv_resize plan(const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options)
{
    const int size = options->size_px, side = width_px > height_px ? width_px : height_px;
    stv_resize job = {.rgb = rgb, .width_px = width_px, .height_px = height_px, .canvas_width_px = width_px, .canvas_height_px = height_px};
    if (options->pad) {
        job.canvas_width_px = job.canvas_height_px = side;
        job.left_px = (side - width_px) / 2;
        job.top_px = (side - height_px) / 2;
        memcpy(job.background, options->background, sizeof job.background);
    }
    const int w = job.canvas_width_px, h = job.canvas_height_px, shorter = w < h ? w : h;
    job.resized_width_px = (int)((int64_t)size * w / shorter);
    job.resized_height_px = (int)((int64_t)size * h / shorter);
    job.window_left_px = (job.resized_width_px - size) / 2;
    job.window_top_px = (job.resized_height_px - size) / 2;
    job.window_width_px = job.window_height_px = size;
    return job;
}

typedef struct byte_sink {
    uint8_t *hwc;
    size_t row_bytes;
} byte_sink;

static void store_bytes(void *arg, int row, const uint8_t *rgb)
{
    const byte_sink *sink = arg;
    memcpy(sink->hwc + (size_t)row * sink->row_bytes, rgb, sink->row_bytes);
}

stv_status stv_image_resize_crop(uint8_t *hwc, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options)
{
    STV_TRY(check(width_px, height_px, options));
    const stv_resize job = plan(rgb, width_px, height_px, options);
    byte_sink sink = {.hwc = hwc, .row_bytes = (size_t)options->size_px * 3};
    return stv_image_resize(&job, store_bytes, &sink);
}

typedef struct float_sink {
    float *chw;
    size_t size;
    float value[3][256]; /* of every byte, per channel */
} float_sink;

static void store_floats(void *arg, int row, const uint8_t *rgb)
{
    const float_sink *sink = arg;
    for (int c = 0; c < 3; c++) {
        float *out = sink->chw + ((size_t)c * sink->size + (size_t)row) * sink->size;
        for (size_t x = 0; x < sink->size; x++) out[x] = sink->value[c][rgb[3 * x + (size_t)c]];
    }
}

stv_status stv_image_preprocess(float *chw, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options)
{
    STV_TRY(check(width_px, height_px, options));
    float_sink sink = {.chw = chw, .size = (size_t)options->size_px};
    for (int c = 0; c < 3; c++) {
        const float mean = options->mean[c], std = options->std[c];
        if (!isfinite(mean) || !isfinite(std) || !(std > 0))
            return stv_fail(STV_ERR_ARGUMENT, "image: channel %d wants a finite mean and std > 0, found mean %g, std %g", c, (double)mean,
                            (double)std);
        /* the reference multiplies by the factor written in its configuration, in double, and goes on in float */
        for (int byte = 0; byte < 256; byte++) sink.value[c][byte] = ((float)(byte * 0.00392156862745098) - mean) / std;
    }
    const stv_resize job = plan(rgb, width_px, height_px, options);
    return stv_image_resize(&job, store_floats, &sink);
}
