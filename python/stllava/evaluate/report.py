"""What an evaluation returns, and how it is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

    def _repr_html_(self) -> str:
        from stllava.evaluate.render.notebook import report_html
        return report_html(self)


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
