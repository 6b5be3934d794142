"""The rows of a paper's table: Markdown, and LaTeX that needs no package."""

from __future__ import annotations

from collections.abc import Iterator

from stllava.evaluate.definitions import Metric
from stllava.evaluate.evaluation import Evaluation
from stllava.evaluate.scoring import Score

from .terminal import counts_line, printable

__all__ = ["latex_table", "markdown_table"]

_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
          "^": r"\textasciicircum{}"}


def latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))


def markdown_text(text: str) -> str:
    """Text in a cell of a table."""
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in printable(text))


def markdown_table(evaluation: Evaluation) -> str:
    """A row per system with intervals, then the published ones, and what they are made of."""
    heading, rows = _rows(evaluation)
    lines = ["| " + " | ".join(map(markdown_text, ("", *heading))) + " |", "|---" + "|---:" * len(heading) + "|"]
    for name, cells in rows:
        shown = (f"{value} ({spread})" if spread else value for value, spread in cells)
        lines.append("| " + " | ".join((markdown_text(name), *shown)) + " |")
    return "\n".join([*lines, "", *(markdown_text(line) for line in _notes(evaluation)), ""])


def latex_table(evaluation: Evaluation) -> str:
    """A `tabular` environment to be read with ``\\input``."""
    heading, rows = _rows(evaluation)
    lines = [*(f"% {printable(line)}" for line in _notes(evaluation)), rf"\begin{{tabular}}{{l{'r' * len(heading)}}}", r"\hline",
             " & ".join(map(latex_text, ("", *heading))) + r" \\", r"\hline"]
    for name, cells in rows:
        shown = (rf"{value} {{\scriptsize ({spread})}}" if spread else value for value, spread in cells)
        lines.append(" & ".join((latex_text(name), *shown)) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _rows(evaluation: Evaluation) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """Headings, and (name, cells as (value, interval)) of every system and every published row."""
    metrics = evaluation.primary
    rows = [(system.name, [_cell(system.score(metric)) for metric in metrics])
            for system in (evaluation.system, *(rival.system for rival in evaluation.rivals))]
    for row in evaluation.published:
        values = [f"{row.percent[metric.name]:.2f}" if metric.name in row.percent else "" for metric in metrics]
        if any(values):
            rows.append((f"{row.model} (published)", [(value, "") for value in values]))
    return [_heading(metric) for metric in metrics], rows


def _heading(metric: Metric) -> str:
    return metric.label if metric.metric_set == "compat" else f"strict {metric.label}"


def _cell(score: Score) -> tuple[str, str]:
    if score.value is None or score.low is None or score.high is None:
        return "", ""
    return f"{100 * score.value:.2f}", f"{100 * score.low:.1f}-{100 * score.high:.1f}"


def _notes(evaluation: Evaluation) -> Iterator[str]:
    yield f"{evaluation.title}: per cent; {counts_line(evaluation)}."
    yield "Metrics: " + ", ".join(metric.id for metric in evaluation.primary) + "."
    yield evaluation.how.method
    yield evaluation.published_note
