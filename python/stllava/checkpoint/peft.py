"""LoRA adapters as PEFT writes them: adapter_config.json beside adapter_model.safetensors or adapter_model.bin.

A LoRA layer computes y = W x + s * B (A x) with A (r, in), B (out, r) and s = alpha / r, or alpha / sqrt(r) for rsLoRA. With DoRA every
row of V = W + s B A is given the length that a vector m (out) says: y = (m / |V|) V x (arXiv 2402.09353).

PEFT 0.4 ignores configuration keys that it does not know, so that a DoRA adapter loads as plain LoRA with wrong results. We
write exactly the keys of 0.4 unless a newer feature is in use, and refuse every key that may change the maths.

Names in the settings may be regular expressions, of the modules as PEFT saw them: `resolved` turns them into plain names of ours.
Source: peft 0.21.2, `check_target_module_exists` (tuners/tuners_utils.py), `get_pattern_key` (utils/other.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import numpy as np

from stllava.checkpoint import atomic, name_pattern, names, strict_json
from stllava.checkpoint.index import Format, read_file, write_file
from stllava.checkpoint.tensor_file import FLOAT_DTYPES, TensorFile
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_LORA_RANK, MAX_NUMBER

CONFIG_FILE = "adapter_config.json"
MODEL_STEM = "adapter_model"

# Keys of peft 0.4 that this package only carries along. PEFT itself turns fan_in_fan_out off where it meets a torch.nn.Linear.
_CARRIED = {"auto_mapping": None, "fan_in_fan_out": False, "inference_mode": True, "revision": None}
# Newer keys whose every value is harmless while the feature that reads them is off, or which describe the file or the training only.
_HARMLESS = frozenset({"megatron_core", "peft_version", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
                       "lora_ga_config", "runtime_config", "ephemeral_gpu_offload", "velora_config"})
# Initialisations that leave the base as it is, so that the saved A and B are all there is to know.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_ROOT = "base_model.model."
ALL_LINEAR = "all-linear"

_UNSUPPORTED = {
    "lora_bias": "a bias on B has no place in a decoder without biases: merge the adapter with PEFT first",
    "trainable_token_indices": "single rows of the embedding: merge the adapter with PEFT first",
}
_TENSORS_OF = {"lora_B.bias": "lora_bias", "lora_embedding": "LoRA on an embedding", "trainable_tokens": "trainable_token_indices"}

T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of one adapter; the field names are PEFT's.

    r 1..65536, lora_alpha > 0, 0 <= lora_dropout < 1. `target_modules` and `exclude_modules` hold module-name endings such as
    "q_proj", or are one regular expression for whole names; target_modules "all-linear" is every linear module. `rank_pattern`
    and `alpha_pattern` map endings, which may be regular expressions, to their own r and alpha. `modules_to_save` names modules
    whose own weights the adapter replaces. `layers_pattern` are the lists that `layers_to_transform` counts in. Only bias "none"
    is supported. Raises ConfigError naming the key.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: frozenset[str] | str = frozenset()
    exclude_modules: frozenset[str] | str = frozenset()
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str = True
    extra: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType(_CARRIED), repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if type(rank) is not int or not 1 <= rank <= MAX_LORA_RANK:
                raise ConfigError(f"LoRA: {key} is {rank!r}, want an integer from 1 to {MAX_LORA_RANK}", field=key)
        for key, alpha in {"lora_alpha": self.lora_alpha,
                           **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}.items():
            if type(alpha) not in (int, float) or not 0 < alpha <= MAX_NUMBER:
                raise ConfigError(f"LoRA: {key} is {alpha!r}, want a positive number of at most {MAX_NUMBER:g}", field=key)
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"LoRA: lora_dropout is {self.lora_dropout!r}, want 0 <= p < 1", field="lora_dropout")
        for key in ("base_model_name_or_path", "task_type"):
            if not isinstance(getattr(self, key), str | None):
                raise ConfigError(f"LoRA: {key} is {getattr(self, key)!r}, want a text or null", field=key)
        if self.bias != "none":
            raise ConfigError(f"LoRA: bias is {self.bias!r}, supported: 'none'", field="bias")
        for key in ("use_rslora", "use_dora"):
            if type(getattr(self, key)) is not bool:
                raise ConfigError(f"LoRA: {key} is {getattr(self, key)!r}, want true or false", field=key)
        if self.init_lora_weights not in _PLAIN_INITS:
            raise ConfigError(f"LoRA: init_lora_weights is {self.init_lora_weights!r}, which also changes the base weights (PiSSA, "
                              "OLoRA, CorDA, LoftQ, LoRA-GA); convert the adapter to plain LoRA with PEFT first "
                              "(save_pretrained with path_initial_model_for_weight_conversion)", field="init_lora_weights")
        for key, expressions in (("rank_pattern", list(self.rank_pattern)), ("alpha_pattern", list(self.alpha_pattern)),
                                 ("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)):
            for expression in [expressions] if isinstance(expressions, str) else expressions if isinstance(expressions, list) else ():
                try:
                    name_pattern.matches(expression, "")
                except ConfigError as error:
                    raise ConfigError(f"LoRA: {key}: {error}", field=key) from error
        for key, plain in (("layers_pattern", self.layers_pattern), ("modules_to_save", self.modules_to_save)):
            if bad := [name for name in plain if _PLAIN_NAME.fullmatch(name) is None]:
                raise ConfigError(f"LoRA: {key} has {bad[0]!r}, want a plain module name", field=key)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON object of adapter_config.json (any PEFT version). Raises ConfigError for what would change the maths."""
        if (kind := values.get("peft_type", "LORA")) != "LORA":
            raise ConfigError(f"LoRA: peft_type is {kind!r}, supported: 'LORA'", field="peft_type")
        fields = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        arguments = {key: value for key, value in values.items() if key in fields}
        extra = {key: value for key, value in values.items() if key not in fields and key != "peft_type"}
        for key, value in extra.items():
            if key not in _HARMLESS and key not in _CARRIED and value not in (None, False, "") and value != [] and value != {}:
                what = _UNSUPPORTED.get(key, "this feature changes the result and is not supported")
                raise ConfigError(f"LoRA: {key} is {value!r}; {what}", field=key)
        _convert(arguments)
        return cls(**arguments, extra={**_CARRIED, **extra})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: the keys of peft 0.4, and a newer key only where its feature is used."""
        result: dict[str, Any] = {key: self.extra.get(key, default) for key, default in _CARRIED.items()}
        result |= {"r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "bias": self.bias,
                   "task_type": self.task_type, "base_model_name_or_path": self.base_model_name_or_path,
                   "init_lora_weights": self.init_lora_weights, "modules_to_save": list(self.modules_to_save) or None, "peft_type": "LORA"}
        result["target_modules"] = _names_or_expression(self.target_modules)
        result["layers_to_transform"] = None if self.layers_to_transform is None else list(self.layers_to_transform)
        result["layers_pattern"] = list(self.layers_pattern) or None
        newer = {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "rank_pattern": dict(self.rank_pattern),
                 "alpha_pattern": dict(self.alpha_pattern), "exclude_modules": _names_or_expression(self.exclude_modules)}
        return result | {key: value for key, value in newer.items() if value}

    @property
    def made_for(self) -> str:
        """End of a message about a tensor that does not fit."""
        return f"; it was made for {self.base_model_name_or_path[:200]!r}, is this another base?" if self.base_model_name_or_path else ""

    @property
    def is_plain(self) -> bool:
        """True if no setting is a regular expression: endings mean the same whatever the beginnings of names are."""
        expressions = [key for pattern in (self.rank_pattern, self.alpha_pattern) for key in pattern if not _PLAIN_NAME.fullmatch(key)]
        return not (expressions or isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str))

    def rank(self, module: str) -> int:
        """r of a module (canonical name, or any name with the same ending)."""
        return _lookup(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor s in y = W x + s B A x."""
        r, alpha = self.rank(module), _lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool:
        """True if the settings put an adapter on this linear module."""
        if _listed(self.exclude_modules, module) or self.saves(module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == ALL_LINEAR or _listed(self.target_modules, module)
        if self.layers_to_transform and module not in self.target_modules:
            lists = "|".join(map(re.escape, self.layers_pattern))
            layer = re.match(rf"(?:^|.*?\.)(?:{lists})\.(\d+)\." if lists else r".*?\.[^.]*\.(\d+)\.", module)
            if layer is None or int(layer[1]) not in self.layers_to_transform:
                return False
        return _listed(self.target_modules, module)

    def saves(self, name: str) -> bool:
        """True if `modules_to_save` names this module or tensor, or a module it lies in."""
        return any(f".{module}." in f".{name}." for module in self.modules_to_save)

    def resolved(self, modules: Mapping[str, str], saved: Iterable[str] = ()) -> Self:
        """The same settings in plain names of ours.

        modules: canonical linear module -> the name PEFT knew it by. saved: canonical modules that the file holds for `modules_to_save`.
        """
        targets = {module: name for module, name in modules.items() if self.targets(name)}
        endings = frozenset(module.rpartition(".")[2] for module in targets)
        whole = all(module in targets for module in modules if module.rpartition(".")[2] in endings)
        ranks = {module: self.rank(name) for module, name in targets.items()}
        alphas = {module: _lookup(self.alpha_pattern, name, self.lora_alpha) for module, name in targets.items()}
        return dataclasses.replace(
            self, target_modules=endings if whole else frozenset(targets), exclude_modules=frozenset(), layers_to_transform=None, layers_pattern=(),
            modules_to_save=tuple(saved), rank_pattern={module: rank for module, rank in ranks.items() if rank != self.r},
            alpha_pattern={module: alpha for module, alpha in alphas.items() if alpha != self.lora_alpha})


def _convert(arguments: dict[str, Any]) -> None:
    """JSON types -> field types, in place."""
    for key in ("rank_pattern", "alpha_pattern"):
        if arguments.get(key) is None:
            arguments.pop(key, None)
        elif not isinstance(arguments[key], dict):
            raise ConfigError(f"LoRA: {key} is {arguments[key]!r}, want {{module name: number}}", field=key)
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = arguments.get(key)
        if value is None or value == "":
            arguments.pop(key, None)
        elif isinstance(value, list) and all(isinstance(name, str) for name in value):
            arguments[key] = frozenset(value) if key in ("target_modules", "exclude_modules") else tuple(value)
        elif not isinstance(value, str) or key == "modules_to_save":
            raise ConfigError(f"LoRA: {key} is {value!r}, want a list of module names", field=key)
        elif key == "layers_pattern":
            arguments[key] = (value,)
    layers = arguments.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ConfigError(f"LoRA: layers_to_transform is {layers!r}, want a list of integers", field="layers_to_transform")
    arguments["layers_to_transform"] = None if layers is None else tuple(layers)


def _names_or_expression(value: frozenset[str] | str) -> list[str] | str:
    return value if isinstance(value, str) else sorted(value)


def _listed(value: frozenset[str] | str, module: str) -> bool:
    """PEFT's rule: a list has the module's name or its ending at a dot; an expression is for the whole name."""
    if isinstance(value, str):
        return name_pattern.matches(value, module)
    return any(module == name or module.endswith("." + name) for name in value)


def _lookup(pattern: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule: the first entry whose key is, or matches, the module's name or its ending at a dot."""
    for key, value in pattern.items():
        plain = key.replace("\\.", ".")
        if module == plain or module.endswith("." + plain):
            return value
        if _PLAIN_NAME.fullmatch(plain) is None and name_pattern.matches(rf"(.*\.)?({key})", module):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """One adapter directory: settings, canonical name -> array, and the file the arrays come from.

    `tensors` are A and B, of DoRA the magnitudes too; `saved` the weights of `modules_to_save`, which take the place of the base's;
    `known_as` maps the names of both to those that PEFT knew.
    """

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    path: Path
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    known_as: dict[str, str] = field(default_factory=dict)


def has_adapter(directory: str | os.PathLike[str]) -> bool:
    return (Path(directory) / CONFIG_FILE).exists()


def read_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """Raises ConfigError or FormatError naming the file and the key."""
    path = Path(directory) / CONFIG_FILE
    try:
        return LoraConfig.from_dict(strict_json.read_object(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", path=path, field=error.field) from error


def read_adapter(directory: str | os.PathLike[str], to_canonical: Callable[[str], str]) -> Adapter:
    """Read settings and tensors of one adapter directory; `names.from_decoder_adapter` or `names.from_tower_adapter`.

    Accepts f32, f16, bf16, f64. Raises FormatError for tensors of other kinds of adapters; shapes are checked by `check_pairs`.
    """
    directory = Path(directory)
    config = read_config(directory)
    found = next((directory / f"{MODEL_STEM}.{kind}" for kind in ("safetensors", "bin")
                  if (directory / f"{MODEL_STEM}.{kind}").exists()), None)
    if found is None:
        raise FormatError(f"{directory}: {CONFIG_FILE} is there, but neither {MODEL_STEM}.safetensors nor {MODEL_STEM}.bin",
                          path=directory)
    file = read_file(found)
    for key in file:
        _check_key(key, file)
    tensors = {to_canonical(key): array for key, array in file.items()}
    if len(tensors) != len(file):
        raise FormatError(f"{found}: two tensors of one name once prefixes are gone", path=found)
    saved = {name: array for name, array in tensors.items() if not names.is_lora(name)}
    if lacking := [module for module in config.modules_to_save if not any(f".{module}." in f".{key}." for key in file if not names.is_lora(key))]:
        raise FormatError(f"{found}: modules_to_save names {lacking[0]!r}, but no such tensor is there", path=found, field=lacking[0])
    return Adapter(config, {name: array for name, array in tensors.items() if name not in saved}, found, saved,
                   {to_canonical(key): names.from_peft(key) for key in file})


def _check_key(key: str, file: TensorFile) -> None:
    if not key.startswith(_ROOT):
        raise FormatError(f"{file.path}: key {key!r} does not start with {_ROOT!r}; not an adapter", path=file.path, field=key)
    if not names.is_lora(key) and ("lora_" in key or "trainable_tokens" in key):
        what = next((f" ({what})" for part, what in _TENSORS_OF.items() if part in key), "")
        raise FormatError(f"{file.path}: key {key!r}{what} is not a lora_A or lora_B weight, nor a lora_magnitude_vector; not supported",
                          path=file.path, field=key)
    if file.dtype(key) not in FLOAT_DTYPES:
        raise FormatError(f"{file.path}: {key} has dtype {file.dtype(key)}, want one of {', '.join(FLOAT_DTYPES)}", path=file.path,
                          field=key)


def check_pairs(adapter: Adapter, linears: names.Shapes, required: Callable[[str], bool]) -> None:
    """Check every tensor against the model: known module, none without the others, rank and widths; then that nothing is missing.

    `linears` maps adaptable modules to (out, in); `required(module)` says whether a targeted module must be present.
    Raises FormatError naming file and key.
    """
    config, tensors, path = adapter.config, adapter.tensors, adapter.path
    for name, array in tensors.items():
        module = names.lora_module(name)
        if module not in linears:
            raise FormatError(f"{path}: adapter for {module}, which this model does not have or cannot adapt{config.made_for}", path=path, field=name)
        (n_out, n_in), r = linears[module], config.rank(module)
        name_a, name_b = names.lora_pair(module)
        wanted: names.Shapes = {name_a: (r, n_in), name_b: (n_out, r)}
        if config.use_dora:
            wanted[names.lora_magnitude(module)] = (n_out,)
        for other in wanted:
            if other not in tensors:
                raise FormatError(f"{path}: {name} is there, but {other} is missing", path=path, field=other)
        if name not in wanted:
            raise FormatError(f"{path}: {name} is of DoRA, but {CONFIG_FILE} does not say use_dora", path=path, field=name)
        if array.shape != wanted[name]:
            raise FormatError(f"{path}: {name} has shape {array.shape}, want {wanted[name]} (rank {r}){config.made_for}", path=path, field=name)
    for module in linears:
        if config.targets(module) and required(module) and names.lora_pair(module)[0] not in tensors:
            raise FormatError(f"{path}: no adapter for {module}, which target_modules selects", path=path, field=module)


def write_adapter_files(directory: str | os.PathLike[str], config: LoraConfig, tensors: Mapping[str, np.ndarray],
                        to_file: Callable[[str], str], format: Format = "bin") -> None:
    """Write adapter_config.json and adapter_model.{bin,safetensors}; `tensors` under canonical names."""
    directory = Path(directory)
    write_file(directory / f"{MODEL_STEM}.{format}", {to_file(name): array for name, array in tensors.items()})
    atomic.write_bytes(directory / CONFIG_FILE, strict_json.dump_object(config.to_dict()))
