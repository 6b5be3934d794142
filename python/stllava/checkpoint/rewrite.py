"""A checkpoint written anew from its files, one tensor at a time: merged with its adapters, in another layout, format or dtype.

The source stays on its memory maps, so that 13 GB need no 13 GB of memory. `LlavaModel.merge_and_unload` and `save_pretrained` are the same for a
model in memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from stllava import config_hf
from stllava.checkpoint import atomic, names
from stllava.checkpoint.directory import Checkpoint, Layout, write_full
from stllava.checkpoint.hf_processor import image_token_of_files, picture_settings, write_processor
from stllava.checkpoint.index import DEFAULT_SHARD_BYTES, Format
from stllava.checkpoint.lock import LOCK
from stllava.checkpoint.rounding import RoundingError, TargetDtype, rounded, target_dtypes
from stllava.checkpoint.tensor_file import Deferred, Tensor, row_norms, to_float32
from stllava.errors import ConfigError
from stllava.images import ImageProcessor
from stllava.limits import MAX_DATA_BYTES
from stllava.paths import read_regular

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OTHER_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json")


@dataclasses.dataclass(frozen=True)
class Target:
    """How to write. dtype "keep" is every tensor's own; shard_size in bytes."""

    layout: Layout = "llava"
    dtype: TargetDtype = "keep"
    format: Format = "safetensors"
    shard_size: int = DEFAULT_SHARD_BYTES


def rewrite(checkpoint: Checkpoint, sources: Iterable[str | os.PathLike[str] | None], out: str | os.PathLike[str],
            target: Target) -> dict[str, RoundingError]:
    """Write a complete directory `out`, adapters merged; tokenizer and other small files come from the first of `sources` that has them.

    Returns the largest rounding errors by part, for tensors whose dtype changed: of W + s B A where adapters were merged. Whatever fails, `out`
    is as it was.

    Raises:
        ConfigError: `out` holds something else already, or the model has no form in that layout. NumericsError: a value that is not finite, or
        too large for the dtype; the tensor is named. OSError: the disk.
    """
    out, folders = Path(out), [Path(source) for source in sources if source is not None]
    if any(out.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"{out}: is where the checkpoint is read from; choose another directory", field="out")
    if out.exists() and not (out.is_dir() and ({path.name for path in out.iterdir()} <= {LOCK} or (out / atomic.MANIFEST).exists())):
        raise ConfigError(f"{out}: holds something that stllava did not write; choose a new directory", field="out")
    errors: dict[str, RoundingError] = {}
    with atomic.atomic_directory(out) as directory:
        _copy_small_files(checkpoint, folders, directory)
        config = checkpoint.config if target.layout == "llava" else config_hf.with_image_token(checkpoint.config, image_token_of_files(directory))
        tensors = rounded(merged_tensors(checkpoint), target_dtypes(checkpoint.tensors, target.dtype), errors)
        write_full(directory, config, tensors, target.shard_size, target.format, target.layout)
        if target.layout == "hf":
            write_processor(directory, config_hf.padded(config))
    return errors


def merged_tensors(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Canonical name -> tensor: the base's own, and float32 W + s B A where an adapter sits, of DoRA with rows as long as it says, made when written.

    Source: PEFT `Linear.merge`, which computes in float32 for half-precision weights on the CPU.
    """
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    for module in {names.lora_module(name) for name in checkpoint.lora}:
        tensors[module + ".weight"] = _merged(checkpoint, module)
    return tensors


def _merged(checkpoint: Checkpoint, module: str) -> Deferred:
    weight = checkpoint.tensors[module + ".weight"]
    config = checkpoint.lora_configs[names.is_tower(module)]
    assert config is not None  # read together with the tensors

    def make() -> np.ndarray:
        a, b = (to_float32(checkpoint.lora[name]) for name in names.lora_pair(module))
        result: np.ndarray = b @ a
        result *= np.float32(config.scaling(module))
        result += to_float32(weight)
        if config.use_dora:
            result *= (to_float32(checkpoint.lora[names.lora_magnitude(module)]) / row_norms(result))[:, None]
        return result

    return Deferred(np.dtype("<f4"), weight.shape, make)


def _copy_small_files(checkpoint: Checkpoint, folders: list[Path], directory: Path) -> None:
    """A tokenizer's files belong together, so all come from one folder."""
    tokenizer = next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZER_FILES[:2])), None)
    wanted = [] if tokenizer is None else [tokenizer / name for name in _TOKENIZER_FILES]
    wanted += [next((folder / name for folder in folders if (folder / name).is_file()), directory / name) for name in _OTHER_FILES]
    for file in wanted:
        if file.is_file():
            atomic.write_bytes(directory / file.name, read_regular(file, MAX_DATA_BYTES))
    if (vision := checkpoint.config.vision) is not None:
        aspect = checkpoint.config.image_aspect_ratio
        settings = next((folder for folder in folders if picture_settings(folder) is not None), None)
        processor = ImageProcessor(size=vision.image_size, aspect=aspect) if settings is None else ImageProcessor.from_pretrained(settings, aspect)
        processor.save_pretrained(directory)
