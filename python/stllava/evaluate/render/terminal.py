"""An evaluation as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stllava.evaluate.evaluation import Evaluation, Rival
from stllava.evaluate.scoring import Score
from stllava.evaluate.statistics import LEVEL

__all__ = ["counts_line", "interval", "p_value", "percent", "print_evaluation", "printable", "unhelpful_line"]


def printable(text: str) -> str:
    """Text of a file on one line, without what a terminal would obey."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def percent(value: float | None) -> str:
    return "no items" if value is None else f"{100 * value:.2f}"


def interval(score: Score) -> str:
    return "" if score.low is None or score.high is None else f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def counts_line(evaluation: Evaluation) -> str:
    """Every count, those that need an explanation with one."""
    n = evaluation.counts
    parts = [f"n open {n['open']}", f"n closed {n['closed']}", f"n skipped {n['skipped']}" + (" (neither open nor closed)" if n["skipped"] else "")]
    if n["unanswered"] or n["surplus"]:
        parts += [f"n unanswered {n['unanswered']} (wrong)", f"n surplus {n['surplus']} (ignored)"]
    return ", ".join(parts)


def unhelpful_line(evaluation: Evaluation) -> str:
    """Empty answers and refusals, and how many of them a closed metric takes for right."""
    right = evaluation.n_refused_right
    taken = f" ({right} of them of closed items that the metric takes for right)" if right else ""
    return f"empty answers {len(evaluation.empty)}, refusals {len(evaluation.refused)}{taken}"


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Scores, comparisons, groups and published rows to `console`, default the terminal."""
    console = console or Console()
    for part in _parts(evaluation):
        console.print(part, markup=False, highlight=False) if isinstance(part, str) else console.print(part)


def _parts(evaluation: Evaluation) -> Iterator[Table | str]:
    variants = ", ".join(report.variant for report in evaluation.system.reports.values())
    yield _scores(evaluation, f"{evaluation.title}: {evaluation.system.name}; {variants}, definition {evaluation.system.report.definition}")
    yield f"{counts_line(evaluation)}; {unhelpful_line(evaluation)}"
    yield evaluation.how.method
    yield ""
    for rival in evaluation.rivals:
        yield _comparison(evaluation, rival)
    for heading in evaluation.groups:
        yield _groups(evaluation, heading)
    if evaluation.published:
        yield _published(evaluation)
    yield evaluation.published_note


def _table(title: str, *columns: str) -> Table:
    """Numbers stay on a line, what stands left of them may take several."""
    table = Table(title=Text(printable(title)), title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    return table


def _scores(evaluation: Evaluation, title: str) -> Table:
    table = _table(title, "per cent", "value", f"{LEVEL} % interval", "n")
    before = None
    for score in evaluation.system.scores:
        if before not in (None, score.metric.metric_set):
            table.add_section()
        before = score.metric.metric_set
        table.add_row(score.metric.id, percent(score.value), interval(score), str(score.n))
    return table


def _comparison(evaluation: Evaluation, rival: Rival) -> Table:
    same = rival.comparison.same
    told = [f"{evaluation.system.name} minus {rival.system.name}", *([rival.note] if rival.note else []),
            *([] if same is None else [f"the same answer to {100 * same:.1f} % of the items"])]
    table = _table("; ".join(told), "points", "theirs", "diff.", f"{LEVEL} % interval", "p", "alone")
    for one in rival.comparison.differences:
        alone = "" if one.only_first is None else f"{one.only_first} : {one.only_second}"
        table.add_row(one.metric.name, percent(rival.system.score(one.metric).value), f"{100 * one.difference:+.2f}",
                      f"{100 * one.low:+.1f} to {100 * one.high:+.1f}", p_value(one.p), alone)
    return table


def _groups(evaluation: Evaluation, heading: str) -> Table:
    last = evaluation.primary[-1].metric_set
    metrics = [metric for metric in evaluation.primary if metric.metric_set == last]
    names = [metric.name.removeprefix("strict_").removesuffix("_batch").replace("_", " ") for metric in metrics]
    table = _table(f"by {heading}, {last}; no interval below {evaluation.how.min_group} items", heading, "open", "closed", *names)
    for group in evaluation.groups[heading]:
        found = {score.metric: score for score in group.scores}
        table.add_row(Text(printable(group.name)), str(group.n_open), str(group.n_closed), *(_short(found[metric]) for metric in metrics))
    return table


def _short(score: Score) -> str:
    if score.value is None:
        return ""
    spread = "" if score.low is None or score.high is None else f" ({100 * score.low:.0f}-{100 * score.high:.0f})"
    return f"{100 * score.value:.1f}{spread}"


def _published(evaluation: Evaluation) -> Table:
    table = _table("published, per cent; * not k of n", "", "recall", "F1", "closed")
    for row in evaluation.published:
        cells = [f"{row.percent[name]:.2f}{'*' if name in row.unattainable else ''}" if name in row.percent else ""
                 for name in ("open_recall", "open_f1", "closed_accuracy_batch")]
        table.add_row(f"{row.model} ({row.source})", *cells)
    return table
