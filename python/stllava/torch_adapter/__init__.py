"""The core under torch (extra `[torch]`): a plain loop, transformers' Trainer and TRL's DPOTrainer train our models.

    module   LlavaModule: parameters that are views of the core's, forward and backward that are the core's
    data     our data sets as torch's, and batches of them
    dpo      TRL's DPOTrainer, told that the model computes log-probabilities itself (needs trl)
"""

from stllava.compat import import_torch

import_torch("stllava.torch_adapter")

from stllava.torch_adapter.data import TorchDataset, collate, collate_pairs  # noqa: E402 - not before torch is known to be here
from stllava.torch_adapter.module import LlavaModule  # noqa: E402

__all__ = ["LlavaModule", "TorchDataset", "collate", "collate_pairs"]
