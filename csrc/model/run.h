/* run.h - one arena and what the last forward left in it. */
#ifndef STV_MODEL_RUN_H
#define STV_MODEL_RUN_H

#include "base/arena.h"
#include "model/door.h"
#include "model/params.h"

typedef enum stv_run_holds { STV_RUN_NOTHING, STV_RUN_BATCH, STV_RUN_VISION, STV_RUN_PROJECTOR } stv_run_holds;

struct stv_llava_pass; /* one for each precision */

struct stv_run {
    stv_model *model;
    stv_arena arena, side;              /* owned; side: scratch of calls that come after a forward */
    struct stv_llava_pass *pass, *plan; /* owned; plan: of measuring runs */
    int64_t n_vision_recompute, n_decoder_recompute;
    stv_run_holds holds; /* which forward the arena belongs to */
    bool can_backward;
    uint64_t layout; /* of the model at that forward */
    int n_threads;   /* at that forward: scratch was measured for them */
    /* views into the arena, NULL unless `holds` has them */
    const double *logp, *mean_logit, *cluster_margin;
    const int32_t *cluster_assignment;
    const void *features, *embeddings, *vision_features, *vision_pooled, *projector_output;
};

#endif
