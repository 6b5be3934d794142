"""Question and answer records of the published sets -> LLaVA-Med test items (spec 4.1, 5.1-5.3).

An item is ``{"id", "image", "answer_type": "OPEN" | "CLOSED", "conversations": [question, answer], "split"?, "modality"?, "organ"?,
"question_type"?}`` with every other field of its record kept. Texts are not touched; answers that are numbers become text. Without an answer type,
yes and no are CLOSED and everything else OPEN.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.errors import FormatError

__all__ = ["answer_type_of", "item_of_conversation", "item_of_question", "pathvqa", "question_answer", "slake", "vqa_rad"]

_TYPES = {"open": "OPEN", "other": "OPEN", "number": "OPEN", "closed": "CLOSED", "yes/no": "CLOSED"}


def vqa_rad(record: Mapping[str, Any], row: int, split: str | None) -> dict[str, Any]:
    """A row of `VQA_RAD Dataset Public.json`, or of MEVF's trainset.json and testset.json; there the phrase type says which split it is of."""
    phrase = str(record.get("phrase_type", "")).strip()
    if split is None and phrase:
        split = "test" if phrase.startswith("test") else "train"
    return _item(record, ("qid", "image_name"), id=record.get("qid", row), image=_text(record, "image_name"), split=split,
                 organ=record.get("image_organ"), question_type=record.get("question_type"))


def slake(record: Mapping[str, Any], row: int, split: str | None) -> dict[str, Any]:
    """A row of SLAKE; the organ is its location, the question type its content type."""
    return _item(record, ("qid", "img_name", "modality"), id=record.get("qid", row), image=_text(record, "img_name"), split=split,
                 modality=record.get("modality"), organ=record.get("location"), question_type=record.get("content_type"))


def pathvqa(record: Mapping[str, Any], row: int, split: str | None) -> dict[str, Any]:
    """A row of PathVQA's {split}_vqa.pkl (img_id, sent, label) or {split}_qa.pkl (image, question, answer)."""
    if "sent" not in record:
        name, split = _pathvqa_image(_text(record, "image"), split)
        return _item(record, ("image",), id=record.get("id", f"{split or 'pathvqa'}-{row}"), image=name, split=split)
    label = record["label"]
    if not isinstance(label, Mapping) or not label or not all(isinstance(weight, (int, float)) for weight in label.values()):
        raise FormatError(f"field 'label' is {_shown(label)}, want {{answer: weight}}", field="label")
    name, split = _pathvqa_image(_text(record, "img_id"), split)
    best = max(label, key=lambda answer: label[answer])
    return _item({**record, "question": record["sent"], "answer": best}, ("img_id", "sent", "label", "question_id"),
                 id=record.get("question_id", f"{split or 'pathvqa'}-{row}"), image=name, split=split, question_type=record.get("question_type"))


def question_answer(record: Mapping[str, Any], row: int, split: str | None) -> dict[str, Any]:
    """A row {image, question, answer}, as the sets are on Hugging Face."""
    image = record.get("image")
    if image is None:
        raise FormatError("field 'image' is missing", field="image")
    key = next((key for key in ("id", "question_id", "qid") if key in record), None)
    return _item(record, ("image", *([key] if key else ())), id=record[key] if key else f"{split or 'row'}-{row}", image=image, split=split)


def item_of_question(record: Mapping[str, Any], row: int) -> dict[str, Any]:
    """A row of a question file that has the answer too: {question_id, image, text, gpt4_answer or answer, answer_type}; its marker goes."""
    key = next((key for key in ("gpt4_answer", "answer") if key in record), None)
    if key is None:
        raise FormatError(f"no answer to score against: want a field 'answer' or 'gpt4_answer', found {sorted(record)}", field="answer")
    question = _text(record, "text").replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return _item({**record, "question": question, "answer": record[key]}, ("question_id", "text", "image", key), id=record.get("question_id", row),
                 image=record.get("image"))


def item_of_conversation(record: Mapping[str, Any], row: int) -> dict[str, Any]:
    """A record of LLaVA-Med's or LLaVA's layout with one question, as an item: the answer type in one spelling, or told from the answer."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or [turn.get("from") if isinstance(turn, Mapping) else None for turn in turns] != ["human", "gpt"]:
        raise FormatError(f"field 'conversations' is {_shown(turns)}, want one question of human and one answer of gpt", field="conversations")
    for number, turn in enumerate(turns):
        if not isinstance(turn.get("value"), (str, int, float)) or isinstance(turn["value"], bool):
            raise FormatError(f"field 'conversations', turn {number}: value is {_shown(turn.get('value'))}, want text", field="conversations")
    answer = str(turns[1]["value"])
    texts = [{**turn, "value": str(turn["value"])} for turn in turns]
    return {"id": record.get("id", row), **record, "conversations": texts, "answer_type": answer_type_of(answer, record.get("answer_type"))}


def answer_type_of(answer: str, given: Any = None) -> str:
    """OPEN or CLOSED. `given` counts trimmed and case-folded, PathVQA's names too; without it, yes and no are CLOSED. Raises FormatError."""
    if given is None:
        return "CLOSED" if re.fullmatch(r"\s*(yes|no)\s*\.?\s*", answer, re.IGNORECASE) else "OPEN"
    kind = _TYPES.get(str(given).strip().casefold())
    if kind is None:
        raise FormatError(f"field 'answer_type' is {_shown(given)}, want one of {', '.join(_TYPES)}", field="answer_type")
    return kind


def _item(record: Mapping[str, Any], used: Iterable[str], *, id: Any, image: Any, split: str | None = None, **metadata: Any) -> dict[str, Any]:
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise FormatError(f"the id is {_shown(id)}, want text or an integer", field="id")
    question, answer = _text(record, "question"), record.get("answer")
    if not isinstance(answer, (str, int, float)) or isinstance(answer, bool):
        raise FormatError(f"field 'answer' is {_shown(answer)}, want text or a number", field="answer")
    answer = str(answer)
    if not question.strip() or not answer.strip():
        raise FormatError(f"field {'question' if not question.strip() else 'answer'!r} is empty", field="answer" if question.strip() else "question")
    mark = "" if DEFAULT_IMAGE_TOKEN in question or image is None else f"\n{DEFAULT_IMAGE_TOKEN}"
    item = {"id": id, **({} if image is None else {"image": image}), "answer_type": answer_type_of(answer, record.get("answer_type")),
            "conversations": [{"from": "human", "value": question + mark}, {"from": "gpt", "value": answer}]}
    item |= {key: value for key, value in (metadata | {"split": split}).items() if value is not None}
    left_out = {*used, "question", "answer"}
    return item | {key: value for key, value in record.items() if key not in left_out and key not in item}


def _pathvqa_image(name: str, split: str | None) -> tuple[str, str | None]:
    """'test_0273' -> ('test/test_0273.jpg', 'test'): the images lie in a folder for each split."""
    own = re.match(r"(train|val|test)_", name)
    file = name if name.endswith(".jpg") else f"{name}.jpg"
    return (f"{own[1]}/{file}", {"val": "validation"}.get(own[1], own[1])) if own else (file, split)


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise FormatError(f"field {field!r} is {_shown(value)}, want text", field=field)
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__} ({str(value)[:60]!r})"
