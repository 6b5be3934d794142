/* preprocess.h - decoded picture -> what the vision tower reads: pad to a square or not, resize the shorter edge, cut the
 * centre, scale, normalise.
 *
 * Source: LLaVA expand2square; Transformers 4.31 CLIPImageProcessor (resize, center_crop, rescale, normalize). Unlike the
 * latter, a picture is always (height, width, 3): heights 1 and 3 are not mistaken for channels. */
#ifndef STV_IMAGE_PREPROCESS_H
#define STV_IMAGE_PREPROCESS_H

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#define STV_IMAGE_MAX_SIZE_PX 4096 /* of the model's square input */

typedef struct stv_image_options {
    int size_px;
    bool pad;              /* pad to a square first; false: long sides are cropped away */
    uint8_t background[3]; /* of the padding */
    float mean[3], std[3]; /* of pixels in 0..1; std > 0 */
} stv_image_options;

/* hwc (S,S,3) with S = size_px: the picture the model sees, the same bytes as Pillow's. rgb (height_px, width_px, 3); hwc
 * overlaps nothing. mean and std are not read. One scratch allocation. Errors: argument, memory. */
stv_status stv_image_resize_crop(uint8_t *hwc, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options);

/* chw (3,S,S) = (pixel/255 - mean) / std of the same picture. Errors: argument, memory. */
stv_status stv_image_preprocess(float *chw, const uint8_t *rgb, int width_px, int height_px, const stv_image_options *options);

#endif
