"""The demo's page: one HTML file with its pictures inside, which needs neither network nor scripts."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stllava.checkpoint.atomic import write_bytes
from stllava.data.pictures import Pictures
from stllava.html_template import html_template
from stllava.model import LlavaModel

from .baselines import Scores, answer_greedily
from .questions import CLOSED, OPEN
from .sources import WHEELS
from .summary import COLUMNS, delta_text, score_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Samples", "write_report"]

N_ASKED, N_TEST = 6, 8  # images shown
TERMS = {
    "nilearn": "MNI152 head templates: permissive notice of McGill University",
    "nibabel": "functional MRI: MIT",
    "scikit-image": "retina and cell: CC0; histology: no known restrictions",
    "pydicom": "CT, abdomen MRI, Doppler and echo test files: no restriction known",
}
REASONS = {
    "repeated": "asked before about the same image", "empty": "no text", "unknown_question": "not a question of the demo's language",
    "one_answer": "all sampled answers alike", "unread": "the judge gave no score: the truth is not certain", "tie": "equal scores",
    "unbalanced": "surplus of chosen yes or no",
}
MODELS = ("base", "sft", "dpo")
COLOURS = {"base": "#9aa5b1", "sft": "#4c8bd6", "dpo": "#e08a2e", "baseline": "#cbb8e0"}


@dataclass(frozen=True, slots=True)
class Samples:
    """Images shown on the page, drawn at random with the run's seed, good and bad alike.

    asked: of the unlabelled images, ``{"picture", "description", "questions": [{"question", "candidates" (best first), "before", "after"}]}``.
    test: ``{"picture", "rows": [{"question", "reference", "answers": [(text, value) of base, sft, dpo]}]}``. Pictures are PNG bytes.
    """

    asked: list[dict[str, Any]]
    test: list[dict[str, Any]]

    @classmethod
    def draw(cls, seed: int, items: Seq[Mapping[str, Any]], texts: Mapping[str, Mapping[str, str]], scores: Mapping[str, Scores],
             judged: Seq[Mapping[str, Any]], descriptions: Mapping[str, str], sft: LlavaModel, dpo: LlavaModel, pictures: Pictures) -> Samples:
        """Greedy answers of both models to the questions shown are computed here. `pictures`: file name -> image; an id is its file's stem."""
        rng = np.random.Generator(np.random.Philox(key=[seed, 0x5A3B1E]))
        chosen = _pick(list(dict.fromkeys(row["image"] for row in judged)), N_ASKED, rng)
        rows = [row for row in judged if row["image"] in chosen]
        questions = [{"id": row["id"], "image": f"{row['image']}.png", "text": row["question"]} for row in rows]
        before, after = (answer_greedily(model, questions, pictures, "report") for model in (sft, dpo))
        asked = [{"picture": pictures.store.read(f"{name}.png"), "description": descriptions[name], "questions": [
            {"question": row["question"], "before": before[row["id"]], "after": after[row["id"]],
             "candidates": sorted(row["candidates"], key=lambda c: -1 if c["score"] is None else c["score"], reverse=True)}
            for row in rows if row["image"] == name]} for name in chosen]
        test = [{"picture": pictures.store.read(name), "rows": [
            {"question": item["conversations"][0]["value"].replace("<image>", "").strip(), "reference": item["conversations"][1]["value"],
             "answers": [(texts[model][item["id"]], scores[model].values[item["id"]]) for model in MODELS]}
            for item in items if item["image"] == name]} for name in _pick(list(dict.fromkeys(item["image"] for item in items)), N_TEST, rng)]
        return cls(asked, test)


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any], sft_log: Seq[Mapping[str, Any]], dpo_log: Seq[Mapping[str, Any]],
                 samples: Samples) -> None:
    """Writes the page; logs are `TrainerState.log_history`, one entry an update."""
    template = html_template("stllava.demo", "report.html.j2", png=png_address, percent=lambda value: f"{100 * value:.1f} %", delta=delta_text)
    curves = figure_png((9, 2.6), 3, lambda axes: draw_curves(axes, sft_log, dpo_log))
    by_type = figure_png((9, 3.2), 1, lambda axes: draw_types(axes[0], results))
    page = template.render(results=results, details=results["details"], columns=[title for _, _, title in COLUMNS], groups=score_groups(results),
                           curves=curves, by_type=by_type, samples=samples, wheels=WHEELS, terms=TERMS, reasons=REASONS)
    write_bytes(Path(path), page.encode("utf-8"))


def png_address(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def figure_png(size: tuple[float, float], n_axes: int, draw: Callable[[Seq[Axes]], None]) -> bytes:
    """A figure in inches without any global state of matplotlib, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure: Figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, n_axes, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#e6e9ed", linewidth=0.8)
        one.set_axisbelow(True)
        one.tick_params(labelsize=8)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_curves(axes: Seq[Axes], sft_log: Seq[Mapping[str, Any]], dpo_log: Seq[Mapping[str, Any]]) -> None:
    for one, log, key, title, colour in ((axes[0], sft_log, "loss", "stage 1: loss per token", "sft"),
                                         (axes[1], dpo_log, "rewards/accuracies", "stage 2: reward accuracy", "dpo"),
                                         (axes[2], dpo_log, "rewards/margins", "stage 2: reward margin", "dpo")):
        steps, values = [row["step"] for row in log], np.array([row[key] for row in log])
        one.plot(steps, values, color=COLOURS[colour], alpha=0.35, linewidth=1)
        one.plot(steps, _smooth(values), color=COLOURS[colour], linewidth=1.8)
        one.set_title(title, fontsize=9)
        one.set_xlabel("update", fontsize=8)


def draw_types(one: Axes, results: Mapping[str, Any]) -> None:
    found = results["evaluation"]["base"]["by_type"]
    kinds = [kind for kind in (*CLOSED, *OPEN) if kind in found]
    places = np.arange(len(kinds))
    free = [max(results["baselines"][name]["by_type"][kind]["value"] for name in ("majority", "no_image")) for kind in kinds]
    one.bar(places, free, width=0.92, color=COLOURS["baseline"], alpha=0.5, label="best image-free baseline")
    for number, name in enumerate(MODELS):
        values = [results["evaluation"][name]["by_type"][kind]["value"] for kind in kinds]
        label = {"base": "base", "sft": "after SFT", "dpo": "after DPO"}[name]
        one.bar(places + (number - 1) * 0.26, values, width=0.24, color=COLOURS[name], label=label)
    one.set_xticks(places, [f"{kind}\n{found[kind]['metric']}" for kind in kinds], fontsize=7)
    one.set_ylim(0, 1.02)
    one.set_xlim(-0.6, len(kinds) - 0.4)
    one.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over the last updates, about an eighth of the run."""
    width = max(1, len(values) // 8)
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    means: np.ndarray = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def _pick(names: Seq[str], n: int, rng: np.random.Generator) -> list[str]:
    return [names[i] for i in sorted(rng.permutation(len(names))[:n])]
