"""What may be concluded from scores: intervals, paired tests, and which percentages a number of items can give at all."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LEVEL", "N_RESAMPLES", "PairedTest", "all_or_none_interval", "bootstrap_intervals", "is_attainable", "mcnemar_exact",
           "paired_bootstrap", "paired_test"]

LEVEL = 95
"""Per cent that intervals cover."""
N_RESAMPLES = 2000
_ROOM = 1 << 22  # draws held at once


class PairedTest(NamedTuple):
    """a - b over the same items, its interval, and the two-sided p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def bootstrap_intervals(values: ArrayLike, n: int = N_RESAMPLES, seed: int = 0, groups: Sequence[Hashable] | None = None) -> NDArray[np.float64]:
    """95 % percentile intervals of the means of columns.

    Args:
        values: (n_items,) or (n_items, n_columns); NaN: this item is not in this column's mean. n: resamplings, the same items for all columns.
        groups: what is drawn together, such as the image of each item; default every item by itself.

    Returns:
        (n_columns, 2), low and high; NaN for a column without values. Source: Efron & Tibshirani 1993, chapter 13; for groups the cluster bootstrap,
        Davison & Hinkley 1997, section 3.8.
    """
    means = _resampled_means(_columns(values), n, seed, groups)
    low_and_high = np.full((means.shape[1], 2), np.nan)
    for column, found in enumerate(means.T):
        found = found[~np.isnan(found)]  # a draw may have none of a column's items
        if found.size:
            low_and_high[column] = np.percentile(found, ((100 - LEVEL) / 2, 100 - (100 - LEVEL) / 2))
    return low_and_high


def all_or_none_interval(n: int) -> float:
    """How far an interval reaches from 0 of n, or from n of n, where resampling finds no spread: 95 %, exact for independent items.

    Source: Clopper & Pearson 1934, whose other end is then the share itself.
    """
    return float(1 - ((100 - LEVEL) / 200) ** (1 / n))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], n: int = N_RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of a - b over items, with the 95 % percentile interval of `n` resamplings of the items.

    a, b: values of the same items for two models, (n_items). With b all zero it is the interval of a's own mean. An
    interval that contains 0 means that this test set does not tell the models apart. Source: Efron & Tibshirani 1993,
    chapter 13. Raises ValueError for empty, unequal or non-finite input.
    """
    return paired_test(a, b, n, seed)[:3]


def paired_test(a: Sequence[float], b: Sequence[float], n: int = N_RESAMPLES, seed: int = 0, groups: Sequence[Hashable] | None = None) -> PairedTest:
    """As `paired_bootstrap`, with a p-value: how often a resampled difference lies as far from the found one as that lies from zero.

    p is (1 + such resamplings) / (1 + n), so never below 1 / (1 + n). Source: Davison & Hinkley 1997, section 4.4. groups: see `bootstrap_intervals`.
    """
    if len(a) != len(b) or len(a) == 0 or n < 1:
        raise ValueError(f"want two equally long lists, not empty, and n >= 1; got {len(a)} and {len(b)} values, n = {n}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("values are not finite; items that a metric leaves out have to be left out of both lists")
    mean = float(differences.mean())
    means = _resampled_means(_columns(differences), n, seed, groups)[:, 0]
    low, high = np.percentile(means, ((100 - LEVEL) / 2, 100 - (100 - LEVEL) / 2))
    as_far = np.abs(means - mean) >= abs(mean) - 1e-12  # equal fractions may differ in the last bits
    return PairedTest(mean, float(low), float(high), float((1 + as_far.sum()) / (1 + n)))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: the items that only one of two models has right are as often a's as b's.

    only_a, only_b: how many items only a, and only b, has right; the others say nothing. It is the sign test on them: twice the smaller
    binomial tail, at most 1. Source: Fagerland, Lydersen & Laake 2013, "The McNemar test for binary matched-pairs data".
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts are {only_a} and {only_b}, want none below 0")
    n = only_a + only_b
    term = tail = 1  # binomial coefficients, one from the other
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def is_attainable(percent: float, n_items: int, decimals: int = 2) -> bool:
    """Whether some k of `n_items` right answers gives `percent` when rounded: a check of reported accuracies."""
    if n_items < 1 or not math.isfinite(percent):
        return False
    nearest = round(percent * n_items / 100)
    return any(0 <= k <= n_items and abs(100 * k / n_items - percent) <= 0.5000001 * 10**-decimals for k in (nearest - 1, nearest, nearest + 1))


def _columns(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array


def _resampled_means(values: NDArray[np.float64], n: int, seed: int, groups: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """(n, n_columns). A group's draws depend on how many there are, never on their content."""
    present = ~np.isnan(values)
    sums, counts = np.where(present, values, 0.0), present.astype(np.float64)
    if groups is not None:
        number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        of_item = np.array([number[group] for group in groups], dtype=np.intp)
        sums, counts = (_summed(table, of_item, len(number)) for table in (sums, counts))
    n_drawn = len(sums)
    rng = np.random.default_rng(seed)
    means = np.full((n, values.shape[1]), np.nan)
    at_once = max(1, _ROOM // max(1, n_drawn))
    for start in range(0, n if n_drawn else 0, at_once):
        stop = min(n, start + at_once)
        drawn = rng.integers(n_drawn, size=(stop - start, n_drawn)) + n_drawn * np.arange(stop - start)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n_drawn * (stop - start)).reshape(stop - start, n_drawn).astype(np.float64)
        # einsum and not @: no BLAS, whose sums depend on its threads
        of_draw, n_of_draw = (np.einsum("rg,gc->rc", times, table) for table in (sums, counts))
        np.divide(of_draw, n_of_draw, out=means[start:stop], where=n_of_draw > 0)
    return means


def _summed(table: NDArray[np.float64], of_item: NDArray[np.intp], n_groups: int) -> NDArray[np.float64]:
    sums = np.zeros((n_groups, table.shape[1]))
    np.add.at(sums, of_item, table)
    return sums
