"""stllava_c: the C core of stllava. Models, batches of prefix trees, log-probs out, d-log-probs in; generation, losses, images."""

from ._core import (
    LOSS_TYPES, Batch, Error, Generator, Model, NumericError, Run, Tensor, TensorInfo, adamw_step, allocations, build_info, fill_uniform,
    get_num_threads, grad_norm, image_decode, image_preprocess, image_probe, image_resize_crop, preference_loss, sampling_probabilities,
    schedule, set_num_threads)

__all__ = [
    "LOSS_TYPES", "Batch", "Error", "Generator", "Model", "NumericError", "Run", "Tensor", "TensorInfo", "adamw_step", "allocations", "build_info",
    "fill_uniform", "get_num_threads", "grad_norm", "image_decode", "image_preprocess", "image_probe", "image_resize_crop", "preference_loss",
    "sampling_probabilities", "schedule", "set_num_threads"]
