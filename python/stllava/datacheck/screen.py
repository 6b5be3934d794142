"""The report in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .check import Report
from .estimate import Estimate
from .kinds import SEVERITIES, Finding
from .masks import MEANING, Masked
from .summary import Lengths, lengths_of, pictures_of

__all__ = ["duration", "print_report", "size_text"]

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
STYLES = {"context": "dim", "target": "bold green", "asked": "bold magenta", "cut": "strike dim red"}
BAR_WIDTH = 40
MAX_KINDS = 40
FILE_WIDTH = 150  # where nobody says how wide a line may be
MAX_PART = 300  # characters of masked text shown of one stretch


def print_report(report: Report, samples: Sequence[Masked] = (), cost: Estimate | None = None, file: IO[str] | None = None) -> None:
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    images = pictures_of(report.pictures)
    formats = ", ".join(f"{n} {name}" for name, n in images.formats) or "none read"
    console.print(f"[bold]{escape(report.data)}[/bold]: {len(report.records)} {'pairs' if report.form == 'dpo' else 'rows'}, template "
                  f"{escape(report.template.name)}, {images.n} images ({formats}"
                  f"{'' if images.sizes is None else f'; sides {images.sizes[0]} to {images.sizes[1]} px'})", soft_wrap=True)
    _print_findings(console, report)
    lengths = lengths_of(report)
    if lengths is None:
        console.print("lengths and labels: not looked at; --model_name_or_path DIR says with which tokenizer" if report.tokens is None else
                      "lengths and labels: no row can be tokenised", style="dim", soft_wrap=True)
    else:
        _print_lengths(console, report, lengths)
    if cost is not None:
        _print_cost(console, cost)
    for sample in samples:
        _print_sample(console, sample)
    n = {severity: report.n_of(severity) for severity in SEVERITIES}
    console.print(", ".join(f"[{COLOURS[severity]}]{count} {severity}{'' if count == 1 else 's'}[/]" for severity, count in n.items()))


def _print_findings(console: Console, report: Report) -> None:
    first: dict[str, Finding] = {}
    for finding in report.findings:
        first.setdefault(finding.kind, finding)
    counts = report.counts()
    if not counts:
        console.print("nothing found", style="green")
        return
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("kind", no_wrap=True, min_width=max(map(len, first)))
    table.add_column("n", justify="right", min_width=max(len(str(n)) for _, n in counts))
    table.add_column("the first of them", no_wrap=True, overflow="ellipsis")
    for kind, n in counts[:MAX_KINDS]:
        finding = first[kind]
        where = "" if finding.row is None else f"row {finding.row} (id {finding.id}): "
        table.add_row(Text(kind, COLOURS[finding.severity]), str(n), Text(f"{where}{finding.text}"))
    console.print(table)
    if len(counts) > MAX_KINDS:
        console.print(f"and {len(counts) - MAX_KINDS} kinds more", style="dim")


def _print_lengths(console: Console, report: Report, lengths: Lengths) -> None:
    limit = report.settings.max_length
    most = max(bar.n for bar in lengths.bars)
    table = Table(box=None, padding=(0, 1), show_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for bar in lengths.bars:
        over = limit is not None and bar.low >= limit
        width = max(round(BAR_WIDTH * bar.n / most), int(bar.n > 0))
        table.add_row(f"{bar.low}-{bar.high - 1}", Text("█" * width, "red" if over else "cyan"), str(bar.n))
    console.print(f"[bold]rows of the model[/bold] (image rows included): median {lengths.median}, 95 % up to {lengths.p95}, "
                  f"longest {lengths.longest}", soft_wrap=True)
    console.print(table)
    for line in length_lines(report, lengths):
        console.print(line, soft_wrap=True)


def length_lines(report: Report, lengths: Lengths) -> list[str]:
    """Sentences, also for the page."""
    limit = report.settings.max_length
    lines = ["no limit" if limit is None else f"--model_max_length {limit} cuts {lengths.n_over} of {lengths.n} sequences, {lengths.n_cut} of "
             f"{lengths.n_rows} rows, {lengths.n_lost} targets",
             f"{lengths.n_targets} targets; {lengths.masked:.1%} of the rows seen are masked"]
    if report.tokens is not None and report.tokens.sq_r:
        lines.append(f"self-questioning at sq_r {report.tokens.sq_r:g}: {lengths.n_switched} of {lengths.n_later} later questions in epoch 0, "
                     f"{lengths.n_asked / max(lengths.n_targets, 1):.1%} of the targets")
    return lines


def _print_cost(console: Console, cost: Estimate) -> None:
    console.print(f"[bold]memory[/bold] about {size_text(cost.total_bytes)}: " + ", ".join(f"{what} {size_text(n)}" for what, n in cost.memory),
                  soft_wrap=True)
    console.print(f"[bold]time[/bold] about {duration(cost.seconds)}: {cost.flop:.3g} FLOP. " + "; ".join(cost.assumptions), soft_wrap=True)


def _print_sample(console: Console, sample: Masked) -> None:
    text = Text(f"row {sample.row} {sample.title}".rstrip() + "  ", "bold")
    for part in sample.parts:
        shown = part.text if len(part.text) <= MAX_PART else f"{part.text[:MAX_PART // 2]} ... {part.text[-MAX_PART // 2:]}"
        text.append(shown if part.role == "context" else part.text, STYLES[part.role])
    console.print(text)
    present = [role for role in MEANING if any(part.role == role for part in sample.parts)]
    console.print(Text.assemble(*((f"{MEANING[role]} ({sum(part.n_tokens for part in sample.parts if part.role == role)} tokens)  ", STYLES[role])
                                  for role in present)))


def size_text(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
