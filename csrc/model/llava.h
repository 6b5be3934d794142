/* llava.h - the whole model: images and packed rows in, log-probabilities of the targets out, and all of it upside down.
 *
 *   pixels -> tower -> projector -> features --+
 *                     row tokens -> embeddings +-> splice -> decoder -> rows that predict -> log-probabilities */
#ifndef STV_MODEL_LLAVA_H
#define STV_MODEL_LLAVA_H

#include "model/decoder.h"
#include "model/projector.h"
#include "model/vision.h"

#define stv_llava_create STV_TYPED(stv_llava_create)
#define stv_llava_free STV_TYPED(stv_llava_free)
#define stv_llava_init STV_TYPED(stv_llava_init)
#define stv_llava_encode STV_TYPED(stv_llava_encode)
#define stv_llava_rows STV_TYPED(stv_llava_rows)
#define stv_llava_forward STV_TYPED(stv_llava_forward)
#define stv_llava_backward STV_TYPED(stv_llava_backward)

/* Everything one forward leaves behind for its backward and for those who look at it. Parts point into it: it does not move. */
typedef struct stv_llava_pass {
    const stv_model *model;
    stv_image_rows image_rows; /* owned */
    real *norms;               /* (model->n_norms), owned; what forward leaves in them stays for backward, and for more rows */
    /* set by init */
    const stv_batch *batch; /* NULL: images only */
    stv_forward_options options;
    stv_weights weights, vision_weights; /* they differ in whether gradients are wanted */
    stv_dropout row_dropout, image_dropout;
    stv_vision_pass vision;
    stv_projector_pass projector;
    stv_decoder_pass decoder;
    /* left by forward, in the arena */
    bool tower_grad, features_grad; /* whether backward goes that far */
    real *features;                 /* (n_images*T, D); NULL without images */
    real *embeddings;               /* (R,D) entering the decoder */
    const real *stream;             /* (n_out,D) leaving it */
    stv_decoder_head targets;       /* the rows that predict */
    double *logp, *lse;             /* (n_targets), (rows that predict) */
    double *mean_logit;             /* (n_targets); NULL unless asked for */
} stv_llava_pass;

stv_status stv_llava_create(stv_llava_pass **out, const stv_model *model);
void stv_llava_free(stv_llava_pass *pass); /* takes NULL */

/* batch NULL: options->n_images images only. batch and options' pointers are borrowed until the pass is over. Errors: memory. */
stv_status stv_llava_init(stv_llava_pass *pass, const stv_batch *batch, const stv_forward_options *options);

void stv_llava_encode(stv_exec *x, stv_llava_pass *pass);  /* images to features */
void stv_llava_rows(stv_exec *x, stv_llava_pass *pass);    /* ... and through the decoder */
void stv_llava_forward(stv_exec *x, stv_llava_pass *pass); /* ... to log-probabilities */
/* dlogp (n_targets). */
void stv_llava_backward(stv_exec *x, const stv_llava_pass *pass, const double *dlogp);

#endif
