"""One optimiser update: micro-batches in, gradients added up, clipped, AdamW over the flat buffer, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import stllava_c
from stllava.errors import NumericsError
from stllava.model import NUMPY_DTYPE, LlavaModel
from stllava.tree import TreeBatch

from .arguments import TrainingArguments
from .groups import ParameterGroups
from .numerics import all_finite, bad_tensors, explained, failure, shown
from .schedule import Schedule

__all__ = ["Micro", "Objective", "Updater"]


@dataclass(slots=True)
class Micro:
    """A micro-batch ready for the core. `items`: (item, epoch) of its samples, for messages."""

    trees: TreeBatch
    batch: stllava_c.Batch
    pixels: np.ndarray | None
    items: list[tuple[int, int]]
    dataset: Any


class Objective(Protocol):
    """A loss: SFT or a preference loss."""

    def collate(self, dataset: Any, items: list[tuple[int, int]]) -> Micro: ...

    def step(self, micro: Micro, update: list[Micro], step: int) -> dict[str, float]:
        """Forward, loss and backward of one micro-batch of `update`; gradients add. Returns at least ``loss``."""

    def combine(self, metrics: list[dict[str, float]]) -> dict[str, float]:
        """The update's numbers from those of its micro-batches."""

    def evaluate(self, micro: Micro) -> tuple[float, int, dict[str, float]]:
        """Summed loss, its weight, and further numbers averaged over that weight."""


class Updater:
    """Owns the optimiser state: two moments per trainable element."""

    def __init__(self, model: LlavaModel, groups: ParameterGroups, objective: Objective, args: TrainingArguments, total_steps: int) -> None:
        self.model, self.groups, self.objective, self.args = model, groups, objective, args
        options = args.lr_scheduler_kwargs
        assert not isinstance(options, str)  # `TrainingArguments` has read it
        self.schedule = Schedule(args.lr_scheduler_type, total_steps, args.n_warmup(total_steps), args.learning_rate, floor=args.min_lr_ratio,
                                 options=options)
        self.exp_avg = np.zeros(model.core.n_trainable, NUMPY_DTYPE[model.dtype])
        self.exp_avg_sq = np.zeros_like(self.exp_avg)
        self.n_updates = 0  # that reached the optimiser: AdamW's t
        self.n_skipped = 0
        self.n_skipped_in_a_row = 0

    def gradients(self, step: int, micros: list[Micro]) -> dict[str, Any]:
        """Forward and backward of every micro-batch; the model's gradient buffer then holds the update's gradient."""
        self.model.core.zero_grad()
        metrics = []
        for micro in micros:
            with explained(f"update {step}", micro, self.model):
                metrics.append(self.objective.step(micro, micros, step))
            if not math.isfinite(metrics[-1]["loss"]):
                raise failure(f"update {step}", f"the loss is {metrics[-1]['loss']}", [micro], self.model)
        return {"micro_batch_losses": [m["loss"] for m in metrics], **self.objective.combine(metrics)}

    def apply(self, step: int, micros: Seq[Micro] = ()) -> dict[str, Any]:
        """Clips and steps. A gradient, moment or rate that is not finite raises NumericsError, which names `micros`, and changes nothing."""
        multiplier = self.schedule(step)
        ranges = self.groups.ranges(multiplier)
        norm, clip, problem = self._check(ranges)
        if problem:
            raise failure(f"update {step}", problem, micros, self.model)
        stllava_c.adamw_step(self.model.core, self.exp_avg, self.exp_avg_sq, ranges, beta1=self.args.adam_beta1, beta2=self.args.adam_beta2,
                             eps=self.args.adam_epsilon, step=self.n_updates + 1, grad_scale=clip)
        self.n_updates += 1
        self.n_skipped_in_a_row = 0
        return {"grad_norm": norm, "learning_rate": self.groups.base_lr[0] * multiplier,
                "lr_groups": [lr * multiplier for lr in self.groups.base_lr]}

    def _check(self, ranges: list[tuple[int, int, float, float]]) -> tuple[float, float, str | None]:
        """The gradient's norm, the factor that clips it, and what would make weights or moments NaN or Inf in this update."""
        largest = float(np.finfo(self.exp_avg.dtype).max)
        rates = [lr for _, _, lr, _ in ranges if not abs(lr) <= largest]
        if rates:
            return 0.0, 0.0, f"the learning rate is {rates[0]}"
        norm = stllava_c.grad_norm(self.model.core, ranges)
        clip = min(1.0, self.args.max_grad_norm / (norm + 1e-6)) if self.args.max_grad_norm > 0 else 1.0
        problem = None
        if not math.isfinite(norm):
            problem = f"the gradient's norm is {norm}: {shown(bad_tensors(self.model, self.model.grad)) or 'its square overflows'}"
        elif not norm * clip <= math.sqrt(largest):  # no element is larger than the norm
            problem = f"the square of the gradient's norm {norm:g} is beyond {self.exp_avg.dtype}; set max_grad_norm"
        for name, moment in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            if problem is None and not all_finite(moment):
                problem = f"the optimiser's {name} is not finite: {shown(bad_tensors(self.model, moment))}"
        return norm, clip, problem

    def skip(self, error: NumericsError) -> None:
        """Counts an update that was left out. Raises NumericsError after more than `max_skipped` in a row."""
        self.n_skipped += 1
        self.n_skipped_in_a_row += 1
        if self.n_skipped_in_a_row > self.args.max_skipped:
            raise NumericsError(f"{self.n_skipped_in_a_row} updates in a row were left out, more than max_skipped={self.args.max_skipped}; the last: "
                                f"{error}", sample_ids=error.sample_ids) from error
