"""Training: one loop, two objectives.

    arguments   what a user sets, with Hugging Face's names        groups      names -> parameter groups -> ranges of the flat buffer
    script      the original scripts' settings: model and data      setup       the model that they describe
    resolve     what was given -> settings                          no_effect   settings without meaning here, and what happens instead
    from_script what scripts of transformers and TRL set and give
    deepspeed   DeepSpeed's JSON file                               manifest    the record of a run, for `stllava rerun`
    plan        which samples every update sees                     update      micro-batches -> gradients -> clipped AdamW step
    sft, dpo    a micro-batch, its loss, d loss / d log-prob        loop        the Trainer: progress, logs, evaluation, saving, resume
    state       checkpoints that are complete or not there          guard       fails a run that trains nothing
    output      the model's files, as the original leaves them      schedule    the learning rate at every update
    callbacks   hooks into the loop; early stopping                 trackers    TensorBoard and Weights & Biases
    terminate   SIGTERM: one last checkpoint
"""
