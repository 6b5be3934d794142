/* batch.h - trees of token segments as the packed rows, attention spans and targets that the decoder works on.
 *
 *      segment 0: A <image> B           rows   A i0 i1 .. iT-1 B | C D | E          one row for a token, T for an image
 *         |          |                  spans  segment 0: [0,T+2)
 *      segment 1: C D  segment 2: E            segment 1: [0,T+2) [T+2,T+4)  = one span, [0,T+4)
 *                                              segment 2: [0,T+2) [T+4,T+5)
 *      sequences: (0,1) (0,2)           row B predicts C in sequence 0 and E in sequence 1: one hidden row, two targets */
#ifndef STV_MODEL_BATCH_H
#define STV_MODEL_BATCH_H

#include "base/arena.h"
#include "model/params.h"
#include "ops/plan.h"

struct stv_batch {
    const stv_model *model; /* the one it was made for */
    stv_batch_view view;
    stv_attn_plan plan;        /* segments as given, one group for each tree */
    stv_targets targets;       /* grouped by predicting row */
    const int64_t *head_row;   /* (n_head_rows) ascending: the rows that predict or hold a label; the others need not leave the decoder */
    const int64_t *predicting; /* (targets.n_rows) which head row predicts each group */
    const int64_t *label;      /* (n_targets) which head row holds the label */
    int64_t n_head_rows;
    const int64_t *sequence_last_row; /* (Q) last row of the path; -1: the path has none */
    const uint64_t *image_sample;     /* (n_images) dropout key of the first segment that shows the image */
    stv_arena memory;                 /* owned: every array above */
};

#endif
