"""What the screen and the page say about lengths and pictures, as plain numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .check import Report
from .pictures import Picture

__all__ = ["Bar", "Lengths", "Pictures", "lengths_of", "pictures_of"]

N_BARS = 12


@dataclass(frozen=True, slots=True)
class Bar:
    """Sequences with low <= rows < high."""

    low: int
    high: int
    n: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of all sequences that can be tokenised. Shares are of 1."""

    n: int
    median: int
    p95: int
    longest: int
    bars: list[Bar]
    n_over: int
    n_cut: int
    n_rows: int
    n_targets: int
    n_lost: int
    n_asked: int
    n_later: int
    n_switched: int

    @property
    def masked(self) -> float:
        """Share of rows seen that are no target, image rows included."""
        return 1 - self.n_targets / max(self.n_rows - self.n_cut, 1)


def lengths_of(report: Report) -> Lengths | None:
    """None without a tokenizer, or where no row can be tokenised."""
    if not report.lengths:
        return None
    rows, cut, targets, asked, lost, later, switched = (
        np.array([getattr(length, name) for _, length in report.lengths], np.int64)
        for name in ("n_rows", "n_cut", "n_targets", "n_asked", "n_lost", "n_later", "n_switched"))
    step = _round_step(int(rows.max()))
    counts = np.bincount(rows // step)
    bars = [Bar(i * step, (i + 1) * step, int(n)) for i, n in enumerate(counts)]
    while bars and not bars[0].n:
        bars.pop(0)
    sums = [int(column.sum()) for column in (cut > 0, cut, rows, targets, lost, asked, later, switched)]
    return Lengths(len(rows), int(np.median(rows)), int(np.percentile(rows, 95)), int(rows.max()), bars, *sums)


def _round_step(longest: int) -> int:
    """1, 2 or 5 times a power of ten, so that there are at most N_BARS bars."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if longest // (factor * power) < N_BARS:
                return factor * power
        power *= 10


@dataclass(frozen=True, slots=True)
class Pictures:
    """Of all image names of the data. `sizes`: smallest and largest side in pixels."""

    n: int
    formats: list[tuple[str, int]]
    sizes: tuple[int, int] | None
    n_bytes: int


def pictures_of(pictures: list[Picture]) -> Pictures:
    sides = [side for picture in pictures if picture.size is not None for side in picture.size]
    formats = Counter(picture.format for picture in pictures if picture.format)
    return Pictures(len(pictures), formats.most_common(), (min(sides), max(sides)) if sides else None, sum(picture.n_bytes for picture in pictures))
