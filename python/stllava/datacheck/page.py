"""The report as one HTML page with everything inside it, and the findings as JSON lines."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from stllava.checkpoint.atomic import write_bytes
from stllava.errors import ConfigError
from stllava.html_template import html_template

from .check import Report
from .estimate import Estimate
from .kinds import KINDS, Finding
from .masks import MEANING, Masked
from .overlap import image_keys
from .pictures import thumbnail
from .screen import duration, length_lines, size_text
from .summary import Lengths, lengths_of, pictures_of

__all__ = ["write_jsonl", "write_page"]

MAX_EXAMPLES = 20  # findings of one kind that the page lists
MAX_THUMBNAILS = 48
SVG_WIDTH, SVG_HEIGHT, SVG_FOOT = 720, 150, 18


def write_jsonl(path: str | os.PathLike[str], report: Report) -> None:
    """One finding a line: {"row", "id", "kind", "severity", "text"}; whatever fails, the old file or the new one is there."""
    write_bytes(Path(path), "".join(json.dumps(finding.to_dict()) + "\n" for finding in report.findings).encode())


def write_page(path: str | os.PathLike[str], report: Report, samples: Sequence[Masked] = (), cost: Estimate | None = None) -> None:
    """Raises ConfigError where jinja2 is missing."""
    try:
        template = html_template("stllava.datacheck", "page.html.j2", size=size_text, duration=duration)
    except ImportError as error:
        raise ConfigError("the HTML page needs jinja2: pip install 'stllava[report]'") from error
    lengths = lengths_of(report)
    page = template.render(report=report, counts=report.counts(), kinds=KINDS, examples=_examples(report), max_examples=MAX_EXAMPLES,
                           pictures=pictures_of(report.pictures), lengths=lengths, lines=[] if lengths is None else length_lines(report, lengths),
                           chart=None if lengths is None else _chart(report, lengths), cost=cost, samples=samples, meaning=MEANING,
                           severities={severity: report.n_of(severity) for severity in ("error", "warning", "note")})
    write_bytes(Path(path), page.encode("utf-8", "backslashreplace"))


def _examples(report: Report) -> dict[str, list[tuple[Finding, str | None]]]:
    """The first findings of each kind, and the picture of their rows as an address that has it inside, while there is room."""
    pictures = {picture.key: picture for picture in report.pictures}
    shown: dict[Hashable, str | None] = {}
    examples: dict[str, list[tuple[Finding, str | None]]] = {}
    for finding in report.findings:
        listed = examples.setdefault(finding.kind, [])
        if len(listed) < MAX_EXAMPLES:
            key = None if finding.row is None else next(iter(image_keys(report.records[finding.row])), None)
            if key in pictures and key not in shown and len(shown) < MAX_THUMBNAILS:
                data = thumbnail(pictures[key])
                shown[key] = None if data is None else "data:image/jpeg;base64," + base64.b64encode(data).decode()
            listed.append((finding, shown.get(key)))
    return examples


def _chart(report: Report, lengths: Lengths) -> dict[str, Any]:
    """Numbers of an SVG histogram: bars as (x, y, width, height, label, title, behind the limit?), and where the limit lies."""
    most = max(bar.n for bar in lengths.bars)
    width = SVG_WIDTH / len(lengths.bars)
    limit = report.settings.max_length
    bars = []
    for i, bar in enumerate(lengths.bars):
        height = bar.n / most * (SVG_HEIGHT - 10)
        bars.append({"x": round(i * width + 1, 1), "y": round(SVG_HEIGHT - height, 1), "width": round(width - 2, 1), "height": round(height, 1),
                     "label": str(bar.low), "title": f"{bar.low} to {bar.high - 1} rows: {bar.n}", "over": limit is not None and bar.low >= limit})
    low, high = lengths.bars[0].low, lengths.bars[-1].high
    at = None if limit is None or not low <= limit <= high else round((limit - low) / (high - low) * SVG_WIDTH, 1)
    return {"width": SVG_WIDTH, "height": SVG_HEIGHT + SVG_FOOT, "floor": SVG_HEIGHT, "bars": bars, "limit": limit, "limit_at": at}
