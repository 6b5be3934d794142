"""An evaluation as one HTML page: scores, baselines, groups, and the worst errors with their pictures. It needs neither network nor scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from stllava.data.steps import item_seed
from stllava.errors import FormatError
from stllava.evaluate.evaluation import Evaluation
from stllava.html_template import html_template
from stllava.image_source import HEAD_BYTES, read_source, shown_name
from stllava.images import load_image

from .intervals import intervals_svg
from .terminal import counts_line, interval, p_value, percent, unhelpful_line

__all__ = ["N_SHOWN", "WorstError", "html_page", "worst_errors"]

N_SHOWN = 12
"""Errors shown of each kind, open and closed."""
_SIDE = 224  # pixels of a picture in the page


@dataclass(frozen=True, slots=True)
class WorstError:
    """`row` of the evaluation's items. values: primary metrics, as text. picture: an address with the picture in it, or why there is none."""

    row: int
    id: str
    question: str
    reference: str
    answer: str
    reference_normalised: str
    answer_normalised: str
    values: str
    picture: str | None
    why: str


def worst_errors(evaluation: Evaluation, is_open: bool, image_of: Callable[[str], Any] | None, n: int = N_SHOWN) -> list[WorstError]:
    """The items of a kind with the least value in its last primary metrics, wrong ones only; of equals a draw that the seed decides.

    image_of: image name -> what `load_image` takes; None: no pictures.
    """
    metrics = [metric for metric in evaluation.primary if metric.is_open == is_open]
    if not metrics:
        return []
    columns = [evaluation.system.metrics.index(metric) for metric in metrics]
    last = columns[-2:] if is_open else columns[-1:]  # recall and F1; accuracy
    items = evaluation.system.items

    def rank(row: int) -> tuple[float, ...]:
        return (*(float(evaluation.system.values[row, column]) for column in last), item_seed(evaluation.how.seed, "worst", ascii(items[row].id)))

    wrong = [row for row, item in enumerate(items) if item.is_open == is_open and evaluation.system.values[row, last[0]] < 1.0]
    found = []
    for row in sorted(wrong, key=rank)[:n]:
        item, name = items[row], evaluation.system.images[row]
        values = ", ".join(f"{metric.name} {evaluation.system.values[row, column]:.2f}" for metric, column in zip(metrics, columns, strict=True))
        picture, why = (None, "no picture") if name is None or image_of is None else picture_address(name, image_of)
        found.append(WorstError(row, str(item.id), evaluation.question(row), item.reference, item.prediction or "",
                                item.reference_normalised, item.prediction_normalised, values, picture, why))
    return found


def picture_address(name: str, image_of: Callable[[str], Any]) -> tuple[str | None, str]:
    """(data address, name), the picture made small; (None, why not). Medical files have no name here, which may be a patient's."""
    called = _called(name)
    try:
        source = image_of(name)
        called = _called(name, read_source(source, HEAD_BYTES).kind)
        image = Image.fromarray(load_image(source).rgb)
    except (FormatError, OSError) as error:
        return None, f"{name}: {error}" if called == name else f"{called} that cannot be read"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), called


def _called(name: str, kind: str = "") -> str:
    return name if shown_name(name, kind) == name else "a medical file"  # not the shown name, which is another in every process


def html_page(evaluation: Evaluation, image_of: Callable[[str], Any] | None = None) -> str:
    """The page. Raises ModuleNotFoundError without jinja2 (extra `report`)."""
    from markupsafe import Markup
    template = html_template("stllava.evaluate.render", "report.html.j2", percent=percent, interval=interval, p=p_value)
    charts = [Markup(intervals_svg(evaluation, metric)) for metric in evaluation.primary if evaluation.system.score(metric).n]  # it escapes its texts
    return template.render(evaluation=evaluation, charts=charts, counts=counts_line(evaluation), unhelpful=unhelpful_line(evaluation),
                           errors=[(kind, worst_errors(evaluation, kind == "open", image_of)) for kind in ("closed", "open")])
