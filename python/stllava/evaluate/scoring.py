"""Answers of one system scored by every metric, with intervals; two systems compared item by item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stllava.evaluate.breakdown import MIN_GROUP
from stllava.evaluate.definitions import CLOSED_VARIANTS, METRIC_SETS, Metric, metrics_of, primary_metrics
from stllava.evaluate.report import VqaItem, VqaReport
from stllava.evaluate.statistics import LEVEL, N_RESAMPLES, all_or_none_interval, bootstrap_intervals, is_attainable, mcnemar_exact, paired_test
from stllava.evaluate.vqa import ClosedVariant, MetricSet, evaluate_vqa

__all__ = ["Comparison", "Difference", "Score", "Scoring", "System", "compare", "score_answers", "scores_of"]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How answers are scored.

    metric_sets: of "compat" and "strict". closed: which variant of compat's closed accuracy stands for it in tables, comparisons and groups; all are
    computed. by_image: intervals draw images with all their questions, instead of questions.
    Others: see `evaluate_vqa`, `bootstrap_intervals`, `breakdown.MIN_GROUP`.
    """

    metric_sets: tuple[MetricSet, ...] = METRIC_SETS
    closed: ClosedVariant = "batch"
    candidates: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None
    unmatched: Literal["error", "wrong"] = "error"
    n_resamples: int = N_RESAMPLES
    seed: int = 0
    by_image: bool = False
    min_group: int = MIN_GROUP

    def __post_init__(self) -> None:
        if not self.metric_sets or set(self.metric_sets) - set(METRIC_SETS) or self.closed not in CLOSED_VARIANTS:
            raise ValueError(f"metric_sets={self.metric_sets!r}, closed={self.closed!r}; want some of {METRIC_SETS}, and one of {CLOSED_VARIANTS}")
        if self.n_resamples < 1:
            raise ValueError(f"n_resamples={self.n_resamples}, want at least 1")

    @property
    def primary(self) -> list[Metric]:
        return primary_metrics(self.metric_sets, self.closed)

    @property
    def method(self) -> str:
        """What intervals and tests are, in a sentence."""
        drawn = "images with all their questions" if self.by_image else "questions"
        return (f"{LEVEL} % percentile bootstrap intervals, {self.n_resamples} resamplings of {drawn}, open and closed items by themselves, seed "
                f"{self.seed} (0 or all of n right: Clopper-Pearson); paired tests over the same items: McNemar's exact test where an item is right "
                "or wrong, else the paired bootstrap; p two-sided, not corrected for testing several metrics.")


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of a metric over `n` items, as a fraction in [0, 1], with its interval; None without items.

    attainable: whether k of n items gives the value as printed, in per cent with two decimals; None for means that are no shares.
    """

    metric: Metric
    n: int
    value: float | None
    low: float | None
    high: float | None
    attainable: bool | None

    def as_dict(self) -> dict[str, Any]:
        return {"metric": self.metric.id, "set": self.metric.metric_set, "items": "open" if self.metric.is_open else "closed", "n": self.n,
                "value": self.value, "low": self.low, "high": self.high, "attainable": self.attainable}


@dataclass(frozen=True, eq=False)
class System:
    """The answers of one model, scored. reports: by metric set. images: of each item, None without. values: (n_items, n_metrics), NaN where a metric
    does not apply to an item."""

    name: str
    reports: Mapping[MetricSet, VqaReport]
    images: tuple[str | None, ...]
    metrics: tuple[Metric, ...]
    values: NDArray[np.float64]
    scores: tuple[Score, ...]

    @property
    def report(self) -> VqaReport:
        """That of the first metric set: its counts and texts."""
        return next(iter(self.reports.values()))

    @property
    def items(self) -> tuple[VqaItem, ...]:
        return self.report.items

    def score(self, metric: Metric) -> Score:
        """Raises KeyError where it was not computed."""
        return {score.metric: score for score in self.scores}[metric]


@dataclass(frozen=True, slots=True)
class Difference:
    """first - second over the items that the metric counts for both. only_first, only_second: items that one alone has right (shares only)."""

    metric: Metric
    n: int
    difference: float
    low: float
    high: float
    p: float
    test: str
    only_first: int | None
    only_second: int | None

    def as_dict(self) -> dict[str, Any]:
        return {"metric": self.metric.id, "n": self.n, "difference": self.difference, "low": self.low, "high": self.high, "p": self.p,
                "test": self.test, "only_first": self.only_first, "only_second": self.only_second}


@dataclass(frozen=True, slots=True)
class Comparison:
    """same: share of items, open and closed, to which both gave the same answer after normalisation; None without items."""

    first: str
    second: str
    same: float | None
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "same_answer": self.same, "differences": [one.as_dict() for one in self.differences]}


def score_answers(name: str, items: Sequence[Mapping[str, Any]], answers: Iterable[Mapping[str, Any]], how: Scoring) -> System:
    """Scores the answers of the system `name`; items and answers as for `evaluate_vqa`, whose errors it raises."""
    given = list(answers)
    reports = {one: evaluate_vqa(items, given, one, how.closed, candidates=how.candidates, unmatched=how.unmatched) for one in how.metric_sets}
    report = next(iter(reports.values()))
    image_of = {str(item.get("id", item.get("question_id"))): item.get("image") for item in items}
    images = tuple(None if (image := image_of[str(item.id)]) is None else str(image) for item in report.items)
    found = {metric: values for metric in metrics_of(how.metric_sets) if (values := metric.values(reports[metric.metric_set])) is not None}
    table = np.full((len(report.items), len(found)), np.nan)
    for column, (metric, values) in enumerate(found.items()):
        of_kind = [row for row, item in enumerate(report.items) if item.is_open == metric.is_open]
        table[of_kind, column] = [np.nan if value is None else value for value in values]
    system = System(name, reports, images, tuple(found), table, ())
    return replace(system, scores=scores_of(system, how))


def scores_of(system: System, how: Scoring, rows: Sequence[int] | None = None, metrics: Sequence[Metric] | None = None) -> tuple[Score, ...]:
    """Scores over some rows of the items and some metrics (None: all). Open and closed items are resampled separately."""
    found: dict[int, Score] = {}
    chosen = range(len(system.items)) if rows is None else rows
    for is_open in (True, False):
        columns = [i for i, metric in enumerate(system.metrics) if metric.is_open == is_open and (metrics is None or metric in metrics)]
        of_kind = [row for row in chosen if system.items[row].is_open == is_open]
        table = system.values[of_kind][:, columns]
        groups = [system.images[row] or row for row in of_kind] if how.by_image else None
        intervals = bootstrap_intervals(table, how.n_resamples, how.seed, groups)
        for column, values, (low, high) in zip(columns, table.T, intervals.tolist(), strict=True):
            counted = np.flatnonzero(~np.isnan(values))
            n_drawn = len({groups[row] for row in counted.tolist()}) if groups is not None else len(counted)
            found[column] = _score(system.metrics[column], values[counted], low, high, n_drawn)
    return tuple(found[column] for column in sorted(found))


def _score(metric: Metric, values: NDArray[np.float64], low: float, high: float, n_drawn: int) -> Score:
    """n_drawn: how many things were resampled, items or images."""
    if not values.size:
        return Score(metric, 0, None, None, None, None)
    if metric.share and values.min() == values.max():
        low, high = (0.0, all_or_none_interval(n_drawn)) if values[0] == 0.0 else (1.0 - all_or_none_interval(n_drawn), 1.0)
    # Left to right, as `evaluate_vqa` adds: the same value to the last bit.
    value = float(np.add.accumulate(values)[-1]) / values.size
    return Score(metric, int(values.size), value, low, high, is_attainable(round(100 * value, 2), int(values.size)) if metric.share else None)


def compare(first: System, second: System, how: Scoring) -> Comparison:
    """Both must have been scored on the same items; raises ValueError."""
    if [item.id for item in first.items] != [item.id for item in second.items]:
        raise ValueError(f"{first.name} and {second.name} were not scored on the same items")
    differences = []
    for metric in how.primary:
        if metric not in first.metrics or metric not in second.metrics:
            continue
        a, b = (system.values[:, system.metrics.index(metric)] for system in (first, second))
        rows = np.flatnonzero(~np.isnan(a) & ~np.isnan(b))
        if not rows.size:
            continue
        groups = [first.images[row] or int(row) for row in rows] if how.by_image else None
        found = paired_test(a[rows].tolist(), b[rows].tolist(), how.n_resamples, how.seed, groups)
        only = (int(((a > b)[rows]).sum()), int(((b > a)[rows]).sum())) if metric.share else (None, None)
        p, test = (found.p, "paired bootstrap") if only[0] is None or only[1] is None else (mcnemar_exact(only[0], only[1]), "McNemar, exact")
        differences.append(Difference(metric, int(rows.size), found.difference, found.low, found.high, p, test, *only))
    same = [x.prediction is not None and y.prediction is not None and x.prediction_normalised == y.prediction_normalised
            for x, y in zip(first.items, second.items, strict=True)]
    return Comparison(first.name, second.name, sum(same) / len(same) if same else None, tuple(differences))
