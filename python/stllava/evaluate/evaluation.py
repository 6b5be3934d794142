"""Everything an evaluation says, as one object that every output is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.evaluate.answers import question_text
from stllava.evaluate.breakdown import groups_of
from stllava.evaluate.definitions import Metric
from stllava.evaluate.published import PublishedRow, rows_for
from stllava.evaluate.refusals import REFUSAL, unhelpful
from stllava.evaluate.report import VqaItem
from stllava.evaluate.scoring import Comparison, Score, Scoring, System, compare, score_answers, scores_of
from stllava.evaluate.vqa import is_open

__all__ = ["SCHEMA", "Answers", "Evaluation", "Group", "Rival", "evaluate"]

SCHEMA = "stllava.eval/1"
"""Of `Evaluation.as_dict`: the number grows when a reader of the older form could go wrong."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Rows ``{"question_id" or "id", "text"}`` of a system. note: what it is, for readers."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Rival:
    """A system beside the evaluated one, a baseline or another model; comparison: evaluated - this."""

    system: System
    note: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Group:
    """Items of one modality, organ, ...; scores: the primary metrics, without interval where fewer than `Scoring.min_group` items make them."""

    name: str
    n_open: int
    n_closed: int
    scores: tuple[Score, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"open": self.n_open, "closed": self.n_closed, "scores": [score.as_dict() for score in self.scores]}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """benchmark: its name where it is a published one. items: the records that were scored, in the order of `system.items`. empty, refused: items
    whose answer says nothing, see `refusals`. facts: whatever else a reader has to know, such as template and checkpoint."""

    title: str
    benchmark: str | None
    how: Scoring
    items: tuple[Mapping[str, Any], ...]
    system: System
    baselines: tuple[Rival, ...]
    other: Rival | None
    groups: Mapping[str, Sequence[Group]]
    published: Sequence[PublishedRow]
    published_note: str
    empty: Sequence[VqaItem]
    refused: Sequence[VqaItem]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rivals(self) -> tuple[Rival, ...]:
        return (*(() if self.other is None else (self.other,)), *self.baselines)

    @property
    def primary(self) -> list[Metric]:
        """The metrics that tables, comparisons and groups show, as far as they were computed."""
        return [metric for metric in self.how.primary if metric in self.system.metrics]

    @property
    def counts(self) -> dict[str, int]:
        report = self.system.report
        return {"open": report.n_open, "closed": report.n_closed, "skipped": report.n_skipped, "unanswered": report.n_unanswered,
                "surplus": report.n_surplus, "empty": len(self.empty), "refused": len(self.refused)}

    @property
    def n_refused_right(self) -> int:
        """Refusals of closed items that the primary metric takes for right: substrings."""
        closed = next(metric for metric in self.primary if not metric.is_open)
        refused = {item.id for item in self.refused if not item.is_open}
        values = self.system.values[:, self.system.metrics.index(closed)].tolist()
        return sum(item.id in refused and value == 1.0 for item, value in zip(self.system.items, values, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; fractions in [0, 1], published rows in per cent."""
        def rival(one: Rival) -> dict[str, Any]:
            return {"name": one.system.name, "note": one.note, "scores": [score.as_dict() for score in one.system.scores],
                    "comparison": one.comparison.as_dict()}

        return {
            "schema": SCHEMA, "title": self.title, "benchmark": self.benchmark, "model": self.system.name, "counts": self.counts,
            "closed_variant": self.how.closed, "method": self.how.method, "refusal_definition": REFUSAL,
            "definitions": {metric.id: metric.text for metric in self.system.metrics},
            "scores": [score.as_dict() for score in self.system.scores],
            "baselines": [rival(one) for one in self.baselines], "compared_with": None if self.other is None else rival(self.other),
            "groups": {heading: {group.name: group.as_dict() for group in groups} for heading, groups in self.groups.items()},
            "published": {"note": self.published_note, "rows": [
                {"model": row.model, "percent": dict(row.percent), "source": row.source, "caveats": list(row.caveats),
                 "unattainable": row.unattainable} for row in self.published]},
            "empty": [item.id for item in self.empty], "refused": [item.id for item in self.refused],
            "n_refused_right": self.n_refused_right, "facts": dict(self.facts),
            "items": [self._item(row) for row in range(len(self.items))]}

    def question(self, row: int) -> str:
        """What an item asks, without the image's marker."""
        return str(question_text(self.items[row])).replace(DEFAULT_IMAGE_TOKEN, "").strip()

    def _item(self, row: int) -> dict[str, Any]:
        item = self.system.items[row]
        return {"id": item.id, "image": self.system.images[row], "question": self.question(row),
                "type": "open" if item.is_open else "closed", "reference": item.reference, "answer": item.prediction,
                "reference_normalised": item.reference_normalised, "answer_normalised": item.prediction_normalised,
                "values": {name: dict(report.items[row].values) for name, report in self.system.reports.items()}}

    def __repr__(self) -> str:
        return f"Evaluation({self.title!r}: {self.system.name}, {len(self.items)} items)"

    def _repr_html_(self) -> str:
        from stllava.evaluate.render.notebook import evaluation_html
        return evaluation_html(self)


def evaluate(items: Sequence[Mapping[str, Any]], answers: Answers, how: Scoring | None = None, *, title: str = "", benchmark: str | None = None,
             baselines: Iterable[Answers] = (), other: Answers | None = None, facts: Mapping[str, Any] | None = None) -> Evaluation:
    """Scores answers, and baselines and another model beside them.

    Args:
        items: VQA items, see `evaluate_vqa`. benchmark: a name of `published.SPLITS`, where the items are of it.

    Raises:
        FormatError: see `evaluate_vqa`.
    """
    how = how or Scoring()
    system = score_answers(answers.name, items, answers.rows, how)
    scored = tuple(item for item in items if is_open(item) is not None)

    def rival(given: Answers, how: Scoring = how) -> Rival:
        theirs = score_answers(given.name, items, given.rows, how)
        return Rival(theirs, given.note, compare(system, theirs, how))

    report = system.report
    published, note = rows_for(benchmark, report.n_open, report.n_closed)
    groups = {heading: [_group(system, how, name, rows) for name, rows in found.items()] for heading, found in groups_of(scored).items()}
    empty, refused = unhelpful(system.items)
    return Evaluation(title, benchmark, how, scored, system, tuple(rival(one) for one in baselines), None if other is None else rival(other), groups,
                      published, note, empty, refused, dict(facts or {}))


def _group(system: System, how: Scoring, name: str, rows: Sequence[int]) -> Group:
    scores = tuple(replace(score, low=None, high=None) if score.n < how.min_group else score for score in scores_of(system, how, rows, how.primary))
    n_open = sum(system.items[row].is_open for row in rows)
    return Group(name, n_open, len(rows) - n_open, scores)
