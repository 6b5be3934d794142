"""The check as a whole: rows by processes, pictures by threads, then what rows and files share."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias

from stllava.conversation import Conversation, as_template
from stllava.data.formats import images_of
from stllava.data.image_store import ImageStore
from stllava.data.records import read_records
from stllava.errors import FormatError
from stllava.progress import progress_bar
from stllava.text.interface import AnyTokenizer

from . import overlap
from .kinds import KINDS, SEVERITIES, Finding, Found
from .pictures import Picture, PictureRules, digests, key_of, probe_all
from .rows import PAIR_SIDES, TextRules, pair_findings, printable, quoted, row_findings, short
from .tokens import Length, TokenRules, tokenise

__all__ = ["CheckSettings", "Form", "Report", "check_data"]

Form: TypeAlias = Literal["sft", "dpo"]

_CHUNK = 100  # rows handed to a process at a time; those that are handed out are finished when Ctrl-C comes
_FEW = 4000  # rows below which starting processes takes longer than they save
_KNOWN = frozenset({
    "id", "image", "images", "conversations", "conversatons", "domain", *PAIR_SIDES, "rejected_conversations", "q", "img", "p", "r", "prompt",
    "chosen", "rejected", "messages", "split", "q_lang", "qid", "answer_type", "question_type", "modality", "organ", "question_id", "pair_id",
    "fig_label", "fig_caption", "in_text_mention", "type", "content_type", "location", "question", "answer", "text", *overlap.PATIENT_FIELDS})
_A_FEW = 10  # findings of one kind that are always listed
_ANSWERS = ("yes", "no")


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What training would be started with, and how thoroughly to look.

    template: None: v1_sq for instructions, v1 for pairs, as `stllava sft` and `stllava dpo`. workers: processes for the rows, None: one per core.
    """

    template: str | None = None
    max_length: int | None = 2048
    sq_r: float = 0.5
    seed: int = 42
    form: Form | None = None
    patient_fields: tuple[str, ...] = overlap.PATIENT_FIELDS
    pictures: PictureRules = field(default_factory=PictureRules)
    workers: int | None = None
    show_progress: bool = False


@dataclass(slots=True)
class Report:
    """What was found. lengths: one per sequence (a pair has two), of the rows that can be tokenised; empty without a tokenizer."""

    data: str
    form: Form
    template: Conversation
    settings: CheckSettings
    records: list[dict[str, Any]]
    findings: list[Finding] = field(default_factory=list)
    lengths: list[tuple[int, Length]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tokens: TokenRules | None = None

    def counts(self) -> list[tuple[str, int]]:
        """(kind, findings), in the order of the table."""
        n = Counter(finding.kind for finding in self.findings)
        return [(kind, n[kind]) for severity in SEVERITIES for kind in KINDS if n[kind] and KINDS[kind].severity == severity]

    def n_of(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)


def check_data(data: str | Path | Iterable[dict[str, Any]], image_folder: str | Path | None = None, *, tokenizer: AnyTokenizer | None = None,
               tokens_per_image: int = 576, against: Sequence[str | Path] = (), against_image_folder: str | Path | None = None,
               settings: CheckSettings | None = None) -> Report:
    """Everything the check can say before training.

    Args:
        data: instruction rows, VQA items or preference pairs, in any form `read_records` takes. image_folder: None: names are relative to here.
        tokenizer, tokens_per_image: of the model that is to be trained; without one nothing is said about lengths and labels.
        against: files with which the data must share no image, patient or question; their images lie in `against_image_folder`, None: `image_folder`.
            Of a set that holds several splits, the data is the train split, and these are the test split.

    Raises:
        ConfigError: unknown template. FormatError: one of `against` cannot be read; trouble with `data` itself is a finding.
    """
    settings = settings or CheckSettings()
    name = str(data) if isinstance(data, (str, Path)) else "data"
    try:
        records = read_records(data, "train")
    except FormatError as error:
        template = as_template(settings.template or "v1")
        return Report(name, settings.form or "sft", template, settings, [], [Finding("file", str(error))])
    form = settings.form or _form_of(records)
    template = as_template(settings.template or ("v1_sq" if form == "sft" else "v1"))
    report = Report(name, form, template, settings, records)
    if tokenizer is not None:
        sq_r = settings.sq_r if form == "sft" and len(template.roles) > 2 else 0.0
        report.tokens = TokenRules(tokenizer, template, settings.max_length, tokens_per_image, sq_r, settings.seed)
    folder = against_image_folder or image_folder
    others = [overlap.OtherFile(Path(path).name, read_records(path, "test"), _folder_of(path, folder)) for path in against]
    _Check(report, _folder_of(data, image_folder), others).run()
    return report


def _folder_of(data: object, given: str | Path | None) -> Path:
    """Where image names start: in a directory that is the data, they are relative to it."""
    return Path(given) if given is not None else Path(data) if isinstance(data, (str, Path)) and Path(data).is_dir() else Path()


def _form_of(records: Sequence[dict[str, Any]]) -> Form:
    n = sum(any(side in record for side in PAIR_SIDES) for record in records)
    return "dpo" if 2 * n > len(records) else "sft"


class _Check:
    def __init__(self, report: Report, folder: Path, others: list[overlap.OtherFile]) -> None:
        self.report, self.folder, self.others = report, folder, others
        self.rows_of: dict[Hashable, dict[int, None]] = {}
        self.records, self.settings = report.records, report.settings

    def run(self) -> None:
        self._rows()
        self._whole_file()
        for row, kind, text in overlap.repeated_rows(self.records):
            self._add(kind, text, row)
        self._pictures()
        for other in self.others:
            self._leaks(other)
        self.report.findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), -1 if finding.row is None else finding.row))

    def _add(self, kind: str, text: str, row: int | None = None) -> None:
        name = None if row is None else printable(short(str(self.records[row].get("id", row))))
        self.report.findings.append(Finding(kind, text, row, name))

    def _bar(self, total: int, label: str, unit: str) -> AbstractContextManager[Any]:
        return progress_bar(total, label=label, unit=unit, show=self.settings.show_progress)

    # ---- rows

    def _rows(self) -> None:
        special = () if self.report.tokens is None else tuple(self.report.tokens.tokenizer.special_ids)
        work = _RowWork(self.report.form, TextRules(self.report.template, special), self.report.tokens)
        chunks = [(begin, [_light(record) for record in self.records[begin:begin + _CHUNK]]) for begin in range(0, len(self.records), _CHUNK)]
        with self._bar(len(self.records), "rows", "row") as bar:
            for (begin, chunk), answers in zip(chunks, self._spread(work, chunks), strict=True):
                for row, (lengths, found) in enumerate(answers, begin):
                    self.report.lengths += [(row, length) for length in lengths]
                    for kind, text in found:
                        self._add(kind, text, row)
                bar.update(len(chunk))
        self._join("original_mismatch", "original_labels")

    def _join(self, *kinds: str) -> None:
        """What most rows have is not about a row: one finding of the whole file."""
        for kind in kinds:
            of_kind = [finding for finding in self.report.findings if finding.kind == kind]
            if len(of_kind) > max(len(self.records) // 2, _A_FEW):
                self.report.findings = [finding for finding in self.report.findings if finding.kind != kind]
                self._add(kind, f"{len(of_kind)} of {len(self.records)} rows, so it is the template with this tokenizer; "
                                f"row {of_kind[0].row}: {of_kind[0].text}")

    def _spread(self, work: _RowWork, chunks: list[tuple[int, list[dict[str, Any]]]]) -> Iterator[list[tuple[list[Length], list[Found]]]]:
        workers = self.settings.workers or len(os.sched_getaffinity(0))
        if workers < 2 or len(self.records) < _FEW or work.tokens is None:
            work = work.prepared()
            yield from map(work, chunks)
            return
        # spawn: this process may have threads of the core, which a fork would cut off
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_take_work, initargs=(work,)) as pool:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it: Ctrl-C is for us, who end them
            try:
                found = pool.map(_do_work, chunks)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            yield from found

    def _whole_file(self) -> None:
        records = self.records
        fields = Counter(key for record in records for key in record if key not in _KNOWN and key not in self.settings.patient_fields)
        for key, n in sorted(fields.items()):
            self._add("field_unknown", f"{quoted(str(key))} in {n} of {len(records)} rows")
        text_only = [row for row, record in enumerate(records) if not images_of(record)]
        if 0 < len(text_only) < len(records):
            self._add("text_only", f"{len(text_only)} of {len(records)} rows, the first is row {text_only[0]}")
        for answer in _ANSWERS:
            spellings = Counter(text.strip() for record in records for role, text in overlap.dialogue_of(record)
                                if role == "gpt" and text.strip().rstrip(".").lower() == answer)
            if len(spellings) > 1:
                self._add("yes_no_case", ", ".join(f"{quoted(text)} {n} times" for text, n in spellings.most_common(6)))

    # ---- pictures

    def _pictures(self) -> None:
        images: dict[Hashable, Any] = {}
        for row, record in enumerate(self.records):
            for image in images_of(record):
                key = key_of(image)
                if key is None:
                    self._add("image_name", f"a {type(image).__name__}, want a file name, or {{bytes, path}}", row)
                else:
                    images.setdefault(key, image)
                    self.rows_of.setdefault(key, {})[row] = None
        pictures = self.report.pictures = self._probe(self.folder, images, "images")
        for picture in pictures:
            for kind, text in picture.found:
                self._add_picture(picture, kind, text)
        for picture, kind, text in overlap.repeated_pictures(pictures):
            self._add_picture(picture, kind, text)

    def _leaks(self, other: overlap.OtherFile) -> None:
        theirs = {key: image for record in other.records for image in images_of(record) if (key := key_of(image)) is not None}
        other.pictures = self._probe(other.folder, theirs, f"images of {other.name}")
        content = digests([*self.report.pictures, *other.pictures])
        for picture, kind, text in overlap.leaking_pictures(self.report.pictures, other, content):
            self._add_picture(picture, kind, text)
        for row, kind, text in overlap.leaking_patients(self.records, other, self.settings.patient_fields):
            self._add(kind, text, row)
        for row, kind, text in overlap.leaking_rows(self.records, self.report.pictures, other, content):
            self._add(kind, text, row)

    def _probe(self, folder: Path, images: dict[Hashable, Any], label: str) -> list[Picture]:
        with self._bar(len(images), label, "image") as bar:
            return probe_all(ImageStore(folder), images, self.settings.pictures, bar.update)

    def _add_picture(self, picture: Picture, kind: str, text: str) -> None:
        """Once for each picture, at the first row that shows it."""
        rows = self.rows_of[picture.key]
        self._add(kind, f"{quoted(picture.name)}: {text}{'' if len(rows) == 1 else f'; {len(rows)} rows'}", next(iter(rows)))


@dataclass(slots=True)
class _RowWork:
    """What a process does with a chunk: (lengths, findings) of each row."""

    form: Form
    rules: TextRules
    tokens: TokenRules | None

    def prepared(self) -> _RowWork:
        return _RowWork(self.form, self.rules, None if self.tokens is None else self.tokens.remembering())

    def __call__(self, chunk: tuple[int, list[dict[str, Any]]]) -> list[tuple[list[Length], list[Found]]]:
        return [self._row(row, record) for row, record in enumerate(chunk[1], chunk[0])]

    def _row(self, row: int, record: dict[str, Any]) -> tuple[list[Length], list[Found]]:
        found = list((pair_findings if self.form == "dpo" else row_findings)(record, self.rules))
        if self.tokens is None or any(KINDS[kind].severity == "error" and kind not in ("pair_prompt", "pair_same") for kind, _ in found):
            return [], found
        lengths, more = tokenise(record, row, self.tokens)
        return lengths, found + more


def _light(record: dict[str, Any]) -> dict[str, Any]:
    """Without the content of images inside it, which rows are not asked about."""
    images = images_of(record)
    return record if all(isinstance(image, str) for image in images) else {
        **{key: value for key, value in record.items() if key not in ("image", "images")}, "images": [True] * len(images)}


_work: list[Callable[[Any], Any]] = []


def _take_work(work: _RowWork) -> None:
    _work.append(work.prepared())


def _do_work(chunk: Any) -> Any:
    return _work[0](chunk)
