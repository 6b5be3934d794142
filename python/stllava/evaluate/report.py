"""What an evaluation returns, how it is printed, and what may be concluded from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

DEFINITION = "1"
"""Version of the metric definitions. It changes when any value could change for the same answers."""


@dataclass(frozen=True, slots=True)
class VqaItem:
    """One scored question. prediction None: no answer, or several, and counted as wrong."""

    id: str | int
    is_open: bool
    reference: str
    prediction: str | None
    reference_normalised: str
    prediction_normalised: str
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class VqaReport:
    """Scores of a test set.

    values: row of the table -> mean as a fraction in [0, 1] (BLEU too), None when there is no item to average.
    n_skipped: items whose answer type is neither open nor closed. n_surplus: predictions for unknown ids.
    """

    metric_set: str
    closed: str | None
    n_open: int
    n_closed: int
    n_skipped: int
    n_unanswered: int
    n_surplus: int
    items: tuple[VqaItem, ...]
    values: Mapping[str, float | None]
    definition: str = DEFINITION

    @property
    def variant(self) -> str:
        """Name of what was computed: "compat/batch", "compat/run_eval", "compat/pvqa" or "strict"."""
        return f"{self.metric_set}/{self.closed}" if self.closed else self.metric_set

    @property
    def percent(self) -> dict[str, float | None]:
        """`values` times 100, as tables report them."""
        return {row: None if value is None else value * 100 for row, value in self.values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"variant": self.variant, "percent": self.percent, **dataclasses.asdict(self)}


def report_table(report: VqaReport, title: str = "") -> Table:
    """The report as a rich table: the variant as title, metrics in per cent, and how many items they are made of."""
    heading = f"{title}: {report.variant}" if title else report.variant
    table = Table(title=Text(f"{heading}, definition {report.definition}"), title_justify="left")
    table.add_column("metric")
    table.add_column("per cent", justify="right")
    for row, value in report.percent.items():
        table.add_row(row, "no items" if value is None else f"{value:.2f}")
    table.add_section()
    for row, count in (("n open", report.n_open), ("n closed", report.n_closed), ("n skipped", report.n_skipped)):
        table.add_row(row, str(count))
    if report.n_unanswered or report.n_surplus:
        table.add_row("n unanswered (wrong)", str(report.n_unanswered))
        table.add_row("n surplus (ignored)", str(report.n_surplus))
    return table


def print_report(report: VqaReport, title: str = "", console: Console | None = None) -> None:
    """Print `report_table` to `console`, default the terminal."""
    (console or Console()).print(report_table(report, title))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], n: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of a - b over items, with the 95 % percentile interval of `n` resamplings of the items.

    a, b: values of the same items for two models, (n_items). With b all zero it is the interval of a's own mean. An
    interval that contains 0 means that this test set does not tell the models apart. Source: Efron & Tibshirani 1993,
    chapter 13. Raises ValueError for empty, unequal or non-finite input.
    """
    if len(a) != len(b) or len(a) == 0 or n < 1:
        raise ValueError(f"want two equally long lists, not empty, and n >= 1; got {len(a)} and {len(b)} values, n = {n}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError("values are not finite; items that a metric leaves out have to be left out of both lists")
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(differences.size, size=differences.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


def is_attainable(percent: float, n_items: int, decimals: int = 2) -> bool:
    """Whether some k of `n_items` right answers gives `percent` when rounded: a check of reported accuracies."""
    nearest = round(percent * n_items / 100)
    return any(abs(100 * k / n_items - percent) <= 0.5000001 * 10**-decimals for k in (nearest - 1, nearest, nearest + 1))
