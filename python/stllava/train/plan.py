"""Which samples every update sees: a function of (settings, update number), so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stllava.errors import ConfigError

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Step counts as transformers computes them (notes on 4.31 and later).

    hf_compat ``"4.31"``: an epoch has floor(micro-batches / accumulation) updates, and micro-batches left over at its end are carried into the next
    epoch. ``"latest"``: they form a smaller update of their own.
    """

    n_items: int
    batch_size: int
    accumulation: int
    epochs: float
    max_steps: int
    seed: int
    hf_compat: str = "latest"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.n_items < 1:
            raise ConfigError("the training set is empty; nothing to train on")

    @property
    def micro_per_epoch(self) -> int:
        return math.ceil(self.n_items / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        if self.hf_compat == "4.31":
            return max(self.micro_per_epoch // self.accumulation, 1)
        return math.ceil(self.micro_per_epoch / self.accumulation)

    @property
    def total_steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def epoch_of(self, step: int) -> float:
        """Epochs finished after `step` updates, as logged."""
        return step / self.steps_per_epoch

    def update(self, step: int) -> list[list[tuple[int, int]]]:
        """The micro-batches of update `step` (from 0): lists of (item, epoch)."""
        per_epoch = self.micro_per_epoch
        if self.hf_compat == "4.31":
            size = min(self.accumulation, per_epoch)
            numbers = range(step * size, (step + 1) * size)
        else:
            epoch, within = divmod(step, self.steps_per_epoch)
            first = within * self.accumulation
            numbers = range(epoch * per_epoch + first, epoch * per_epoch + min(first + self.accumulation, per_epoch))
        return [self._micro(number) for number in numbers]

    def _micro(self, number: int) -> list[tuple[int, int]]:
        epoch, within = divmod(number, self.micro_per_epoch)
        if self.shuffle:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.n_items)
        else:
            order = np.arange(self.n_items)
        return [(int(i), epoch) for i in order[within * self.batch_size:(within + 1) * self.batch_size]]
