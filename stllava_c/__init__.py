"""stllava_c: the C core of stllava. Models, batches of prefix trees, log-probs out, d-log-probs in; generation, losses, images."""

import os as _os

import numpy as _numpy  # noqa: F401  first, so that its own OpenBLAS starts with the user's settings

_threads = _os.environ.get("OPENBLAS_NUM_THREADS")
_os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the core calls OpenBLAS from its own threads; it must not start any
try:
    from ._core import (  # noqa: I001 - a paragraph of names
        LOSS_TYPES, Batch, Error, Generator, Model, NumericError, Run, Tensor, TensorInfo, adamw_step, allocations, build_info, fill_uniform,
        get_num_threads, grad_norm, image_decode, image_preprocess, image_probe, image_resize_crop, preference_loss, sampling_probabilities,
        schedule, set_num_threads)
finally:
    if _threads is None:
        del _os.environ["OPENBLAS_NUM_THREADS"]
    else:
        _os.environ["OPENBLAS_NUM_THREADS"] = _threads

__all__ = [
    "LOSS_TYPES", "Batch", "Error", "Generator", "Model", "NumericError", "Run", "Tensor", "TensorInfo", "adamw_step", "allocations", "build_info",
    "fill_uniform", "get_num_threads", "grad_norm", "image_decode", "image_preprocess", "image_probe", "image_resize_crop", "preference_loss",
    "sampling_probabilities", "schedule", "set_num_threads"]
