"""Published rows, as a reference beside one's own: percentages, the split they belong to, and what has to be known about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stllava.data import benchmarks
from stllava.evaluate.statistics import is_attainable

__all__ = ["PUBLISHED", "SPLITS", "PublishedRow", "rows_for"]

SPLITS = {name: (benchmarks.PUBLISHED[name, "test"][0].open, benchmarks.PUBLISHED[name, "test"][0].closed) for name in benchmarks.BENCHMARKS}
"""Benchmark -> open and closed items of the test split that published numbers belong to (SLAKE: English; PathVQA: LLaVA-Med's 6761)."""

_ZOO = "STLLaVA-Med, MODEL_ZOO"
_FIGURE = "STLLaVA-Med, figure of the paper"
_NOTEBOOK = "LLaVA-Med 1.0, results notebook"
_MMEDPO = "MMedPO (ICML 2025), independent runs"
_BASE = "another base model (LLaVA-Med v1.5) and scripts of its own: the metric's variant is not stated"
_TUNED = "fine-tuned on this data set's training split; the other rows are zero-shot"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """`percent`: metric name (`stllava.evaluate.definitions`) -> as printed."""

    model: str
    benchmark: str
    percent: Mapping[str, float]
    source: str
    caveats: tuple[str, ...] = field(default=())

    @property
    def unattainable(self) -> dict[str, float]:
        """Closed accuracies that no number of right answers among the split's closed items gives."""
        n_closed = SPLITS[self.benchmark][1] or 0
        return {name: value for name, value in self.percent.items() if name.startswith("closed_accuracy") and not is_attainable(value, n_closed)}


def _rows(model: str, source: str, *caveats: str, **values: tuple[float | None, float | None, float | None]) -> Iterator[PublishedRow]:
    """values: vqa_rad, slake, pathvqa -> recall, F1, closed."""
    for name, found in values.items():
        named = zip(("open_recall", "open_f1", "closed_accuracy_batch"), found, strict=True)
        yield PublishedRow(model, name.replace("_", "-"), {metric: value for metric, value in named if value is not None}, source, caveats)


PUBLISHED = (
    *_rows("STLLaVA-Med 7B", _ZOO, vqa_rad=(37.12, 10.83, 60.35), slake=(46.69, 11.46, 57.69), pathvqa=(11.92, 2.72, 52.90)),
    *_rows("LLaVA-Med, as compared by STLLaVA-Med", _FIGURE, vqa_rad=(32.68, None, 59.56), slake=(40.84, None, 46.88), pathvqa=(12.03, None, 55.23)),
    *_rows("LLaVA-7B v0 (general)", _NOTEBOOK, vqa_rad=(20.74, 3.78, 59.19), slake=(26.82, 4.82, 50.24), pathvqa=(8.74, 1.56, 45.65)),
    *_rows("LLaVA-Med 60k-IM, 3 epochs", _NOTEBOOK, vqa_rad=(28.23, None, 61.40), slake=(39.17, None, 52.16), pathvqa=(12.30, None, 54.05)),
    *_rows("LLaVA-Med Vicuna-7B", _NOTEBOOK, vqa_rad=(31.71, 8.75, 59.93), slake=(38.06, 7.55, 50.96), pathvqa=(11.11, 2.50, 49.34)),
    *_rows("LLaVA-Med, fine-tuned per data set, 9 epochs", _NOTEBOOK, _TUNED, vqa_rad=(64.39, None, 81.99), slake=(84.83, None, 83.65),
           pathvqa=(37.76, None, 91.65)),
    *_rows("LLaVA-Med v1.5", _MMEDPO, _BASE, vqa_rad=(29.24, None, 63.97), slake=(44.26, None, 61.30)),
    *_rows("LLaVA-Med v1.5 + STLLaVA-Med", _MMEDPO, _BASE, vqa_rad=(30.17, None, 64.38), slake=(48.65, None, 61.75)),
)


def rows_for(benchmark: str | None, n_open: int, n_closed: int) -> tuple[list[PublishedRow], str]:
    """Rows of a benchmark whose split has these counts, and what to say: why there are none, or what to think of them.

    The benchmark may be unknown (None): then the counts alone decide, and the text says so.
    """
    name = benchmark if benchmark in SPLITS else next((name for name, counts in SPLITS.items() if counts == (n_open, n_closed)), None)
    if name is None:
        return [], "No published row is known for this test set."
    if SPLITS[name] != (n_open, n_closed):
        wanted = " open and ".join(map(str, SPLITS[name]))
        return [], f"Published {name} rows are not shown: they belong to {wanted} closed items, here are {n_open} and {n_closed}."
    rows = [row for row in PUBLISHED if row.benchmark == name]
    told = ["Numbers as printed there, for orientation: prompts, decoding and splits are the authors'; none has an interval."]
    if name != benchmark:
        told.insert(0, f"Taken for {name} by its number of items.")
    told += [f"{row.model}: {'; '.join(row.caveats)}." for row in rows if row.caveats]
    told += [f"{row.model}: {metric} {value:.2f} is not k of {n_closed} items." for row in rows for metric, value in row.unattainable.items()]
    return rows, " ".join(told)
