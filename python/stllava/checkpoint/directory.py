"""Whole checkpoints: read every form the LLaVA family writes, and write the complete ones.

What a directory is, is told by the files in it, never by its name:

    full weights      model.safetensors, pytorch_model.bin or shards; decoder and projector, with or without the tower
    base + adapters   adapter_config.json (decoder), Vit-lora/ (tower), non_lora_trainables (projector) on top of model_base
    projector only    mm_projector.bin on top of model_base

Everything is checked against the configuration: names, shapes, dtypes, finite values. Names that are known to be useless are
dropped and listed in `Checkpoint.ignored`; every other unknown or missing name is an error.
Writers fill a directory; `with atomic_directory(path) as d: write_full(d, ...)` publishes it in one piece.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from stllava import config_hf
from stllava.checkpoint import atomic, names, peft, strict_json
from stllava.checkpoint.adapters import VIT_LORA, read_adapters
from stllava.checkpoint.hf_processor import pads
from stllava.checkpoint.index import DEFAULT_SHARD_BYTES, Format, has_weights, read_file, read_weights, write_file, write_weights
from stllava.checkpoint.peft import Adapter, LoraConfig
from stllava.checkpoint.rounding import mean_of_rows
from stllava.checkpoint.strict_json import read_object
from stllava.checkpoint.tensor_file import FLOAT_DTYPES, Deferred, Tensor, TensorFile, count_nonfinite, dtype_name, round_to, values_of
from stllava.config import LlavaConfig, VisionConfig, known_tower
from stllava.config_fields import CONFIG_FILE
from stllava.errors import ConfigError, FormatError, NumericsError

NON_LORA = "non_lora_trainables"
PROJECTOR_ONLY = "mm_projector"
CHECKED_BYTES = 2 * 2**30
PathLike = str | os.PathLike[str]
Layout = Literal["llava", "hf"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# What the original writes as auto_mapping of the tower's adapter.
_TOWER_MAPPING = {"base_model_class": "CLIPVisionTower", "parent_library": "llava.model.multimodal_encoder.clip_encoder"}
_TORCH_DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass
class Checkpoint:
    """A checkpoint in memory. Arrays are read-only views on memory maps (bf16 as uint16 bits), read when touched.

    `tensors` and `lora` map canonical names (see `names`) to arrays; `sources` maps both to their files; `lora_configs`
    is (decoder, tower), None where there is no adapter; `ignored` lists what was left out and why; `notes` is what the user
    should know.
    """

    config: LlavaConfig
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    lora: dict[str, np.ndarray] = field(default_factory=dict)
    lora_configs: tuple[LoraConfig | None, LoraConfig | None] = (None, None)
    sources: dict[str, Path] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, file: TensorFile, to_canonical: Callable[[str], str | None]) -> None:
        """Take all tensors of a file; a later file replaces what an earlier one gave."""
        for key in file:
            name = to_canonical(key)
            if name is None or (name == "lm_head.weight" and self.config.tie_word_embeddings):
                self.ignored.append(f"{file.path}: {key}: recomputed or tied, not a weight of this model")
                continue
            if file.dtype(key) not in FLOAT_DTYPES:
                raise FormatError(f"{file.path}: {key} has dtype {file.dtype(key)}, want one of {', '.join(FLOAT_DTYPES)}",
                                  path=file.path, field=key)
            self.tensors[name], self.sources[name] = file[key], file.path

    def drop(self, prefix: str, why: str) -> None:
        """Leave out tensors taken so far whose name starts with `prefix`."""
        for name in [name for name in self.tensors if name.startswith(prefix)]:
            self.ignored.append(f"{self.sources.pop(name)}: {name}: {why}")
            del self.tensors[name]


def read_checkpoint(model_path: PathLike, model_base: PathLike | None = None, vision_tower: PathLike | None = None, *,
                    check_finite: bool | None = None) -> Checkpoint:
    """Read a checkpoint of any form.

    Args:
        model_path: directory of the checkpoint.
        model_base: directory of the full weights under an adapter or projector; default: the directory that
            adapter_config.json names, if it exists here.
        vision_tower: directory of a CLIP tower, whose weights replace those inside the checkpoint; or a `config.json`,
            which only gives the geometry. Default: the checkpoint's own tower, else the directory its configuration
            names. Nothing is downloaded.
        check_finite: look at every value; NaN or infinite ones are an error. None: where they are together at most CHECKED_BYTES; of more, the first
            look would read the disk for as long as a copy, and a pass that meets such a value says so.

    Raises ConfigError, FormatError or NumericsError naming the file and the key; OSError from the system.
    """
    path = Path(model_path)
    if not path.is_dir():
        what = "is a file, want" if path.exists() else "no such directory, and nothing is downloaded; give"
        raise FormatError(f"{path}: {what} the directory of a checkpoint", path=path)
    has_adapters = peft.has_adapter(path) or peft.has_adapter(path / VIT_LORA)
    if has_weights(path):
        if has_adapters:
            raise FormatError(f"{path}: holds full weights and an adapter; whether the adapter is merged cannot be told. Move one "
                              "of them to a directory of its own", path=path)
        if model_base is not None:
            raise ConfigError(f"{path}: holds full weights, but model_base {model_base} is given too; leave one out", path=path)
        base = path
    else:
        base = _find_base(path, model_base, has_adapters)
    config, is_replaced = _read_config(path, base)
    checkpoint = Checkpoint(config)
    for file in read_weights(base):
        checkpoint.add(file, names.from_full)
    if base != path:
        _add_projector(checkpoint, path)
    if is_replaced:
        checkpoint.drop(names.TOWER, f"replaced by {config.mm_vision_tower}, with which {path} was trained")
    _add_tower(checkpoint, [path, base], vision_tower)
    check_shapes(checkpoint.config, shapes_of(checkpoint.tensors), checkpoint.sources, [path, base])
    if has_adapters:
        _add_adapters(checkpoint, path)
        _note_another_base(checkpoint, path, base)
    check_finite_values(checkpoint, check_finite)
    return checkpoint


def _find_base(path: Path, model_base: PathLike | None, has_adapters: bool) -> Path:
    if not has_adapters and _first(path, PROJECTOR_ONLY, NON_LORA) is None:
        raise FormatError(f"{path}: not a checkpoint: neither weights, adapter_config.json nor mm_projector.bin are there", path=path)
    if model_base is None and peft.has_adapter(path):
        model_base = peft.read_config(path).base_model_name_or_path
    if model_base is None or not Path(model_base).is_dir():
        which = "its base, which it does not name," if model_base is None else f"its base {str(model_base)!r}, which is not a directory here,"
        raise FormatError(f"{path}: holds only what was trained; {which} is needed: pass model_base=DIR", path=path)
    if not has_weights(model_base):
        raise FormatError(f"{model_base}: the base must hold full weights, there are none", path=model_base)
    return atomic.current(model_base)


def _read_config(path: Path, base: Path) -> tuple[LlavaConfig, bool]:
    """The checkpoint's own configuration, or its base's; where both exist they must describe the same decoder. And whether it names another tower."""
    own, other = path / CONFIG_FILE, base / CONFIG_FILE
    if not own.exists():
        return _with_aspect(LlavaConfig.from_pretrained(other), base), False
    config = _with_aspect(LlavaConfig.from_pretrained(own), path)
    is_replaced = False
    if other.exists() and other != own:
        base_config = LlavaConfig.from_pretrained(other)
        wanted = base_config.decoder_config()
        for key, value in config.decoder_config().items():
            if value != wanted[key]:
                raise ConfigError(f"{own}: {key} is {value!r}, but the base's {other} has {wanted[key]!r}", path=own, field=key)
        is_replaced = config.mm_vision_tower != base_config.mm_vision_tower
        if config.vision is None and not is_replaced:
            config = dataclasses.replace(config, vision=base_config.vision)
    return config, is_replaced


def _with_aspect(config: LlavaConfig, directory: Path) -> LlavaConfig:
    """Padding to a square is a key of LLaVA's configuration, but of the image processor in Hugging Face's layout."""
    if "image_aspect_ratio" in config.extra or not pads(directory):
        return config
    return dataclasses.replace(config, extra={**config.extra, "image_aspect_ratio": "pad"})


def _first(directory: Path, *stems: str) -> Path | None:
    candidates = (directory / f"{stem}.{kind}" for stem in stems for kind in ("safetensors", "bin"))
    return next((path for path in candidates if path.exists()), None)


def _add_projector(checkpoint: Checkpoint, path: Path) -> None:
    """A trained projector replaces the base's as a whole: the base's may be of another type."""
    found = _first(path, NON_LORA, PROJECTOR_ONLY)
    if found is None:
        return
    file = read_file(found)
    if found.stem == NON_LORA:
        mapping: Mapping[str, str] = names.from_non_lora(file)
    else:
        mapping = {key: names.from_projector_file(key) for key in file}
    if any(name.startswith(names.PROJECTOR) for name in mapping.values()):
        checkpoint.drop(names.PROJECTOR, f"replaced by {found}")
    checkpoint.add(file, mapping.__getitem__)


def _add_tower(checkpoint: Checkpoint, directories: list[Path], vision_tower: PathLike | None) -> None:
    """Find the tower's geometry and, unless the checkpoint holds them and no tower was asked for, its weights."""
    config = checkpoint.config
    if config.mm_vision_tower is None:
        if vision_tower is not None:
            raise ConfigError(f"vision_tower {vision_tower} is given, but {directories[0]} is a decoder without mm_vision_tower",
                              field="mm_vision_tower")
        return
    is_inside = any(name.startswith(names.TOWER) for name in checkpoint.tensors)
    named = config.mm_vision_tower
    found = Path(vision_tower) if vision_tower is not None else next(
        (place for place in (Path(named), *(d / named for d in directories), *(d.parent / named for d in directories))
         if (place / CONFIG_FILE).exists()), None)
    if found is not None and (vision_tower is not None or config.vision is None):
        vision: VisionConfig | None = VisionConfig.from_pretrained(found)
    else:
        vision = config.vision or known_tower(named)
    if vision is None:
        raise FormatError(f"{directories[0]}: mm_vision_tower {named!r} is not a directory here and its geometry is not known: pass "
                          "vision_tower=DIR (or a tower's config.json)", path=directories[0], field="mm_vision_tower")
    try:
        checkpoint.config = dataclasses.replace(config, vision=vision)
    except ConfigError as error:
        raise ConfigError(f"{directories[0]}: {error}", path=directories[0], field=error.field) from error
    if found is not None and found.is_dir() and (vision_tower is not None or not is_inside):
        checkpoint.drop(names.TOWER, f"replaced by {found}")
        for file in read_weights(found):
            checkpoint.add(file, names.from_tower)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_shapes(config: LlavaConfig, shapes: names.Shapes, sources: Mapping[str, Path], directories: list[Path]) -> None:
    """Names and shapes are those that `config` asks for; FormatError otherwise. sources, directories: where they are from, for the message."""
    expected = names.expected_shapes(config)
    if unknown := [name for name in shapes if name not in expected]:
        raise FormatError(f"{sources[unknown[0]]}: {len(unknown)} tensors that this model does not have, first {unknown[0]} (the "
                          "configuration asks for another architecture, or the file belongs to another model)",
                          path=sources[unknown[0]], field=unknown[0])
    missing = [name for name in expected if name not in shapes and not names.may_be_absent(name)]
    if missing:
        where = " and ".join(str(path) for path in dict.fromkeys(directories))
        hint = ""
        if missing[0].startswith(names.PROJECTOR):
            hint = f"; the projector lies in {NON_LORA} or {PROJECTOR_ONLY}.bin, which must be beside the adapter"
        elif missing[0].startswith(names.TOWER):
            hint = "; pass vision_tower=DIR"
        raise FormatError(f"{where}: {len(missing)} tensors are missing, first {missing[0]}{hint}", path=directories[0],
                          field=missing[0])
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise FormatError(f"{sources[name]}: {name} has shape {shape}, the configuration asks for {expected[name]}",
                              path=sources[name], field=name)


def _add_adapters(checkpoint: Checkpoint, path: Path) -> None:
    found = read_adapters(path, checkpoint.config)
    checkpoint.ignored += found.ignored
    for adapter in filter(None, (found.decoder, found.tower)):
        checkpoint.lora |= adapter.tensors
        checkpoint.sources |= dict.fromkeys(adapter.tensors, adapter.path)
    checkpoint.lora_configs = (found.decoder.config if found.decoder else None, found.tower.config if found.tower else None)
    for name, array in (found.decoder.saved if found.decoder else {}).items():
        assert found.decoder is not None
        _replace(checkpoint, name, array, found.decoder)


def _note_another_base(checkpoint: Checkpoint, path: Path, base: Path) -> None:
    """Directories are renamed and moved, so another name is no error; shapes that differ are one already."""
    config = checkpoint.lora_configs[0]
    made_for = config.base_model_name_or_path if config is not None else None
    if not made_for:
        return
    called = read_object(base / CONFIG_FILE).get("_name_or_path") if (base / CONFIG_FILE).exists() else None
    folders = [part.rpartition("--")[2] for part in base.resolve().parts[-3:]]  # models--NAME/snapshots/HASH in Hugging Face's cache
    if Path(made_for).name not in (Path(str(called)).name, *folders):
        checkpoint.notes.append(f"{path}: the adapter was made for {made_for[:200]!r}, the base is {base}; if those are other weights, "
                                "results are wrong")


def _replace(checkpoint: Checkpoint, name: str, array: np.ndarray, adapter: Adapter) -> None:
    """A weight of `modules_to_save` takes the place of the base's."""
    if name == "lm_head.weight" and checkpoint.config.tie_word_embeddings:
        raise FormatError(f"{adapter.path}: holds lm_head.weight, which this model ties to its embedding (tie_word_embeddings)", path=adapter.path,
                          field=name)
    old = checkpoint.tensors.get(name)
    if old is None or old.shape != array.shape:
        what = "which this model does not have" if old is None else f"of shape {array.shape}; the base's is {old.shape} ({checkpoint.sources[name]})"
        raise FormatError(f"{adapter.path}: replaces {name}, {what}{adapter.config.made_for}", path=adapter.path, field=name)
    checkpoint.ignored.append(f"{checkpoint.sources[name]}: {name}: replaced by {adapter.path}")
    checkpoint.tensors[name], checkpoint.sources[name] = array, adapter.path


def check_finite_values(checkpoint: Checkpoint, wanted: bool | None) -> None:
    """wanted: as `check_finite` of `read_checkpoint`."""
    if wanted is None:
        wanted = sum(array.nbytes for array in (checkpoint.tensors | checkpoint.lora).values()) <= CHECKED_BYTES
    if not wanted:
        return
    for name, array in (checkpoint.tensors | checkpoint.lora).items():
        if n := count_nonfinite(array):
            source = checkpoint.sources[name]
            raise NumericsError(f"{source}: {name} has {n} NaN or infinite values of {array.size}; the file is damaged or training "
                                "diverged (check_finite=False loads it anyway)", path=source, field=name)


def write_full(directory: PathLike, config: LlavaConfig, tensors: Mapping[str, Tensor],
               shard_size: int = DEFAULT_SHARD_BYTES, format: Format = "safetensors", layout: Layout = "llava") -> None:
    """Write config.json and full weights (canonical names; shards of at most `shard_size` bytes).

    `layout` "hf" writes what transformers' LlavaForConditionalGeneration loads: other names, and a vocabulary with rows for `<image>` and `<pad>`
    (see `config_hf.padded`). Raises FormatError if names or shapes differ from what `config` asks for, so that what is written can be read;
    ConfigError for a model that has no form in that layout.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r}: want one of {', '.join(LAYOUTS)}", field="layout")
    directory = _prepare(directory)
    check_shapes(config, shapes_of(tensors), dict.fromkeys(tensors, directory), [directory])
    dtype = _TORCH_DTYPES[dtype_name(tensors["model.embed_tokens.weight"])]
    if layout == "hf":
        config = config_hf.padded(config)
        values = config_hf.to_hf(config, dtype)
        tensors = {names.to_hf(name): _padded(array, config.vocab_size) if name in names.VOCABULARY else array for name, array in tensors.items()}
    else:
        values = config.to_dict() | {"torch_dtype": dtype}
    write_weights(directory, tensors, shard_size, format)
    atomic.write_bytes(directory / CONFIG_FILE, strict_json.dump_object(values))


def _padded(array: Tensor, n_rows: int) -> Tensor:
    """The matrix with rows added at its end, each the mean of the others: its logit is the mean of all logits, so that it is never the largest."""
    n, width = array.shape
    if n == n_rows:
        return array

    def make() -> np.ndarray:
        values = values_of(array)
        row = round_to(mean_of_rows(values), dtype_name(values))
        return np.concatenate([values, np.broadcast_to(row, (n_rows - n, width))])

    return Deferred(array.dtype, (n_rows, width), make)


def write_adapter(directory: PathLike, config: LlavaConfig, llm_lora: Mapping[str, np.ndarray],
                  vit_lora: Mapping[str, np.ndarray], projector: Mapping[str, np.ndarray],
                  lora_configs: tuple[LoraConfig | None, LoraConfig | None], format: Format = "bin", *,
                  saved: Mapping[str, np.ndarray] = MappingProxyType({}), compat: bool = False) -> None:
    """Write what training makes, complete: both adapters, non_lora_trainables and config.json, under canonical names.

    `saved` are the weights of the decoder adapter's `modules_to_save`, which go into its file. `compat` repeats the tower's
    adapter in the decoder's file, as the original does. An adapter whose configuration is None is not written. Raises
    FormatError if an adapter does not fit `config`.
    """
    directory = _prepare(directory)
    decoder_config, tower_config = lora_configs
    if decoder_config is not None:
        adapter = Adapter(decoder_config, dict(llm_lora), directory)
        peft.check_pairs(adapter, names.decoder_linears(config), lambda module: True)
        repeated = dict(vit_lora) if compat else {}
        _check_known(directory, saved, names.expected_shapes(config))
        peft.write_adapter_files(directory, decoder_config, {**llm_lora, **repeated, **saved}, names.to_decoder_adapter, format)
    if tower_config is not None:
        if config.vision is None:
            raise FormatError(f"{directory}: adapter of a vision tower, but config.vision is None", path=directory)
        adapter = Adapter(tower_config, dict(vit_lora), directory / VIT_LORA)
        peft.check_pairs(adapter, names.vision_linears(config.vision), lambda module: False)
        if tower_config.extra.get("auto_mapping") is None:
            tower_config = dataclasses.replace(tower_config, extra={**tower_config.extra, "auto_mapping": _TOWER_MAPPING})
        peft.write_adapter_files(_prepare(directory / VIT_LORA), tower_config, vit_lora, names.to_tower_adapter, format)
    _check_known(directory, projector, names.expected_shapes(config))
    write_file(directory / f"{NON_LORA}.{format}", {names.to_non_lora(name): array for name, array in projector.items()})
    config.save_pretrained(directory)


def write_projector(directory: PathLike, config: LlavaConfig, projector: Mapping[str, np.ndarray],
                    format: Format = "bin") -> None:
    """Write a projector-only checkpoint: mm_projector.{bin,safetensors} (canonical names) and config.json."""
    directory = _prepare(directory)
    _check_known(directory, projector, names.projector_shapes(config))
    write_file(directory / f"{PROJECTOR_ONLY}.{format}", projector)
    config.save_pretrained(directory)


def _check_known(directory: Path, tensors: Mapping[str, np.ndarray], shapes: names.Shapes) -> None:
    for name, array in tensors.items():
        if shapes.get(name) != array.shape:
            raise FormatError(f"{directory}: {name} has shape {array.shape}, the configuration asks for {shapes.get(name)}",
                              path=directory, field=name)


def _prepare(directory: PathLike) -> Path:
    return atomic.make_directory(directory)
