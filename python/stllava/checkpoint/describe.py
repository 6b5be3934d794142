"""What a directory or a weight file holds and what would be loaded from it, from headers alone: no weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stllava import config_hf
from stllava.checkpoint import atomic, names, peft
from stllava.checkpoint.adapters import VIT_LORA
from stllava.checkpoint.directory import Checkpoint, read_checkpoint
from stllava.checkpoint.index import has_weights, read_file, read_weights
from stllava.checkpoint.peft import LoraConfig
from stllava.checkpoint.strict_json import read_object
from stllava.checkpoint.tensor_file import dtype_name
from stllava.config_fields import CONFIG_FILE
from stllava.errors import FormatError, StllavaError

WEIGHT_SUFFIXES = (".safetensors", ".bin")
BYTES_PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass
class Row:
    """Tensors of one part, in one dtype, from one file."""

    part: str
    file: str
    dtype: str
    n_tensors: int = 0
    n_values: int = 0
    n_bytes: int = 0


@dataclass
class Description:
    """form, why: what the directory is and how that was told. problem: why it cannot be loaded, None if it can.

    rows: what would be loaded, or what is there where it cannot. memory: bytes of the weights and adapters at each dtype.
    """

    path: str
    form: str
    why: str
    problem: str | None = None
    rows: list[Row] = field(default_factory=list)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)


def describe(path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None,
             vision_tower: str | os.PathLike[str] | None = None) -> Description:
    """Raises FormatError or OSError where there is nothing to describe; what only stands against loading is the description's `problem`."""
    path = Path(path)
    if path.suffix == ".gguf":
        found = _describe_gguf(path, None if vision_tower is None else Path(vision_tower))
        found.memory = _memory(found)
        return found
    if path.is_file():
        found = Description(str(path), "a weight file", f"its name ends in {path.suffix}")
        file = read_file(path)
        _add_tensors(found, file, dict.fromkeys(file, path))
        return found
    path = atomic.current(path)
    if not path.is_dir():
        raise FormatError(f"{path}: no such file or directory", path=path)
    form, why = _form(path)
    found = Description(str(path), form, why)
    if form == _TOWER:
        for file in read_weights(path):
            _add_tensors(found, {names.from_tower(name) or name: array for name, array in file.items()}, {}, str(file.path))
        return found
    try:
        checkpoint = read_checkpoint(path, model_base, vision_tower, check_finite=False)
    except StllavaError as error:
        found.problem = str(error)
        _add_files(found, path)
        return found
    found.ignored, found.notes = checkpoint.ignored, checkpoint.notes
    _add_tensors(found, checkpoint.tensors | checkpoint.lora, checkpoint.sources)
    _add_adapters(found, checkpoint)
    found.memory = _memory(found)
    return found


def _memory(found: Description) -> dict[str, int]:
    n_values = sum(row.n_values for row in found.rows) if found.problem is None else 0
    return {dtype: n_values * size for dtype, size in BYTES_PER_VALUE.items()} if n_values else {}


_TOWER = "a vision tower"


def _form(path: Path) -> tuple[str, str]:
    """(what it is, which files say so), by the rules of `read_checkpoint`."""
    values = read_object(path / CONFIG_FILE) if (path / CONFIG_FILE).exists() else {}
    if has_weights(path):
        if str(values.get("model_type")).startswith("clip"):
            return _TOWER, f"weights and {CONFIG_FILE} of model_type {values['model_type']}"
        if config_hf.is_hf(values):
            return "full weights in Hugging Face's layout", f"weights and {CONFIG_FILE} with a text_config, as LlavaForConditionalGeneration has"
        if values.get("mm_vision_tower") is None:
            return "a decoder alone", f"weights and {CONFIG_FILE} without mm_vision_tower"
        return "full weights in LLaVA's layout", f"weights and {CONFIG_FILE} with mm_vision_tower"
    adapters = [str(folder.relative_to(path) / peft.CONFIG_FILE) for folder in (path, path / VIT_LORA) if peft.has_adapter(folder)]
    if adapters:
        return "adapters on a base", f"no weights, but {' and '.join(adapters)}"
    return "trained parts on a base", "neither weights nor adapter_config.json"


def _describe_gguf(path: Path, mmproj: Path | None) -> Description:
    """From the table of tensors; blocks stay packed here, but are f32 once they are loaded."""
    from stllava.checkpoint import gguf_container, gguf_file, gguf_mmproj
    file = gguf_container.read(path)
    architecture = file.metadata.get("general.architecture")
    found = Description(str(path), "a GGUF file of llama.cpp", f"its name ends in .gguf, general.architecture is {architecture}")
    try:
        config = gguf_file.read_config(file)
        places = [(gguf_file.from_gguf(file, name) or name, file, name) for name in file.tensors]
        if mmproj is not None:
            tower = gguf_container.read(mmproj)
            config = gguf_mmproj.add_vision(config, tower)
            places += [(canonical, tower, name) for canonical, name in gguf_mmproj.canonical_names(config, tower)]
    except StllavaError as error:
        found.problem = str(error)
        places = [(name, file, name) for name in file.tensors]
    for canonical, source, name in places:
        entry = source.tensors[name]
        _add_tensor(found, canonical, entry.shape, entry.kind, entry.n_bytes, str(source.path))
    return found


def _add_tensors(found: Description, tensors: Mapping[str, np.ndarray], sources: Mapping[str, Path], file: str = "") -> None:
    for name, array in tensors.items():
        _add_tensor(found, name, array.shape, dtype_name(array), array.nbytes, str(sources.get(name, file)))


def _add_tensor(found: Description, name: str, shape: tuple[int, ...], dtype: str, n_bytes: int, file: str) -> None:
    part = names.part_of(names.from_hf(name.removeprefix("base_model.model."))) + (", adapter" if "lora_" in name else "")
    row = next((row for row in found.rows if (row.part, row.file, row.dtype) == (part, file, dtype)), None)
    if row is None:
        found.rows.append(row := Row(part, file, dtype))
    row.n_tensors, row.n_values, row.n_bytes = row.n_tensors + 1, row.n_values + math.prod(shape), row.n_bytes + n_bytes
    found.tensors.append({"name": name, "shape": list(shape), "dtype": dtype, "file": file})


def _add_files(found: Description, path: Path) -> None:
    """Every weight file that can be read by itself."""
    for file in sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file()):
        try:
            tensors = read_file(file)
        except (StllavaError, OSError) as error:
            found.notes.append(str(error))
        else:
            _add_tensors(found, tensors, {}, str(file))


def _add_adapters(found: Description, checkpoint: Checkpoint) -> None:
    for part, config in zip(("decoder", "vision tower"), checkpoint.lora_configs, strict=True):
        if config is not None:
            modules = {names.lora_module(name) for name in checkpoint.lora if names.part_of(name) == part}
            found.adapters.append({"part": part, "n_modules": len(modules), **_settings(config)})


def _settings(config: LoraConfig) -> dict[str, Any]:
    values = config.to_dict()
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
            "exclude_modules", "base_model_name_or_path")
    return {key: values[key] for key in keys if values.get(key) is not None}
