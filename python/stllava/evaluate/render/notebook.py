"""What a notebook shows of a report or an evaluation: one small table, nothing outside it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stllava.evaluate.evaluation import Evaluation
    from stllava.evaluate.report import VqaReport

__all__ = ["evaluation_html", "report_html"]


def report_html(report: VqaReport) -> str:
    """The table of `report_table`."""
    rows = [(row, "no items" if value is None else f"{value:.2f}") for row, value in report.percent.items()]
    counts = [("n open", report.n_open), ("n closed", report.n_closed), ("n skipped", report.n_skipped),
              ("n unanswered (wrong)", report.n_unanswered), ("n surplus (ignored)", report.n_surplus)]
    return _table(f"{report.variant}, definition {report.definition}", ("metric", "per cent"), rows, ", ".join(f"{name} {n}" for name, n in counts))


def evaluation_html(evaluation: Evaluation) -> str:
    """Every score with its interval, and the same metrics of baselines and the other model; with this one's paired tests."""
    from stllava.evaluate.render.terminal import counts_line, interval, p_value, percent, unhelpful_line
    rivals = evaluation.rivals
    heading = ("metric", "per cent", "95 % interval", "n", *(rival.system.name for rival in rivals))
    rows = [(score.metric.id, percent(score.value), interval(score), str(score.n),
             *(percent(rival.system.score(score.metric).value) for rival in rivals)) for score in evaluation.system.scores]
    note = f"{counts_line(evaluation)}; {unhelpful_line(evaluation)}. {evaluation.how.method}"
    scores = _table(f"{evaluation.title}: {evaluation.system.name}", heading, rows, note)
    if evaluation.other is None:
        return scores
    tested = evaluation.other.comparison
    return _table(f"{tested.first} minus {tested.second}, points", ("metric", "difference", "95 % interval", "p"),
                  [(one.metric.id, f"{100 * one.difference:+.2f}", f"{100 * one.low:+.1f} to {100 * one.high:+.1f}", p_value(one.p))
                   for one in tested.differences], "") + scores


def _table(title: str, heading: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        side = ("left", *["right"] * (len(row) - 1))
        parts = (f'<{tag} style="text-align:{where}">{html.escape(cell)}</{tag}>' for where, cell in zip(side, row, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return (f"<table><caption>{html.escape(title)}</caption><thead>{cells('th', heading)}</thead><tbody>{body}</tbody></table>"
            + (f"<p><small>{html.escape(note)}</small></p>" if note else ""))
