/* inputs.h - what comes into a pass besides the packed rows: checks of the options, and the tower's rows of a number of images. */
#ifndef STV_MODEL_INPUTS_H
#define STV_MODEL_INPUTS_H

#include "model/batch.h"

/* Images through the tower (and the projector): n_images, pixels. Errors: argument, state (unbound tensor). */
stv_status stv_inputs_check_images(const stv_model *model, const stv_forward_options *options, unsigned parts, bool all_layers);
/* A batch through the whole model. Errors: argument, shape, state. */
stv_status stv_inputs_check(const stv_model *model, const stv_batch *batch, const stv_forward_options *options);

/* The tower sees an image as P+1 rows, the class token first, and every row sees all rows of its image. */
typedef struct stv_image_rows {
    int64_t n_images, n_rows; /* rows: n_images * (P+1) */
    stv_attn_plan plan;
    stv_attn_segment *segments; /* (n_images), owned, like all below */
    stv_span *spans;            /* (n_images) */
    int64_t *group_begin;       /* (n_images+1) */
    int64_t *selected;          /* (n_images*T) rows that become features */
    int64_t *class_row;         /* (n_images) */
    uint64_t *row_sample;       /* (n_rows) dropout key: the sample that shows the image first */
    int32_t *row_position;      /* (n_rows) */
    int64_t capacity;           /* images there is room for */
} stv_image_rows;

/* Lays out n_images; image_sample (n_images), or NULL: the image's number. Grows only when more images come than ever before. Errors: memory. */
stv_status stv_image_rows_set(stv_image_rows *rows, const stv_vision_config *vision, int64_t n_images, const uint64_t *image_sample);
void stv_image_rows_free(stv_image_rows *rows);

#endif
