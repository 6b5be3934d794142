"""Memory and time of the training that the data would be used for, before it is started.

Memory: the core's own measuring pass over the longest batch, which computes nothing, and what the weights, gradients and moments take. Time: the
arithmetic of all rows over the measured speed of a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import stllava_c
from stllava.checkpoint import names
from stllava.checkpoint.peft import LoraConfig
from stllava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from stllava.model import LlavaModel
from stllava.tree import Sequence as Tokens

from .check import Report
from .tokens import Length

__all__ = ["Estimate", "Plan", "estimate", "measured_rate"]

EFFICIENCY = 0.75
"""Speed of a whole step as a share of a matrix product's: benchmarks/RESULTS.md has 55 % of the register peak for a step, 71 % for a product."""
_PROBE_RANK = 4  # of adapters while measuring: the arena depends little on the rank, and nothing large is allocated
_BYTES = 4  # of what trains, f32


@dataclass(frozen=True, slots=True)
class Plan:
    """What of the training's settings matters here. lora_r 0: the decoder itself trains; vit_lora_r 0: the tower does not."""

    batch_size: int = 8
    epochs: float = 1.0
    lora_r: int = 0
    vit_lora_r: int = 0
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """memory: (what, bytes). rate in FLOP/s. `assumptions` are part of the answer."""

    memory: list[tuple[str, int]]
    n_trainable: int
    longest: int
    flop: float
    rate: float
    seconds: float
    assumptions: list[str]

    @property
    def total_bytes(self) -> int:
        return sum(n for _, n in self.memory)


def estimate(model: LlavaModel, report: Report, plan: Plan, rate: float | None = None) -> Estimate | None:
    """None where no row can be tokenised. `model` gets adapters and is of no use afterwards. rate: FLOP/s; None: measured."""
    groups = _groups(report)
    if not groups:
        return None
    sizes = _Sizes(model, plan)
    longest = sorted(groups, key=lambda group: -sum(_used(length) for _, length in group))[:plan.batch_size]
    memory = [("weights as stored", sum(array.nbytes for array in model.tensors().values())),
              ("what trains, its gradient and two moments", 4 * _BYTES * sizes.n_trainable)]
    if report.form == "dpo":
        memory.append(("reference copy of what trains", _BYTES * sizes.n_trainable))
    n_rows = max(sum(_used(length) for _, length in group) for group in groups)
    what = f"activations of the longest batch ({len(longest)} {'pairs' if report.form == 'dpo' else 'rows'})"
    memory.append((what, _arena(model, report, longest, plan)))
    flop = plan.epochs * sizes.flop(report, groups, plan)
    speed = measured_rate() if rate is None else rate
    machine = "measured: a 1024 x 1024 matrix product in f32 runs" if rate is None else "given: a matrix product runs"
    trains = f"adapters of rank {plan.lora_r} and the projector train" if plan.lora_r else "everything but the tower trains"
    return Estimate(memory, sizes.n_trainable, n_rows, flop, speed, flop / (speed * EFFICIENCY), [
        f"{machine} at {speed / 1e9:.0f} GFLOP/s, a step at {EFFICIENCY:.0%} of that",
        f"batch of {plan.batch_size}, {plan.epochs:g} epochs, {trains}",
        "activations are measured with adapters of a small rank; every row's image is encoded anew"])


def measured_rate(side: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of NumPy's f32 matrix product on this machine, all its threads, the best of a few."""
    a = np.ones((side, side), np.float32)
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return float(2 * side**3 / best)


def _used(length: Length) -> int:
    return length.n_rows - length.n_cut


def _groups(report: Report) -> list[list[tuple[int, Length]]]:
    """Sequences that are computed together: one of an instruction row, two of a pair."""
    groups: dict[int, list[tuple[int, Length]]] = {}
    for row, length in report.lengths:
        groups.setdefault(row, []).append((row, length))
    return list(groups.values())


class _Sizes:
    """Weights that take part in products, and what trains, by the model's own table."""

    def __init__(self, model: LlavaModel, plan: Plan) -> None:
        config, infos = model.config, model.tensor_infos()
        self.model, self.config = model, config
        decoder = names.decoder_linears(config)
        tower = [] if config.vision is None else [module for module in names.vision_linears(config.vision) if infos[f"{module}.weight"].influences]
        self.decoder, self.tower = (sum(infos[f"{module}.weight"].size for module in modules) for modules in (decoder, tower))
        self.n_trainable = sum(info.size for name, info in infos.items() if info.influences and not names.is_lora(name) and (
            names.is_projector(name) or (not plan.lora_r and not names.is_tower(name))))
        for modules, rank in ((decoder, plan.lora_r), (tower, plan.vit_lora_r)):
            self.n_trainable += sum(rank * sum(infos[f"{module}.weight"].shape) for module in modules)

    def flop(self, report: Report, groups: Sequence[Sequence[tuple[int, Length]]], plan: Plan) -> float:
        """Of one epoch: forward, backward to the activations, and to the weights where they train; a pair computes its prefix once."""
        config, total = self.config, 0.0
        # forward, backward; + weights' gradients; + forward once more; + the reference of a pair
        times = 2.0 + (not plan.lora_r) + plan.recompute + (report.form == "dpo")
        for group in groups:
            shared = min(_used(length) - length.n_targets for _, length in group) if len(group) > 1 else 0
            rows = sum(_used(length) for _, length in group) - shared * (len(group) - 1)
            targets = sum(length.n_targets for _, length in group)
            width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
            attention = 2.0 * width * rows * max(_used(length) for _, length in group)  # two products over half of the square
            total += times * (2.0 * self.decoder * rows + attention + 2.0 * config.vocab_size * config.hidden_size * targets)
            if config.vision is not None:
                tower_times = 1.0 + (2.0 + plan.recompute) * bool(plan.vit_lora_r)
                total += group[0][1].n_images * tower_times * 2.0 * self.tower * (config.vision.n_patches + 1)
        return total


def _arena(model: LlavaModel, report: Report, groups: Sequence[Sequence[tuple[int, Length]]], plan: Plan) -> int:
    """Bytes of the arena for these sequences, by the core's measuring pass."""
    for part, wanted in (("llm", True), ("vit", bool(plan.vit_lora_r))):
        if wanted and part not in model.lora:
            model.add_lora(LoraConfig(r=_PROBE_RANK, lora_alpha=_PROBE_RANK, lora_dropout=0.0), part)
    infos = model.tensor_infos()
    del model.run
    model.set_trainable([name for name, info in infos.items() if info.influences and (names.is_lora(name) or names.is_projector(name))])
    sequences = []
    for number, group in enumerate(groups):
        for side, (row, length) in enumerate(group):
            n = _used(length) - length.n_images * (model.core.tokens_per_image - 1)
            answer = max(min(length.n_targets, n - 2), 0)
            ids = np.full(n, 3 + number % 64, np.int32)
            labels = np.full(n, IGNORE_INDEX, np.int32)
            ids[n - answer:] += 64 * side
            labels[n - answer:] = ids[n - answer:]
            ids[1:1 + length.n_images] = IMAGE_TOKEN_INDEX
            sequences.append(Tokens(ids, labels, tuple((number, i) for i in range(length.n_images)), sample=row))
    trees, batch = model.batch(sequences)
    run = stllava_c.Run(model.core)
    if plan.recompute:
        run.set_recompute(*model.config.n_layers)
    side = 0 if model.config.vision is None else model.config.vision.image_size
    pixels = np.zeros((len(trees.image_keys), 3, side, side), model.theta.dtype) if trees.image_keys else None
    return run.estimate(batch, pixels=pixels, train=True, vision_grad=bool(plan.vit_lora_r), dropout=True)
