"""What a notebook shows: progress, a loss that is drawn while it falls, pictures beside answers. HTML and SVG alone, so no widgets are needed."""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from stllava.images import load_image
from stllava.progress import in_notebook
from stllava.train.callbacks import TrainerCallback

__all__ = ["LossPlot", "NotebookBar", "PictureTable"]

SECONDS = 0.3
"""Between two drawings."""
_COUNTS = "{n_fmt}/{total_fmt} {unit}s, {elapsed} + {remaining}, {rate_fmt}{postfix}"


class NotebookBar(tqdm):  # type: ignore[type-arg]
    """tqdm whose bar is one element of a cell's output. ``tqdm.auto`` needs ipywidgets for that, and leaves nothing in a stored notebook."""

    def __init__(self, **settings: Any) -> None:
        self._shown: Any = None
        super().__init__(**settings, file=io.StringIO(), mininterval=SECONDS)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self._shown = _show(self, self._shown)

    def __repr__(self) -> str:
        return self.format_meter(**{**self.format_dict, "ncols": None, "bar_format": "{desc}: " + _COUNTS})

    def _repr_html_(self) -> str:
        counts = self.format_meter(**{**self.format_dict, "ncols": None, "bar_format": _COUNTS})
        return (f'<span style="font-family:monospace">{escape(self.desc.removesuffix(": "))} '
                f'<progress max="{self.total}" value="{self.n}" style="vertical-align:middle"></progress> {escape(counts)}</span>')


class LossPlot(TrainerCallback):
    """A callback that draws numbers of the log while training goes on, one curve each; show it afterwards by naming it in a cell.

    Args:
        metrics: keys of the log entries, such as ``"loss"``, ``"eval_loss"``, ``"rewards/accuracies"``. Thin: the values; thick: their running mean.
    """

    def __init__(self, *metrics: str) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {metric: [] for metric in metrics or ("loss",)}
        self._shown: Any = None
        self._drawn = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown = None  # a new run, a new place
        for metric, points in self.points.items():  # what a resumed run logged before
            points[:] = [(row["step"], row[metric]) for row in state.log_history if metric in row]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for metric, points in self.points.items():
            if metric in kwargs["logs"]:
                points.append((state.global_step, float(kwargs["logs"][metric])))
        if time.monotonic() - self._drawn > SECONDS:
            self._draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._draw()

    def _draw(self) -> None:
        if in_notebook():
            self._shown = _show(self, self._shown)
        self._drawn = time.monotonic()

    def __repr__(self) -> str:
        ends = [f"{metric} {points[0][1]:.4g} to {points[-1][1]:.4g} in {points[-1][0]} steps" for metric, points in self.points.items() if points]
        return f"LossPlot({'; '.join(ends) or 'nothing yet'})"

    def _repr_html_(self) -> str:
        return "".join(_curve(metric, points) for metric, points in self.points.items() if points) or repr(self)


class PictureTable:
    """A table with pictures in it, to be shown by a notebook.

    Args:
        rows: column -> value. A picture is a `Path`, the bytes of a file, a PIL image or a ``uint8`` RGB array; everything else is shown as text.
        size: of pictures, their longer side in pixels. They are made smaller to that, so that a notebook stays small.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], size: int = 96) -> None:
        self.rows, self.size = [dict(row) for row in rows], size

    def __repr__(self) -> str:
        return "\n".join("   ".join("(picture)" if _is_picture(value) else str(value) for value in row.values()) for row in self.rows)

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        head = "".join(f'<th style="text-align:left">{escape(column)}</th>' for column in columns)
        body = "".join("<tr>" + "".join(f'<td style="text-align:left">{self._cell(row.get(column, ""))}</td>' for column in columns) + "</tr>"
                       for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cell(self, value: Any) -> str:
        if not _is_picture(value):
            return escape(str(value)).replace("\n", "<br>")
        picture = Image.fromarray(value if isinstance(value, np.ndarray) else load_image(value).rgb)
        picture.thumbnail((self.size, self.size))
        png = io.BytesIO()
        picture.save(png, format="PNG")
        return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" style="height:{self.size}px" alt="">'


def _is_picture(value: Any) -> bool:
    return isinstance(value, (Path, bytes, Image.Image)) or (isinstance(value, np.ndarray) and value.ndim == 3)


def _show(what: object, shown: Any) -> Any:
    """Shows it, or shows it anew where it was shown."""
    from IPython.display import display
    if shown is None:
        return display(what, display_id=True)  # type: ignore[no-untyped-call]
    shown.update(what)
    return shown


# ---- a curve -----------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 170, 56, 24, 20
MOST_POINTS = 400


def _curve(title: str, points: Sequence[tuple[int, float]]) -> str:
    """An SVG of (step, value); values that are not finite are left out."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return f"<p>{escape(title)}: no finite value</p>"
    steps, values = np.array(finite, np.float64).T
    low, high = float(values.min()), float(values.max())
    span = high - low or abs(high) or 1.0
    first, last = float(steps[0]), float(steps[-1])

    def path(heights: np.ndarray) -> str:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).round().astype(int))
        x = LEFT + (steps[kept] - first) / max(last - first, 1.0) * (WIDTH - LEFT - 8)
        y = HEIGHT - BOTTOM - (heights[kept] - low) / span * (HEIGHT - BOTTOM - TOP)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    window = min(len(values), max(1, len(values) // 10))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    smooth = (sums[ends] - sums[begins]) / (ends - begins)
    marks = "".join(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>'
                    for y, value in ((TOP + 6, low + span), (HEIGHT - BOTTOM, low)))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="11">'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
            f'<path d="M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - 8}" fill="none" stroke="#999"/>'
            f'<text x="{LEFT}" y="12" font-weight="bold">{escape(title)} {values[-1]:.4g}</text>{marks}'
            f'<text x="{LEFT}" y="{HEIGHT - 8}">{first:.0f}</text><text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">step {last:.0f}</text>'
            f'<polyline points="{path(values)}" fill="none" stroke="#9ec5e8"/>'
            f'<polyline points="{path(smooth)}" fill="none" stroke="#1f77b4" stroke-width="2"/></svg>')
