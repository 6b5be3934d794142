"""Scores of the demo's test questions, and what they are worth: answers that need no image, or come from the wrong one.

Closed accuracy, open recall and token F1 (open items) are the strict set of `stllava.evaluate.metrics`: whole words, and the first yes or no
of an answer decides. An open type's own number is its recall, a closed type's its accuracy.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllava.evaluate import VqaItem, evaluate_vqa
from stllava.evaluate.answers import answer_questions
from stllava.evaluate.baselines import other_images
from stllava.model import LlavaModel

from .questions import CLOSED, OPEN, parse

__all__ = ["MAX_NEW_TOKENS", "Scores", "answer_greedily", "majority_answers", "no_image_answers", "other_images", "score"]

MAX_NEW_TOKENS = 64  # the longest true answer, a caption with every fact, takes about 40
QUESTIONS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class Scores:
    """`row`: what results.json holds for one model. `closed`, `open`: accuracy and recall of every item, in the order of the test file.
    `values`: the same by item id."""

    row: dict[str, Any]
    closed: list[float]
    open: list[float]
    values: dict[str, float]


def score(items: Seq[Mapping[str, Any]], answers: Mapping[str, str]) -> Scores:
    """Scores answers (item id -> text) to the items of a VQA file with `question_type`; every item must have its answer."""
    report = evaluate_vqa(items, [{"id": name, "text": text} for name, text in answers.items()], "strict")
    values = {str(item.id): _value(item) for item in report.items}
    by_type: dict[str, dict[str, Any]] = {}
    for kind in (*OPEN, *CLOSED):
        of_kind = [values[item["id"]] for item in items if item["question_type"] == kind]
        if of_kind:
            by_type[kind] = {"metric": "recall" if kind in OPEN else "accuracy", "value": sum(of_kind) / len(of_kind), "n": len(of_kind)}
    row = {"closed_accuracy": report.values["closed accuracy"], "open_recall": report.values["recall"], "token_f1": report.values["f1"],
           "n_closed": report.n_closed, "n_open": report.n_open, "by_type": by_type}
    return Scores(row, [values[str(i.id)] for i in report.items if not i.is_open], [values[str(i.id)] for i in report.items if i.is_open], values)


def _value(item: VqaItem) -> float:
    value = item.values["recall" if item.is_open else "hit"]
    assert value is not None  # the strict set leaves no item out
    return value


def answer_greedily(model: LlavaModel, items: Seq[Mapping[str, Any]], image_of: Callable[[str], Any], label: str) -> dict[str, str]:
    """Item id -> greedy answer (template v1). `image_of`: image name -> image; questions of one image share its rows."""
    rows = answer_questions(model, items, image_of, max_new_tokens=MAX_NEW_TOKENS, batch_size=QUESTIONS_PER_BATCH, label=label)
    return {row["question_id"]: row["text"] for row in rows}


def majority_answers(items: Seq[Mapping[str, Any]], sft_file: str | os.PathLike[str]) -> dict[str, str]:
    """Always the answer that the stage-1 training data give most often to this type of question (of equals the first in the alphabet)."""
    counts: dict[str, Counter[str]] = {}
    for record in json.loads(Path(sft_file).read_text(encoding="utf-8")):
        turns = record["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            form, _ = parse(human["value"].replace("<image>", "")) or (None, "")
            if form is not None:
                counts.setdefault("caption" if form.type == "describe" else form.type, Counter())[gpt["value"]] += 1
    best = {kind: min(found, key=lambda text: (-found[text], text)) for kind, found in counts.items()}
    return {item["id"]: best.get(item["question_type"], "") for item in items}


def no_image_answers(model: LlavaModel, items: Seq[Mapping[str, Any]]) -> dict[str, str]:
    """What the model says to a grey picture, the mean colour of its preprocessing (zero after it): a guess from the question alone.

    A picture and not an empty place, because the model never saw a prompt without one. Equal questions get equal answers, so each is asked once.
    """
    size = model.image_processor.size
    grey = np.zeros((3, size, size), np.float32)
    first = {item["conversations"][0]["value"]: item for item in items}
    answers = answer_greedily(model, list(first.values()), lambda _: grey, "no image")
    return {item["id"]: answers[first[item["conversations"][0]["value"]]["id"]] for item in items}
