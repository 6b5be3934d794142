"""A model's answers to a test set in a folder, and what is written there: all of it can be killed at any moment and goes on.

    answers.jsonl, answers.BASELINE.jsonl    answers, in the order of the items      answers.chunk-K-of-N.jsonl    those of one part
    report.json, report.html, table.tex, table.md                                    manifest.json, written last   what they were made from
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava.checkpoint import strict_json
from stllava.checkpoint.atomic import appending, file_entry, make_directory, write_bytes
from stllava.checkpoint.lock import run_lock
from stllava.data.chunks import get_chunk
from stllava.data.records import read_jsonl
from stllava.errors import FormatError
from stllava.evaluate.answers import Question, answer_questions
from stllava.evaluate.baselines import questions_for
from stllava.evaluate.evaluation import SCHEMA, Evaluation
from stllava.evaluate.identity import digest
from stllava.evaluate.render.tables import latex_table, markdown_table

if TYPE_CHECKING:
    from stllava.feature_cache import FeatureCache
    from stllava.model import LlavaModel

__all__ = ["AnswerRun", "facts_of", "has_jinja", "write_evaluation"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class AnswerRun:
    """One model at work on one test set.

    model_id: what answers call it. folder: where files go, None: nowhere. answers_file: instead of folder/answers.jsonl. identity: what else the
    answers depend on; answers of another identity are refused, not continued. n_chunks, chunk: answer this part of the questions only.
    seed: of shuffled pictures. settings: fields of `DecodingSettings`.
    """

    model: LlavaModel
    model_id: str
    template: str
    questions: Sequence[Question]
    image_of: Callable[[str], Any]
    identity: Mapping[str, Any]
    settings: Mapping[str, Any]
    folder: Path | None = None
    answers_file: Path | None = None
    n_chunks: int = 1
    chunk: int = 0
    batch_size: int = 32
    seed: int = 0
    feature_cache: FeatureCache | None = None
    progress: bool = True

    def answers(self, baseline: str | None = None) -> list[dict[str, Any]]:
        """Answers of the model, or of one of `MODEL_BASELINES`; those of this part, where there are several.

        Raises:
            LockedError: another process writes the file. FormatError: it holds answers of another model, data or settings. OSError.
        """
        questions, image_of = self.questions, self.image_of
        if baseline is not None:
            questions, image_of = questions_for(baseline, questions, image_of, self.model.image_processor.size, self.seed)
        metadata = {"run": digest([self.identity, self.template, self.settings, baseline, self.seed if baseline == "shuffled_image" else None])}
        if baseline is not None:
            metadata["input"] = baseline
        whole, own = self.path(baseline), self.path(baseline, self.n_chunks, self.chunk)
        if whole is not None and whole == own:
            _gather(whole, metadata)
        return answer_questions(self.model, get_chunk(questions, self.n_chunks, self.chunk), image_of, template=self.template, out=own,
                                batch_size=self.batch_size, label=baseline or "answer", model_id=self.model_id, progress=self.progress,
                                feature_cache=self.feature_cache, metadata=metadata, **self.settings)

    def path(self, baseline: str | None = None, n_chunks: int = 1, chunk: int = 0) -> Path | None:
        """Where answers lie."""
        if baseline is None and self.answers_file is not None:
            return self.answers_file
        if self.folder is None:
            return None
        part = f".chunk-{chunk}-of-{n_chunks}" if n_chunks > 1 else ""
        return make_directory(self.folder) / f"answers{'' if baseline is None else '.' + baseline}{part}.jsonl"


def _gather(whole: Path, metadata: Mapping[str, Any]) -> None:
    """Appends the answers of the parts that lie beside `whole` and are not in it."""
    found = {}
    for part in sorted(whole.parent.glob(f"{whole.stem}.chunk-*-of-*.jsonl")):
        for row in read_jsonl(part, cut_off=True):
            if not isinstance(row, dict) or row.get("metadata") != metadata or "question_id" not in row:
                raise FormatError(f"{part}: holds answers of a run with another model, other pictures or settings, such as {json.dumps(row)[:200]}; "
                                  "take it away, or name another --out", path=part, field="metadata")
            found[str(row["question_id"])] = row
    if not found:
        return
    with run_lock(whole):
        known = {str(row.get("question_id")) for row in read_jsonl(whole, cut_off=True) if isinstance(row, dict)} if whole.exists() else set()
        with appending(whole) as file:
            for name, row in found.items():
                if name not in known:
                    file.write(json.dumps(row) + "\n")


def write_evaluation(evaluation: Evaluation, folder: Path, manifest: Mapping[str, Any], answers: Sequence[Path],
                     image_of: Callable[[str], Any] | None = None) -> list[Path]:
    """Writes every output, each whole or not at all, the manifest last, and returns their paths.

    The page is left out where jinja2 is not installed. manifest: what the run was made from, JSON. answers: the files that were scored. No times and
    no machine in any file: the same run writes the same bytes.
    """
    make_directory(folder)
    contents: dict[str, Callable[[], str]] = {
        "report.json": lambda: json.dumps(evaluation.as_dict(), indent=1, allow_nan=False) + "\n",
        "table.tex": lambda: latex_table(evaluation), "table.md": lambda: markdown_table(evaluation)}
    if has_jinja():
        from stllava.evaluate.render.page import html_page
        contents["report.html"] = lambda: html_page(evaluation, image_of)
    for name, text in contents.items():
        write_bytes(folder / name, text().encode("utf-8", "backslashreplace"))  # an answer may hold half a surrogate pair
    written = [folder / name for name in contents]
    files = {path.name: file_entry(path) for path in (*answers, *written)}
    write_bytes(folder / MANIFEST, strict_json.dump_object({"schema": SCHEMA, **manifest, "facts": dict(evaluation.facts), "files": files}))
    return [*written, folder / MANIFEST]


def facts_of(path: Path) -> dict[str, Any]:
    """What the manifest of a folder of ours says of the model, {} where there is none."""
    if not (path / MANIFEST).is_file():
        return {}
    content = strict_json.read_object(path / MANIFEST)
    return dict(content["facts"]) if content.get("schema") == SCHEMA and isinstance(content.get("facts"), dict) else {}


def has_jinja() -> bool:
    from importlib.util import find_spec
    return find_spec("jinja2") is not None
