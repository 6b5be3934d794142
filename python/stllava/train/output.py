"""The files of a trained model, as the original's scripts leave them.

    adapters               adapter_config.json, adapter_model.bin, non_lora_trainables.bin (projector), Vit-lora/, config.json
    tune_mm_mlp_adapter    mm_projector.bin, config.json (where the projector alone trains)
    full weights           pytorch_model*.bin, config.json

Tokenizer and image processor are beside them. With `save_safetensors` each .bin is a .safetensors file with the same keys.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stllava.checkpoint import directory, names
from stllava.checkpoint.index import Format
from stllava.model import LlavaModel

if TYPE_CHECKING:
    from .arguments import TrainingArguments

__all__ = ["write_model"]


def write_model(target: str | os.PathLike[str], model: LlavaModel, args: TrainingArguments) -> None:
    """Into an existing directory. Raises OSError."""
    format: Format = "safetensors" if args.save_safetensors else "bin"
    if model.config.extra.get("tune_mm_mlp_adapter") and not model.lora and all(map(names.is_projector, model.trainable)):
        directory.write_projector(target, model.config, {name: array for name, array in model.tensors().items() if names.is_projector(name)}, format)
        model.write_processors(target)
    else:
        model.write_files(target, format=format, repeat_vit_lora=args.repeat_vit_lora)
