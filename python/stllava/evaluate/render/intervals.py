"""A chart of scores with their intervals, as SVG that stands in a page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from stllava.evaluate.definitions import Metric
from stllava.evaluate.evaluation import Evaluation

__all__ = ["intervals_svg"]

_WIDTH, _LEFT, _RIGHT, _LINE, _HEAD, _FOOT = 760, 290, 60, 20, 26, 22
_OURS, _THEIRS, _PUBLISHED = "#1f6fb2", "#7b8794", "#c05621"


def intervals_svg(evaluation: Evaluation, metric: Metric) -> str:
    """One line per system: a dot at the score, a bar over its interval; published values as rings, which have no interval."""
    rows = list(_rows(evaluation, metric))
    top = max((high for _, _, high, _, _ in rows), default=0.0)
    limit = min(100.0, 10.0 * math.ceil(top / 10 + 0.2))
    height = _HEAD + _LINE * len(rows) + _FOOT

    def x(value: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * value / limit:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif" font-size="12">',
             f'<title>{html.escape(metric.id)}</title><text x="0" y="14" font-weight="600">{html.escape(metric.id)}, per cent</text>']
    parts += [f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{_HEAD - 4}" y2="{height - _FOOT + 2}" stroke="#e4e7eb"/>'
              f'<text x="{x(tick)}" y="{height - 6}" text-anchor="middle" fill="#52606d">{tick}</text>'
              for tick in range(0, int(limit) + 1, 10 if limit <= 60 else 20)]
    for i, (name, low, high, value, colour) in enumerate(rows):
        y = _HEAD + _LINE * i + 10
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{html.escape(name if len(name) <= 46 else name[:45] + "…")}</text>')
        if colour != _PUBLISHED:
            parts.append(f'<line x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        fill = "none" if colour == _PUBLISHED else colour
        parts.append(f'<circle cx="{x(value)}" cy="{y}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>'
                     f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 4}">{value:.2f}</text>')
    return "".join([*parts, "</svg>"])


def _rows(evaluation: Evaluation, metric: Metric) -> Iterator[tuple[str, float, float, float, str]]:
    """(name, low, high, value, colour), per cent."""
    for system in (evaluation.system, *(rival.system for rival in evaluation.rivals)):
        score = system.score(metric)
        if score.value is not None and score.low is not None and score.high is not None:
            yield system.name, 100 * score.low, 100 * score.high, 100 * score.value, _OURS if system is evaluation.system else _THEIRS
    for row in evaluation.published:
        value = row.percent.get(metric.name)
        if value is not None:
            yield row.model, value, value, value, _PUBLISHED
