"""A model's answers to a question file, greedy by default (spec D49); all questions of an image share its rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.conversation import as_template
from stllava.data.records import SHOWN, DataError, Problem
from stllava.data.steps import item_seed, run_step
from stllava.errors import FormatError
from stllava.generation import DecodingSettings, generate
from stllava.text.prompts import dialogue_about_image, dialogue_without_image, open_turn

if TYPE_CHECKING:
    from stllava.feature_cache import FeatureCache
    from stllava.model import LlavaModel

__all__ = ["KNOWN_FIELDS", "Question", "answer_questions", "question_text", "read_questions"]

KNOWN_FIELDS = frozenset({"question_id", "id", "image", "text", "conversations", "conversatons"})
"""What is read of a question record; everything else in it is left alone."""


class Question(NamedTuple):
    """`image`: the name of its picture, None: a question without one. `text` has no image marker."""

    id: str | int
    image: str | None
    text: str


def read_questions(records: Iterable[Mapping[str, Any]], source: object = "questions") -> list[Question]:
    """Questions of a file.

    Args:
        records: ``{"question_id" or "id", "image", "text"}``, or LLaVA-Med test items whose question is the first turn of `conversations`. An
            ``<image>`` marker in the text is removed (spec 4.1). source: names the file in errors.

    Raises:
        DataError: listing every record without an id or a question, with an image that is no name, or with the id of another record.
    """
    rows = [dict(record) for record in records]
    ids = [row.get("question_id", row.get("id")) for row in rows]
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        first.setdefault(str(name), row)
    counts = Counter(map(str, ids))

    def check(row: int, record: dict[str, Any]) -> tuple[str, str] | None:
        name, image = ids[row], record.get("image")
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            return "without id", f"no question_id (or id) that is a text or an integer, found fields {sorted(record)}"
        if counts[str(name)] > 1 and first[str(name)] != row:
            return "duplicate", f"question_id {name!r} is that of row {first[str(name)]} too; answers could not be told apart"
        if not isinstance(question_text(record), str):
            return "without question", f"no text, and no conversations whose first turn has a value, found fields {sorted(record)}"
        if image is not None and not isinstance(image, str):
            return "image", f"image is a {type(image).__name__}, want the name of a file, or nothing"
        return None

    found = [(row, check(row, record)) for row, record in enumerate(rows)]
    problems = [Problem(row, str(ids[row]), *problem) for row, problem in found if problem is not None]
    if problems:
        raise DataError(f"{source}: {len(problems)} of {len(rows)} questions cannot be answered:\n" +
                        "\n".join(f"  row {p.row}: {p.text}" for p in problems[:SHOWN]) + ("\n  ..." if len(problems) > SHOWN else ""), problems)
    return [Question(row["question_id" if "question_id" in row else "id"], row.get("image"),
                     question_text(row).replace(DEFAULT_IMAGE_TOKEN, "").strip()) for row in rows]


def question_text(record: Mapping[str, Any]) -> Any:
    """What a record asks, as it stands there; None where it has no question."""
    if "text" in record:
        return record["text"]
    turns = record.get("conversations", record.get("conversatons"))
    return turns[0].get("value") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None


def answer_questions(model: LlavaModel, questions: Iterable[Mapping[str, Any] | Question], image_of: Callable[[str], Any], *, template: str = "v1",
                     batch_size: int = 32, out: str | Path | None = None, progress: bool = True, label: str = "answer", model_id: str = "",
                     seed: int = 0, feature_cache: FeatureCache | None = None, metadata: Mapping[str, Any] | None = None,
                     **settings: Any) -> list[dict[str, Any]]:
    """Answers question records.

    Args:
        questions: see `read_questions`. image_of: image name -> image.
        out: answer file (JSON lines) in LLaVA's layout, continued by question_id if it exists; finished, it has the order of the questions.
        batch_size: questions answered together. Those of one image stay together where they are no more than this, and then the image, and the rows
            that their prompts begin with, are computed once.
        seed: a question's draws depend on this and its id. feature_cache: as for `generate`. settings: fields of `DecodingSettings`.
        metadata: what every answer carries under that name, such as a digest of the run; an answer in `out` with another is another run's.

    Returns:
        ``{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`` per question, in order. answer_id is a digest of the rest.

    Raises:
        DataError: see `read_questions`. FormatError: an unreadable picture, or `out` holds something else, as answers of another model.
    """
    chosen, how, extra = as_template(template), DecodingSettings(**settings), dict(metadata or {})
    given = list(questions)
    items = [item for item in given if isinstance(item, Question)]
    if len(items) < len(given):
        items = read_questions([item for item in given if not isinstance(item, Question)])

    def work(batch: list[Question]) -> Iterator[dict[str, Any]]:
        pictures = {image: image_of(image) for image in dict.fromkeys(item.image for item in batch) if image is not None}
        prompts = [open_turn(dialogue_without_image(chosen, item.text) if item.image is None else dialogue_about_image(chosen, item.text),
                             chosen.roles[1], model.tokenizer, 0 if item.image is None else 1) for item in batch]
        found = generate(model, prompts, [None if item.image is None else pictures[item.image] for item in batch], batch_size=batch_size,
                         max_new_tokens=how.max_new_tokens, **how.core_arguments(), stop=(*how.stops, *chosen.stop_strings()),
                         seeds=[item_seed(seed, "question", item.id) for item in batch], feature_cache=feature_cache)
        for item, [answer] in zip(batch, found, strict=True):
            digest = hashlib.blake2b("\x1f".join((model_id, str(item.id), item.text, answer.text)).encode(), digest_size=11).hexdigest()
            yield {"question_id": item.id, "prompt": item.text, "text": answer.text, "answer_id": digest, "model_id": model_id, "metadata": extra}

    def check(item: Question, row: dict[str, Any]) -> None:
        for field, wanted in (("prompt", item.text), ("model_id", model_id)):
            if row.get(field) != wanted:
                raise FormatError(f"{out}: the answer to question {item.id!r} has the {field} {str(row.get(field))[:80]!r}, but now it is "
                                  f"{wanted[:80]!r}; to answer anew, name another file", field=field)
        if extra and row.get("metadata") != extra:
            raise FormatError(f"{out}: the answer to question {item.id!r} is that of a run with another model, other pictures or settings (metadata "
                              f"{str(row.get('metadata'))[:80]}, now {str(extra)[:80]}); to answer anew, name another file", field="metadata")

    return run_step(items, lambda item: item.id, work, out=out, batch_size=batch_size, label=label, progress=progress, field="question_id",
                    check=check, group=lambda item: ("image", item.image) if item.image is not None else ("text", item.id))
