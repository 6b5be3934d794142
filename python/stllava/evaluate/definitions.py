"""Every number that a report may show: its name with the version of its definition, what it is, and from which items it is made.

A version changes when the same answers could give another value. Names without a set's name are those of `compat`, which published numbers use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stllava.evaluate.report import DEFINITION, VqaReport
from stllava.evaluate.vqa import ClosedVariant, MetricSet

__all__ = ["CLOSED_VARIANTS", "METRICS", "METRIC_SETS", "Metric", "metrics_of", "primary_metrics"]

METRIC_SETS: tuple[MetricSet, ...] = ("compat", "strict")
CLOSED_VARIANTS: tuple[ClosedVariant, ...] = ("batch", "run_eval", "pvqa")


@dataclass(frozen=True, slots=True)
class Metric:
    """`key`: where `VqaItem.values` has it. share: an item gives 0 or 1, so the mean is k of n. text: the definition in a sentence."""

    name: str
    metric_set: MetricSet
    is_open: bool
    key: str
    label: str
    share: bool
    text: str
    version: str = DEFINITION

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    def values(self, report: VqaReport) -> list[float | None] | None:
        """One value per item of the metric's kind, in the report's order, None where the definition leaves it out; None alone: not computed."""
        items = [item for item in report.items if item.is_open == self.is_open]
        return [item.values[self.key] for item in items] if not items or self.key in items[0].values else None


def _open(name: str, key: str, label: str, share: bool, text: str) -> Metric:
    return Metric(name, "compat", True, key, label, share, text)


def _closed(name: str, key: str, label: str, share: bool, text: str) -> Metric:
    return Metric(name, "compat", False, key, label, share, text)


def _strict(is_open: bool, key: str, label: str, share: bool, text: str) -> Metric:
    kind = "open" if is_open else "closed"
    return Metric(f"strict_{kind}_{'accuracy' if key == 'hit' else key}", "strict", is_open, key, f"{kind} {label}", share, text)


METRICS = (
    _open("open_recall", "recall", "open recall", False,
          "Share of the reference's words that the answer has; the answer's repetitions count. \"Recall\" or \"Open\" of published tables."),
    _open("open_f1", "f1", "open F1", False, "Harmonic mean of precision and recall of words, per item."),
    _open("open_precision", "precision", "open precision", False, "Share of the answer's words that the reference has."),
    _open("open_exact_match", "exact_match", "open \"exact match\"", False,
          "Distinct reference words found in the answer, divided by the number of the answer's words: a word precision, despite its name."),
    _open("open_accuracy_batch", "open_hit_batch", "open accuracy (batch)", True, "The reference is a character substring of the answer."),
    _open("open_accuracy_run_eval", "open_hit_run_eval", "open accuracy (run_eval)", True,
          "Of the candidate answers, the one that shares the largest part of its words with the answer is the reference."),
    _open("open_bleu", "bleu", "open BLEU", False, "Sentence BLEU, orders 1 to 4, no smoothing."),
    _open("open_bleu_1", "bleu_1", "open BLEU-1", False, "Sentence BLEU, order 1 alone."),
    _open("open_bleu_2", "bleu_2", "open BLEU-2", False, "Sentence BLEU, order 2 alone."),
    _open("open_bleu_3", "bleu_3", "open BLEU-3", False, "Sentence BLEU, order 3 alone."),
    _closed("closed_accuracy_batch", "closed_hit_batch", "closed accuracy (batch)", True,
            "The reference is a character substring of the answer (\"no\" is in \"abnormal\"). The published numbers' variant."),
    _closed("closed_accuracy_run_eval", "closed_hit_run_eval", "closed accuracy (run_eval)", True,
            "As batch, if \"yes\" or \"no\" is a character substring of the answer; else wrong."),
    _closed("closed_accuracy_pvqa", "closed_pvqa", "closed accuracy (pvqa)", True,
            "As run_eval, but an answer with yes or no and without the reference is left out of the mean: too high."),
    _closed("closed_recall", "recall", "closed recall", False, "Open recall's formula, over closed items."),
    _strict(True, "recall", "recall", False, "Share of the reference's words that the answer has, each counted at most as often as it stands there."),
    _strict(True, "f1", "F1", False, "Harmonic mean of precision and recall with true multiset overlap, per item."),
    _strict(True, "precision", "precision", False, "Share of the answer's words that the reference has, each counted at most as often as there."),
    _strict(True, "exact_match", "exact match", True, "Answer and reference are the same words in the same order."),
    _strict(True, "hit", "accuracy", True, "The reference's words stand in the answer as neighbours."),
    _strict(False, "hit", "accuracy", True, "Yes/no references: the first of the words yes and no in the answer decides; others: as open accuracy."),
    _strict(False, "recall", "recall", False, "Strict open recall's formula, over closed items."),
)


def metrics_of(metric_sets: Iterable[MetricSet]) -> list[Metric]:
    chosen = set(metric_sets)
    return [metric for metric in METRICS if metric.metric_set in chosen]


def primary_metrics(metric_sets: Sequence[MetricSet], closed: str) -> list[Metric]:
    """The three of each set that tables, comparisons and breakdowns show: recall and F1 of open items, accuracy of closed ones (compat: `closed`)."""
    names = {"compat": ("open_recall", "open_f1", f"closed_accuracy_{closed}"),
             "strict": ("strict_open_recall", "strict_open_f1", "strict_closed_accuracy")}
    wanted = {name for metric_set in metric_sets for name in names[metric_set]}
    return [metric for metric in METRICS if metric.name in wanted]
