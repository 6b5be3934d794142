"""Thresholds on metrics, for tests: what a marker says, answers computed once and kept, and a text that tells how far a model is from its mark."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava import __version__
from stllava.checkpoint.atomic import make_directory
from stllava.checkpoint.lock import LockedError
from stllava.conv_mode import choose_conv_mode, model_name_of
from stllava.data.benchmarks import read_benchmark
from stllava.data.records import read_jsonl, read_records
from stllava.errors import did_you_mean
from stllava.evaluate.answers import Question, answer_questions, read_questions
from stllava.evaluate.definitions import CLOSED_VARIANTS, METRIC_SETS, METRICS, Metric
from stllava.evaluate.pictures import ItemPictures
from stllava.evaluate.report import VqaReport
from stllava.evaluate.statistics import bootstrap_intervals
from stllava.evaluate.vqa import evaluate_vqa
from stllava.model import LlavaModel

__all__ = ["Evaluations", "Vqa", "read_markers"]

WORST = 10
"""Wrong answers that a failure shows."""
WIDTH = 44
"""Characters of a question or an answer in that table."""
PATIENCE = 1800
"""Seconds to wait for another process that writes the same answers."""

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str, os.PathLike), "text"), "int": ((int,), "whole number"), "float": ((int, float), "number")}


@dataclass(frozen=True, slots=True)
class Vqa:
    """One evaluation, and the threshold it has to reach if `metric` is given.

    Args:
        model: checkpoint directory, or .gguf file. model_base: the base an adapter directory belongs to.
        data: a file of LLaVA-Med test items; or, if it is a directory or `benchmark` is given, what
            :func:`stllava.data.benchmarks.read_benchmark` reads, with `benchmark`, `split` and `language`.
        image_folder: where `image` names start; default: the folder of the data.
        metric: name of `stllava.evaluate.definitions.METRICS`, with or without version and set: "closed accuracy" is that of `metric_set` and,
            in ``"compat"``, of the variant `closed`. at_least: a fraction in [0, 1].
        template: default: what the checkpoint seems to be made with. max_new_tokens: of each answer.
    """

    model: str
    data: str
    metric: str | None = None
    at_least: float | None = None
    image_folder: str | None = None
    model_base: str | None = None
    benchmark: str | None = None
    split: str = "test"
    language: str = "en"
    metric_set: str = "compat"
    closed: str = "batch"
    template: str | None = None
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            wanted, what = _KINDS[kind.removesuffix(" | None")]
            if (value is None and not kind.endswith(" | None")) or isinstance(value, bool) or not isinstance(value, (*wanted, type(None))):
                raise ValueError(f"{field.name} is {value!r}, want a {what}")
        for name, choices in (("metric_set", METRIC_SETS), ("closed", CLOSED_VARIANTS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}, want one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        if (self.metric is None) != (self.at_least is None):
            raise ValueError("metric and at_least go together, but " + ("metric" if self.metric is None else "at_least") + " is missing")
        if self.at_least is not None and not 0 <= self.at_least <= 1:
            hint = f"; for {self.at_least:g} per cent say {self.at_least / 100:g}" if 1 < self.at_least <= 100 else ""
            raise ValueError(f"at_least is {self.at_least:g}, want a fraction in [0, 1]{hint}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, want at least 1")
        if self.metric is not None:
            self.definition()

    def definition(self) -> Metric:
        """What `metric` names. Raises ValueError with the nearest name."""
        text, _, version = str(self.metric).partition("@")
        name = re.sub(r"[\s-]+", "_", text.strip().lower())
        known = {metric.name: metric for metric in METRICS if metric.metric_set == self.metric_set}
        short = {name.removeprefix("strict_"): metric for name, metric in known.items()}
        for kind in ("open", "closed"):
            if f"{kind}_accuracy_{self.closed}" in known:
                short[f"{kind}_accuracy"] = known[f"{kind}_accuracy_{self.closed}"]
        found = known.get(name) or short.get(name)
        if found is None:
            names = list(dict.fromkeys(["closed_accuracy", "open_accuracy", *short]))
            raise ValueError(f"metric {self.metric!r} is not in the set {self.metric_set}, which has {', '.join(names)}{did_you_mean(name, names)}")
        if version and version != found.version:
            raise ValueError(f"metric {self.metric!r}: this version of stllava computes definition {found.id}")
        return found


def read_markers(markers: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]], root: Path) -> list[Vqa]:
    """What the markers around a test ask for.

    Args:
        markers: positional and named arguments of each, the innermost first. What those without a metric say holds for the others, an inner one's
            word before an outer one's. root: where relative paths start.

    Returns:
        one entry per marker with a metric, or, without any, the one evaluation that they describe.

    Raises:
        ValueError: naming the argument, what was found and what is wanted.
    """
    names = [field.name for field in dataclasses.fields(Vqa)]
    shared: dict[str, Any] = {}
    for args, given in reversed(markers):
        if args:
            raise ValueError(f"@pytest.mark.vqa({args[0]!r}, ...): arguments need their names, as model={args[0]!r}")
        for name in given:
            if name not in names:
                raise ValueError(f"@pytest.mark.vqa has no argument {name!r}{did_you_mean(name, names)}; it has {', '.join(names)}")
        if "metric" not in given:
            shared |= given
    thresholds = [{**shared, **given} for _, given in markers if "metric" in given] or [shared]
    for given in thresholds:
        for name in ("model", "data"):
            if name not in given:
                raise ValueError(f"@pytest.mark.vqa: {name} is missing")
    try:
        found = [Vqa(**given) for given in thresholds]
    except ValueError as error:
        raise ValueError(f"@pytest.mark.vqa: {error}") from error
    return [_under(root, vqa) for vqa in found]


def _under(root: Path, vqa: Vqa) -> Vqa:
    """The same with whole paths, all of which exist."""
    paths: dict[str, Any] = {name: str(root / given) for name in ("model", "model_base", "data", "image_folder")
                             if (given := getattr(vqa, name)) is not None}
    for name, path in paths.items():
        if not Path(path).exists():
            raise ValueError(f"@pytest.mark.vqa: {name} is {os.fspath(getattr(vqa, name))!r}, but there is no {path}")
    return dataclasses.replace(vqa, **paths)


class Evaluations:
    """The evaluations of one test session: models loaded once, answers kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[str, LlavaModel] = {}
        self._reports: dict[Vqa, VqaReport] = {}
        self._pictures: dict[tuple[str | None, ...], ItemPictures] = {}
        self._digests: dict[str, str] = {}

    def model(self, path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None, **options: Any) -> LlavaModel:
        """`LlavaModel.from_pretrained`, once for equal arguments."""
        key = repr((os.fspath(path), model_base and os.fspath(model_base), sorted(options.items())))
        if key not in self._models:
            self._models[key] = LlavaModel.from_pretrained(path, model_base, **options)
        return self._models[key]

    def report(self, vqa: Vqa) -> VqaReport:
        """The scores of all answers.

        Raises:
            StllavaError, ValueError, OSError: the model, the data or a picture cannot be read, no such benchmark, split or template.
        """
        key = dataclasses.replace(vqa, metric=None, at_least=None)
        if key not in self._reports:
            self._reports[key] = evaluate_vqa(self.items(vqa), self.answers(vqa), vqa.metric_set, vqa.closed)  # type: ignore[arg-type] # both checked
        return self._reports[key]

    def items(self, vqa: Vqa) -> list[dict[str, Any]]:
        """The test set's."""
        return self._test_set(vqa).items

    def _test_set(self, vqa: Vqa) -> ItemPictures:
        key = (vqa.data, vqa.image_folder, vqa.benchmark, vqa.split, vqa.language)
        if key not in self._pictures:
            path = Path(vqa.data)
            items = read_benchmark(path, vqa.benchmark, vqa.split, vqa.language) if path.is_dir() or vqa.benchmark is not None else read_records(path)
            self._pictures[key] = ItemPictures(items, vqa.image_folder or (path if path.is_dir() else path.parent))
        return self._pictures[key]

    def answers(self, vqa: Vqa) -> list[dict[str, Any]]:
        """An answer for every question, kept ones where they are: the file's name has a digest of all that answers depend on."""
        pictures = self._test_set(vqa)
        questions = read_questions(pictures.items, vqa.data)
        pictures.require()
        digest = self._digest_of(vqa, questions, pictures)
        file = make_directory(self.folder) / f"{model_name_of(vqa.model)}.{Path(vqa.data).stem}.{digest[:16]}.jsonl"
        kept = {row["question_id"]: row for row in read_jsonl(file, cut_off=True)} if file.exists() else {}
        if all(question.id in kept for question in questions):
            return [kept[question.id] for question in questions]
        model = self.model(vqa.model, vqa.model_base)
        template, _warning = choose_conv_mode(vqa.template, model.config, model_name_of(vqa.model))
        waited = 0
        while True:
            try:
                return answer_questions(model, questions, pictures, template=template, out=file, progress=False,
                                        model_id=model_name_of(vqa.model), max_new_tokens=vqa.max_new_tokens)
            except LockedError:  # another worker of this session computes them; or a process elsewhere, which we do not wait for all night
                if waited >= PATIENCE:
                    raise
                time.sleep(1)
                waited += 1

    def missed(self, vqa: Vqa) -> str | None:
        """None if the threshold is reached, else how far it is: numbers, interval, and wrong answers."""
        assert vqa.at_least is not None
        report, metric = self.report(vqa), vqa.definition()
        values = metric.values(report)
        counted = [value for value in values or () if value is not None]  # a definition may leave items out
        mean = sum(counted) / len(counted) if counted else None
        if mean is not None and mean >= vqa.at_least:
            return None
        kind = "open" if metric.is_open else "closed"
        where = f"{model_name_of(vqa.model)} on {Path(vqa.data).name}"
        if values is None:
            return f"{metric.id} of {where}: not computed, it needs a list of candidate answers"
        if mean is None:
            return f"{metric.id} of {where}: no {kind} item to compute it from ({report.n_open} open, {report.n_closed} closed)"
        [[low, high]] = bootstrap_intervals(counted).tolist()
        lines = [f"{metric.id} of {where}: {mean:.4f} is below {vqa.at_least:g}", "",
                 f"- {metric.id} >= {vqa.at_least:.4f}", f"+ {metric.id} == {mean:.4f}   95 % interval {low:.4f} to {high:.4f}", ""]
        total = f"{len(counted)} {kind} items"
        if metric.share:
            needed = next(k for k in range(len(counted) + 1) if k / len(counted) >= vqa.at_least)
            total = f"{sum(counted):.0f} of {total} are right, {needed} have to be"
        lines.append(f"{total}; {report.variant}; at most {vqa.max_new_tokens} new tokens")
        return "\n".join(lines + self._worst(vqa, report, metric))

    def _worst(self, vqa: Vqa, report: VqaReport, metric: Metric) -> list[str]:
        questions = {str(question.id): question.text for question in read_questions(self.items(vqa), vqa.data)}
        wrong = [(value, item) for item in report.items
                 if item.is_open == metric.is_open and (value := item.values.get(metric.key)) is not None and value < 1]
        wrong.sort(key=lambda pair: pair[0])  # stable: of equals, the order of the file
        rows = [("value", "id", "question", "expected", "answer")]
        rows += [(f"{value:.2f}", _short(str(item.id)), _short(questions[str(item.id)]), _short(item.reference), _short(item.prediction or "(none)"))
                 for value, item in wrong[:WORST]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return ["", f"the worst {len(rows) - 1} of {len(wrong)} answers that are not right:", *(f"  {row}" for row in table)]

    # ---- what answers depend on --------------------------------------------------------------------------------------

    def _digest_of(self, vqa: Vqa, questions: Sequence[Question], pictures: ItemPictures) -> str:
        """Of the model's files, the questions, the pictures they show, and the settings. A tower that lies elsewhere counts by its name."""
        text = json.dumps([__version__, vqa.template, vqa.max_new_tokens, self._digest_of_model(vqa.model),
                           vqa.model_base and self._digest_of_model(vqa.model_base), questions, pictures.digest()])
        return hashlib.sha256(text.encode()).hexdigest()

    def _digest_of_model(self, path: str) -> str:
        if path not in self._digests:
            files = sorted(file for file in Path(path).iterdir() if file.is_file()) if Path(path).is_dir() else [Path(path)]
            self._digests[path] = _sha256(files)
        return self._digests[path]


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[:WIDTH - 1] + "…"
