"""LoRA adapters as PEFT writes them: adapter_config.json beside adapter_model.safetensors or adapter_model.bin.

A LoRA layer computes y = W x + s * B (A x) with A (r, in), B (out, r) and s = alpha / r, or alpha / sqrt(r) for rsLoRA.

PEFT 0.4 ignores configuration keys that it does not know, so that a DoRA adapter loads as plain LoRA with wrong results. We
write exactly the keys of 0.4 unless a newer feature is in use, and refuse every key that may change the maths.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import numpy as np

from stllava.checkpoint import atomic, names, strict_json
from stllava.checkpoint.index import Format, read_file, write_file
from stllava.checkpoint.tensor_file import FLOAT_DTYPES, TensorFile
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_LORA_RANK, MAX_NUMBER

CONFIG_FILE = "adapter_config.json"
MODEL_STEM = "adapter_model"

# Keys of peft 0.4 that this package only carries along.
_CARRIED = {"auto_mapping": None, "fan_in_fan_out": False, "inference_mode": True, "layers_pattern": None, "revision": None}
# Newer keys whose every value is harmless while the feature that reads them is off, or which describe the file only.
_HARMLESS = frozenset({"megatron_core", "peft_version", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
                       "lora_ga_config", "runtime_config", "ephemeral_gpu_offload"})
_MODULE_PATTERN = re.compile(r"[A-Za-z0-9_]+(\\?\.[A-Za-z0-9_]+)*")

T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """Settings of one adapter; the field names are PEFT's.

    r 1..65536, lora_alpha > 0, 0 <= lora_dropout < 1. `target_modules` holds module-name endings such as "q_proj" (a
    regular expression, as PEFT also allows, is kept as text but cannot be used to attach). `rank_pattern` and
    `alpha_pattern` map module-name endings to their own r and alpha. Only bias "none" is supported.
    Raises ConfigError naming the key.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: frozenset[str] | str = frozenset()
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    layers_to_transform: tuple[int, ...] | None = None
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
        if self.bias != "none":
            raise ConfigError(f"LoRA: bias is {self.bias!r}, supported: 'none'", field="bias")
        if type(self.use_rslora) is not bool:
            raise ConfigError(f"LoRA: use_rslora is {self.use_rslora!r}, want true or false", field="use_rslora")
        if self.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
            raise ConfigError(f"LoRA: init_lora_weights is {self.init_lora_weights!r}, which also changes the base weights (PiSSA, "
                              "OLoRA, CorDA, LoftQ); convert the adapter to plain LoRA with PEFT first", field="init_lora_weights")
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if bad := [key for key in pattern if _MODULE_PATTERN.fullmatch(key) is None]:
                raise ConfigError(f"LoRA: {name} has the key {bad[0]!r}, want a plain module name: regular expressions from files "
                                  "are not run", field=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the JSON object of adapter_config.json (any PEFT version). Raises ConfigError for what would change the maths."""
        if (kind := values.get("peft_type", "LORA")) != "LORA":
            raise ConfigError(f"LoRA: peft_type is {kind!r}, supported: 'LORA'", field="peft_type")
        fields = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        arguments = {key: value for key, value in values.items() if key in fields}
        extra = {key: value for key, value in values.items() if key not in fields and key != "peft_type"}
        for key, value in extra.items():
            known = key in _HARMLESS or (key in _CARRIED and key not in ("fan_in_fan_out", "layers_pattern"))
            if not known and value not in (None, False, "") and value != [] and value != {}:
                raise ConfigError(f"LoRA: {key} is {value!r}; this feature changes the result and is not supported", field=key)
        _convert(arguments)
        return cls(**arguments, extra={**_CARRIED, **extra})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: the keys of peft 0.4, and a newer key only where its feature is used."""
        result: dict[str, Any] = {key: self.extra.get(key, default) for key, default in _CARRIED.items()}
        result |= {"r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, "bias": self.bias,
                   "task_type": self.task_type, "base_model_name_or_path": self.base_model_name_or_path,
                   "init_lora_weights": self.init_lora_weights, "modules_to_save": None, "peft_type": "LORA"}
        result["target_modules"] = self.target_modules if isinstance(self.target_modules, str) else sorted(self.target_modules)
        result["layers_to_transform"] = None if self.layers_to_transform is None else list(self.layers_to_transform)
        newer = {"use_rslora": self.use_rslora, "rank_pattern": dict(self.rank_pattern), "alpha_pattern": dict(self.alpha_pattern)}
        return result | {key: value for key, value in newer.items() if value}

    def rank(self, module: str) -> int:
        """r of a module (canonical name, or any name with the same ending)."""
        return _lookup(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """Factor s in y = W x + s B A x."""
        r, alpha = self.rank(module), _lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def targets(self, module: str) -> bool:
        """True if `target_modules` and `layers_to_transform` select this module. Raises ConfigError for an expression."""
        if isinstance(self.target_modules, str):
            raise ConfigError(f"LoRA: target_modules is the expression {self.target_modules!r}; want a list of module names",
                              field="target_modules")
        if self.layers_to_transform is not None:
            layer = re.search(r"\.layers\.(\d+)\.", module)
            if layer is None or int(layer[1]) not in self.layers_to_transform:
                return False
        return any(module == name or module.endswith("." + name) for name in self.target_modules)


def _convert(arguments: dict[str, Any]) -> None:
    """JSON types -> field types, in place."""
    for key in ("rank_pattern", "alpha_pattern"):
        if arguments.get(key) is None:
            arguments.pop(key, None)
        elif not isinstance(arguments[key], dict):
            raise ConfigError(f"LoRA: {key} is {arguments[key]!r}, want {{module name: number}}", field=key)
    targets = arguments.get("target_modules")
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        arguments["target_modules"] = frozenset(targets)
    elif targets is None:
        arguments.pop("target_modules", None)
    elif not isinstance(targets, str):
        raise ConfigError(f"LoRA: target_modules is {targets!r}, want a list of module names", field="target_modules")
    layers = arguments.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise ConfigError(f"LoRA: layers_to_transform is {layers!r}, want a list of integers", field="layers_to_transform")
    arguments["layers_to_transform"] = None if layers is None else tuple(layers)


def _lookup(pattern: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule: the first entry whose key is the module's name or its ending at a dot."""
    for key, value in pattern.items():
        plain = key.replace("\\.", ".")
        if module == plain or module.endswith("." + plain):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """One adapter directory: settings, canonical name -> array, and the file the arrays come from."""

    config: LoraConfig
    tensors: dict[str, np.ndarray]
    path: Path


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

    Accepts f32, f16, bf16, f64. Raises FormatError for keys other than LoRA pairs; shapes are checked by `check_pairs`.
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
    return Adapter(config, {to_canonical(key): array for key, array in file.items()}, found)


def _check_key(key: str, file: TensorFile) -> None:
    if not key.startswith("base_model.model."):
        raise FormatError(f"{file.path}: key {key!r} does not start with 'base_model.model.'; not an adapter", path=file.path, field=key)
    if not names.is_lora(key):
        what = " (DoRA)" if "lora_magnitude_vector" in key else " (modules_to_save)" if "lora_" not in key else ""
        raise FormatError(f"{file.path}: key {key!r}{what} is not a lora_A or lora_B weight; not supported", path=file.path, field=key)
    if file.dtype(key) not in FLOAT_DTYPES:
        raise FormatError(f"{file.path}: {key} has dtype {file.dtype(key)}, want one of {', '.join(FLOAT_DTYPES)}", path=file.path,
                          field=key)


def check_pairs(adapter: Adapter, linears: names.Shapes, required: Callable[[str], bool]) -> None:
    """Check every tensor against the model: known module, both halves, rank and widths; then that nothing is missing.

    `linears` maps adaptable modules to (out, in); `required(module)` says whether a targeted module must be present.
    Raises FormatError naming file and key.
    """
    config, tensors, path = adapter.config, adapter.tensors, adapter.path
    for name, array in tensors.items():
        module = names.lora_module(name)
        if module not in linears:
            raise FormatError(f"{path}: adapter for {module}, which this model does not have or cannot adapt", path=path, field=name)
        (n_out, n_in), r = linears[module], config.rank(module)
        name_a, name_b = names.lora_pair(module)
        for half in (name_a, name_b):
            if half not in tensors:
                raise FormatError(f"{path}: {name} is there, but {half} is missing", path=path, field=half)
        want = (r, n_in) if name == name_a else (n_out, r)
        if array.shape != want:
            raise FormatError(f"{path}: {name} has shape {array.shape}, want {want} (rank {r})", path=path, field=name)
    if isinstance(config.target_modules, str):
        return
    for module in linears:
        if config.targets(module) and required(module) and names.lora_pair(module)[0] not in tensors:
            raise FormatError(f"{path}: no adapter for {module}, which target_modules selects", path=path, field=module)


def write_adapter_files(directory: str | os.PathLike[str], config: LoraConfig, tensors: Mapping[str, np.ndarray],
                        to_file: Callable[[str], str], format: Format = "bin") -> None:
    """Write adapter_config.json and adapter_model.{bin,safetensors}; `tensors` under canonical names."""
    directory = Path(directory)
    write_file(directory / f"{MODEL_STEM}.{format}", {to_file(name): array for name, array in tensors.items()})
    atomic.write_bytes(directory / CONFIG_FILE, strict_json.dump_object(config.to_dict()))
