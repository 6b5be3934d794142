"""The table of layouts: what a row looks like, what it is, and its neutral form. Told by the fields of the rows, never by a file's name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.errors import FormatError

from . import vqa
from .messages import instruction, preference

__all__ = ["LAYOUTS", "Kind", "Layout", "known_layouts", "layout_of", "neutral"]

Kind = Literal["instruction", "pair", "vqa", "question", "answer", "steps"]
"""`steps`: intermediate files of self-training. The others say what a record is once it is neutral."""

Convert = Callable[[dict[str, Any], int, str | None], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Layout:
    """fits: by the field names of a row. fields: for people. convert: (record, row, split) -> neutral record, raising FormatError."""

    name: str
    kind: Kind
    fields: str
    fits: Callable[[AbstractSet[str]], bool]
    convert: Convert


def _has(*wanted: str) -> Callable[[AbstractSet[str]], bool]:
    """Every one of `wanted`; "a|b" is either."""
    options = [set(word.split("|")) for word in wanted]
    return lambda fields: all(option & fields for option in options)


def _preference(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    return preference(record)


def _instruction(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    return instruction(record)


def _as_it_is(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    return record


def _one_spelling(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    """Older files of LLaVA-Med misspell `conversations`."""
    if "conversations" in record:
        return record
    return {"conversations" if key == "conversatons" else key: value for key, value in record.items()}


def _judged(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    image = record.get("img")
    question = record["q"] if image is None or DEFAULT_IMAGE_TOKEN in str(record["q"]) else f"{DEFAULT_IMAGE_TOKEN}\n{record['q']}"
    sides = {side: [{"from": "human", "value": question}, {"from": "gpt", "value": record[key]}] for side, key in
             (("chosen_conversations", "p"), ("reject_conversations", "r"))}
    rest = {key: value for key, value in record.items() if key not in ("q", "img", "p", "r", "image")}
    return {**rest, **({"image": image} if image is not None else {}), **sides}


def _one_name(record: dict[str, Any], row: int, split: str | None) -> dict[str, Any]:
    if "reject_conversations" in record:
        return record
    return {"reject_conversations" if key == "rejected_conversations" else key: value for key, value in record.items()}


LAYOUTS = (
    Layout("dpo", "pair", "chosen_conversations, reject_conversations (or rejected_conversations), image?",
           _has("chosen_conversations", "reject_conversations|rejected_conversations"), _one_name),
    Layout("judged", "pair", "q, p, r, img?", _has("q", "p", "r"), _judged),
    Layout("trl-preference", "pair", "chosen, rejected, prompt?, images? or image?", _has("chosen", "rejected"), _preference),
    Layout("messages", "instruction", "messages, images? or image?", _has("messages"), _instruction),
    Layout("prompt-completion", "instruction", "prompt, completion, images? or image?", _has("prompt", "completion"),
           _instruction),
    Layout("slake", "vqa", "img_name, question, answer, q_lang, qid, content_type, ...", _has("img_name", "question", "answer"), vqa.slake),
    Layout("vqa-rad", "vqa", "image_name, question, answer, qid, phrase_type, ...", _has("image_name", "question", "answer"), vqa.vqa_rad),
    Layout("pathvqa", "vqa", "img_id, sent, label, answer_type, ...", _has("img_id", "sent", "label"), vqa.pathvqa),
    Layout("llava-med-vqa", "vqa", "id, image, answer_type, conversations of one question and answer",
           _has("conversations|conversatons", "answer_type"), _one_spelling),
    Layout("llava", "instruction", "id, image?, conversations", _has("conversations|conversatons"), _one_spelling),
    Layout("answers", "answer", "question_id, prompt, text, answer_id, model_id", _has("question_id", "text", "answer_id|model_id"), _as_it_is),
    Layout("questions", "question", "question_id, image?, text", _has("question_id", "text"), _as_it_is),
    Layout("vqa", "vqa", "image, question, answer", _has("image", "question", "answer"), vqa.question_answer),
    Layout("asked", "steps", "question_id, image, prompt (a list), or id, description, questions",
           lambda fields: {"question_id", "prompt"} <= fields or {"id", "questions"} <= fields, _as_it_is),
    Layout("answered", "steps", "img, prompt, answers, or id, image, question, answers", _has("answers", "prompt|question"), _as_it_is),
)
PATHVQA_QA = Layout("pathvqa-qa", "vqa", "image, question, answer in a pickle", _has("image", "question", "answer"), vqa.pathvqa)
"""The fields of "vqa"; only a pickle tells it."""


def layout_of(fields: AbstractSet[str], container: str = "") -> Layout | None:
    """The first layout of the table that rows with these fields fit."""
    return _layout_of(frozenset(fields), container)


@functools.lru_cache(1024)  # a file has few kinds of rows
def _layout_of(fields: frozenset[str], container: str) -> Layout | None:
    if container == "pickle" and PATHVQA_QA.fits(fields):
        return PATHVQA_QA
    return next((layout for layout in LAYOUTS if layout.fits(fields)), None)


def known_layouts() -> str:
    return "; ".join(f"{layout.name} ({layout.fields})" for layout in LAYOUTS)


def neutral(record: Mapping[str, Any], row: int = 0, split: str | None = None, container: str = "") -> dict[str, Any]:
    """A record in its neutral form; of no known layout: as it is. Raises FormatError for one that says it is of a layout and is not."""
    layout = layout_of(record.keys(), container)
    if layout is None:
        return dict(record)
    try:
        return layout.convert(dict(record), row, split)
    except (AttributeError, KeyError, TypeError) as error:  # not of the layouts' own making, but a row may hold anything
        raise FormatError(f"not of the layout {layout.name} ({layout.fields}): {error}") from error
