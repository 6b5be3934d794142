/* resize.h - Pillow's bicubic resize with antialias, bit for bit, of a window of a picture that may sit on a larger canvas.
 *
 * "Pillow" is what the models were trained with, up to version 12: always the horizontal pass first. Pillow 13 takes the vertical
 * one first when a picture shrinks clearly more in height than in width (its pull request 9549): one grey level in a fifth of the
 * pixels of a tall photograph, up to 31 levels in noise. We do not follow.
 *
 *   canvas (background colour)          resized canvas              window
 *   +-----------------+                 +-----------+               +-------+
 *   |   +--------+    |    bicubic      |           |    crop       |       |
 *   |   | picture|    |   -------->     |  |window| |  -------->    |       |  rows handed to emit, top to bottom
 *   |   +--------+    |                 |           |               |       |
 *   +-----------------+                 +-----------+               +-------+
 *
 * Neither the canvas nor the part of the resized canvas outside the window is ever built. */
#ifndef STV_IMAGE_RESIZE_H
#define STV_IMAGE_RESIZE_H

#include "base/status.h"

#include <stdint.h>

typedef struct stv_resize {
    const uint8_t *rgb; /* (height_px, width_px, 3), borrowed during the call */
    int width_px, height_px;
    int canvas_width_px, canvas_height_px, left_px, top_px; /* where the picture lies on the canvas */
    uint8_t background[3];
    int resized_width_px, resized_height_px;                              /* the whole canvas becomes this */
    int window_left_px, window_top_px, window_width_px, window_height_px; /* of which this part is computed */
} stv_resize;

/* rgb: window_width_px * 3 bytes, valid during the call. Rows come in order. */
typedef void stv_resize_emit(void *arg, int row, const uint8_t *rgb);

/* One scratch allocation, about height_px * window_width_px * 3 bytes. The caller has checked that the picture lies on the
 * canvas and the window in the resized canvas (asserted). Errors: memory.
 * Source: Pillow src/libImaging/Resample.c (ImagingResample, 8 bits per channel, filter BICUBIC). */
stv_status stv_image_resize(const stv_resize *job, stv_resize_emit *emit, void *arg);

#endif
