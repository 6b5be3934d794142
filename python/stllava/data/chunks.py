"""Splitting a list over workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def get_chunk(items: Sequence[T], n: int, k: int) -> Sequence[T]:
    """Part `k` (0 <= k < n) of `items` cut into `n` neighbouring parts whose sizes differ by at most one.

    With fewer items than parts some parts are empty. Raises ValueError for n < 1 or k outside [0, n).
    """
    if n < 1 or not 0 <= k < n:
        raise ValueError(f"chunk {k} of {n}: want n >= 1 and 0 <= k < n")
    return items[len(items) * k // n : len(items) * (k + 1) // n]
