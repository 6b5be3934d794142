"""Which samples every update sees: a function of (settings, update number), so that resuming needs no state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from stllava.errors import ConfigError

__all__ = ["Plan", "Grouping", "length_grouped", "modality_grouped"]

Grouping = Literal["", "length", "modality_length"]


def length_grouped(lengths: np.ndarray, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """An order in which neighbours have similar lengths: random mega-batches, each sorted by falling length, the longest item of all first.

    Source: transformers' get_length_grouped_indices, which is called with the samples of an update as `batch_size`.
    """
    size = max(1, min(len(lengths) // (4 * batch_size), 50)) * batch_size
    parts = _sorted_parts(random.permutation(len(lengths)), lengths, size)
    longest = max(range(len(parts)), key=lambda i: lengths[parts[i][0]])
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return np.concatenate(parts)


def modality_grouped(lengths: np.ndarray, batch_size: int, accumulation: int, random: np.random.Generator) -> np.ndarray:
    """An order in which all items of an update have a picture (length > 0) or all have none (< 0), and its micro-batches are of similar size.

    Items that fill no update come last, in the data's order. Items all of one kind are only grouped by length within updates, in random order.
    Source: LLaVA's get_modality_length_grouped_indices, with the accumulation as its number of processes.
    """
    size = batch_size * accumulation
    with_picture, without = np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)
    updates, rest = [], []
    for items in (with_picture, without):
        parts = _sorted_parts(items[random.permutation(len(items))], np.abs(lengths), size)
        updates += [_balanced(part, np.abs(lengths), accumulation) for part in parts]
        if len(with_picture) and len(without):
            rest.append(updates.pop())
    updates = [updates[i] for i in random.permutation(len(updates))] if rest else updates
    return np.concatenate([*updates, np.sort(np.concatenate(rest))] if rest else updates)


def _sorted_parts(order: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    parts = [order[i:i + size] for i in range(0, len(order), size)]
    return [part[np.argsort(-lengths[part], kind="stable")] for part in parts]


def _balanced(part: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """`n` micro-batches of one size and of similar length in sum: each item goes to the one that is shortest so far."""
    if len(part) % n:
        return np.concatenate([part[i::n] for i in range(n)])
    chunks: list[list[int]] = [[] for _ in range(n)]
    totals = [0.0] * n
    for item in part.tolist():
        shortest = totals.index(min(totals))
        chunks[shortest].append(item)
        totals[shortest] = math.inf if len(chunks[shortest]) == len(part) // n else totals[shortest] + float(lengths[item])
    return np.concatenate(chunks).astype(part.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """Step counts as transformers computes them (notes on 4.31 and later).

    hf_compat ``"4.31"``: an epoch has floor(micro-batches / accumulation) updates, and micro-batches left over at its end are carried into the next
    epoch. ``"latest"``: they form a smaller update of their own. `drop_last`: a micro-batch that is not full is left out. `grouping` orders items by
    `lengths` (n_items,), see `length_grouped` and `modality_grouped`.
    """

    n_items: int
    batch_size: int
    accumulation: int
    epochs: float
    max_steps: int
    seed: int
    hf_compat: str = "latest"
    shuffle: bool = True
    drop_last: bool = False
    grouping: Grouping = ""
    lengths: Seq[int] | None = field(default=None, repr=False)
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the epochs asked for last

    def __post_init__(self) -> None:
        if self.n_items < 1:
            raise ConfigError("the training set is empty; nothing to train on")
        if self.micro_per_epoch < 1:
            raise ConfigError(f"dataloader_drop_last: {self.n_items} samples fill no batch of {self.batch_size}; nothing to train on",
                              field="dataloader_drop_last")
        if self.grouping and (self.lengths is None or len(self.lengths) != self.n_items):
            raise ConfigError(f"group_by_{self.grouping}: the training set does not say how long its {self.n_items} samples are", field="lengths")

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree with."""
        lengths = None if self.lengths is None else hashlib.sha256(np.asarray(self.lengths, "<i8").tobytes()).hexdigest()
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init} | {"lengths": lengths}

    @property
    def micro_per_epoch(self) -> int:
        return self.n_items // self.batch_size if self.drop_last else math.ceil(self.n_items / self.batch_size)

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
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = self._order(epoch)
        return [(int(i), epoch) for i in self._orders[epoch][within * self.batch_size:(within + 1) * self.batch_size]]

    def _order(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        if self.grouping:
            lengths = np.asarray(self.lengths)
            if self.grouping == "modality_length":
                return modality_grouped(lengths, self.batch_size, self.accumulation, random)
            return length_grouped(np.abs(lengths), self.batch_size * self.accumulation, random)
        return random.permutation(self.n_items) if self.shuffle else np.arange(self.n_items)
