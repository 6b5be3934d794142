"""Parameter groups: names -> the order of the flat trainable buffer -> ranges with a rate and a decay.

Source: LLaVA's llava_trainer.create_optimizer (groups and their order) and transformers' get_parameter_names (no decay for biases and norms).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import stllava_c
from stllava.checkpoint import names as canonical
from stllava.model import LlavaModel

from .arguments import TrainingArguments

__all__ = ["ParameterGroups", "parameter_groups", "default_trainable"]

_NORM = re.compile(r"(layernorm|layer_norm\d?|layrnorm|\.norm|ln_\d)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class ParameterGroups:
    """`order`: tensors in the order of the flat buffer. `base_lr`, `weight_decay`, `names`: per group. `spans[g]`: element ranges the optimiser
    updates; tensors no output depends on are left out, so they never change, not even by decay."""

    order: list[str]
    names: list[list[str]]
    base_lr: list[float]
    weight_decay: list[float]
    spans: list[list[tuple[int, int]]]

    def ranges(self, multiplier: float) -> list[tuple[int, int, float, float]]:
        """(begin, end, lr, weight_decay) for the core's AdamW, with the schedule's multiplier applied."""
        return [(begin, end, self.base_lr[g] * multiplier, self.weight_decay[g]) for g, spans in enumerate(self.spans) for begin, end in spans]


def default_trainable(model: LlavaModel) -> list[str]:
    """What LLaVA's LoRA training trains: every adapter and the whole projector. Without adapters: every tensor."""
    has_adapters = bool(model.lora)
    return [info.name for info in model.core.tensors()
            if info.bound and (not has_adapters or canonical.is_lora(info.name) or canonical.is_projector(info.name))]


def parameter_groups(model: LlavaModel, trainable: list[str], args: TrainingArguments) -> ParameterGroups:
    """Sorts `trainable` into groups and makes it the model's trainable set."""
    rates = {"rest": args.learning_rate}
    if args.mm_projector_lr:
        rates["projector"] = args.mm_projector_lr
        if args.vision_tower_lr:
            rates["tower"] = args.vision_tower_lr

    def part(name: str) -> str:
        own = "projector" if canonical.is_projector(name) else "tower" if canonical.is_tower(name) else "rest"
        return own if own in rates else "rest"

    kinds = [("rest", True), ("tower", True), ("rest", False), ("tower", False), ("projector", True), ("projector", False)]
    kinds = [kind for kind in kinds if kind[0] in rates]
    groups = [[name for name in trainable if (part(name), _decays(name)) == kind] for kind in kinds]
    order = [name for group in groups for name in group]
    model.set_trainable(order)
    infos = model.tensor_infos()
    return ParameterGroups(
        order=order, names=groups, base_lr=[rates[which] for which, _ in kinds],
        weight_decay=[args.weight_decay if decays else 0.0 for _, decays in kinds],
        spans=[_spans([infos[name] for name in group if infos[name].influences]) for group in groups])


def _decays(name: str) -> bool:
    return "bias" not in name and not _NORM.search(name)


def _spans(infos: list[stllava_c.TensorInfo]) -> list[tuple[int, int]]:
    """Neighbouring tensors joined."""
    spans: list[tuple[int, int]] = []
    for info in infos:
        begin, end = info.offset, info.offset + info.size
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((begin, end))
    return spans
