"""The adapters of one checkpoint: the decoder's, the tower's, and weights that an adapter replaces.

STLLaVA-Med keeps the tower's in a directory of their own, `Vit-lora`. PEFT on Hugging Face's LlavaForConditionalGeneration makes one adapter for
the whole model, under that model's names: it is split in two here, with its settings in canonical names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from stllava.checkpoint import names, peft
from stllava.checkpoint.peft import Adapter
from stllava.config import LlavaConfig
from stllava.errors import FormatError

VIT_LORA = "Vit-lora"


@dataclass
class Adapters:
    """What a directory adds to its base; tensors under canonical names, checked against the model."""

    decoder: Adapter | None = None
    tower: Adapter | None = None
    ignored: list[str] = field(default_factory=list)


def read_adapters(path: Path, config: LlavaConfig) -> Adapters:
    """Raises FormatError or ConfigError naming file and key."""
    found = Adapters()
    if peft.has_adapter(path):
        read = peft.read_adapter(path, names.from_decoder_adapter)
        own, others = (_part(read, of_tower) for of_tower in (False, True))
        if any(map(names.is_hf, read.known_as.values())):
            found = _of_whole_model(own, others, config)
        else:
            found.decoder = own
            # The original collects every lora_ parameter, so its decoder file repeats the tower's; no loader has ever used them.
            found.ignored = [f"{read.path}: {name}: adapters of the tower are read from {VIT_LORA} only" for name in others.tensors]
    if peft.has_adapter(path / VIT_LORA):
        if found.tower is not None:
            raise FormatError(f"{found.tower.path}: has adapters of the tower, and so has {path / VIT_LORA}; remove one of them", path=path)
        found.tower = peft.read_adapter(path / VIT_LORA, names.from_tower_adapter)
        if replaced := next(iter(found.tower.saved), None):
            raise FormatError(f"{found.tower.path}: {replaced} is not a lora_A or lora_B weight; the tower's adapter replaces no weights",
                              path=found.tower.path, field=replaced)
        if config.vision is not None and not found.tower.config.is_plain:
            found.tower = _resolved(found.tower, names.vision_linears(config.vision), _VISION_MODEL)
    _check(found, config)
    return found


_VISION_MODEL = names.TOWER + "vision_model."


def _part(adapter: Adapter, of_tower: bool) -> Adapter:
    return dataclasses.replace(adapter, tensors={name: array for name, array in adapter.tensors.items() if names.is_tower(name) == of_tower})


def _of_whole_model(own: Adapter, others: Adapter, config: LlavaConfig) -> Adapters:
    if not own.tensors and own.saved:
        raise FormatError(f"{own.path}: replaces weights ({next(iter(own.saved))}), but adapts nothing of the decoder, which is not supported; "
                          "merge it with PEFT", path=own.path, field=next(iter(own.saved)))
    found = Adapters()
    if own.tensors:
        found.decoder = _resolved(own, names.decoder_linears(config), names.DECODER)
    if others.tensors:
        others = dataclasses.replace(others, saved={})
        found.tower = others if config.vision is None else _resolved(others, names.vision_linears(config.vision), _VISION_MODEL)
    return found


def _resolved(adapter: Adapter, linears: names.Shapes, root: str) -> Adapter:
    """The adapter of one part with its settings in canonical names. root: how those begin, where PEFT knew another beginning."""
    name = next(iter(adapter.tensors), root)
    beginning = adapter.known_as.get(name, root).removesuffix(name.removeprefix(root))
    modules = {module: beginning + module.removeprefix(root) for module in linears}
    return dataclasses.replace(adapter, config=adapter.config.resolved(modules, sorted({name.rpartition(".")[0] for name in adapter.saved})))


def _check(found: Adapters, config: LlavaConfig) -> None:
    if found.decoder is not None:
        peft.check_pairs(found.decoder, names.decoder_linears(config), lambda module: True)
    if found.tower is not None:
        if config.vision is None:
            raise FormatError(f"{found.tower.path}: adapter of a vision tower, but the model has none", path=found.tower.path)
        used = tuple(f".encoder.layers.{i}." for i in range(config.n_used_vision_layers))
        peft.check_pairs(found.tower, names.vision_linears(config.vision), lambda module: any(layer in module for layer in used))
