"""What a score is worth: answers that need no picture, or come from the wrong one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stllava.evaluate.answers import Question
from stllava.evaluate.normalize import normalize_word
from stllava.evaluate.vqa import answer_of, is_open

__all__ = ["BASELINES", "MODEL_BASELINES", "majority_answers", "other_images", "questions_for"]

MODEL_BASELINES = {
    "no_image": "the same model asked without a picture",
    "grey_image": "the same model shown the mean colour of its preprocessing",
    "shuffled_image": "the same model shown another picture of the test set"}
BASELINES = {
    "majority": "the commonest open and the commonest closed answer", "majority_by_type": "the commonest answer of the question's type",
    **MODEL_BASELINES}
"""Name -> what it is."""
_GREY = "grey"


def majority_answers(items: Sequence[Mapping[str, Any]], train: Sequence[Mapping[str, Any]] | None = None, *,
                     by_type: bool = False) -> list[dict[str, Any]]:
    """Always the answer given most often, to open and to closed questions, in `train`, else in the test items themselves (an upper bound then).

    by_type: within the question's type too, where the items counted have it. Answers are counted as normalised; of equals the first in the alphabet.
    """
    counts: dict[tuple[Any, ...], Counter[str]] = {}
    for row, item in enumerate(items if train is None else train):
        kind = is_open(item)
        if kind is not None:
            answer = normalize_word(answer_of(f"row {row}", item).lower())
            for key in ((kind,), (kind, item.get("question_type"))):
                counts.setdefault(key, Counter())[answer] += 1
    best = {key: min(found, key=lambda text: (-found[text], text)) for key, found in counts.items()}
    answers = []
    for item in items:
        kind = is_open(item)
        general = best.get((kind,), "")
        answers.append({"id": item.get("id", item.get("question_id")),
                        "text": best.get((kind, item.get("question_type")), general) if by_type else general})
    return answers


def other_images(images: Sequence[str], seed: int) -> dict[str, str]:
    """Image -> another one: a derangement, one cycle through all of them in random order. Needs two or more different names."""
    names = sorted(set(images))
    if len(names) < 2:
        raise ValueError(f"cannot give {len(names)} image another one; the test set needs at least two")
    order = np.random.Generator(np.random.Philox(key=[seed, 0x5AFF1E])).permutation(len(names))
    return {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}


def questions_for(baseline: str, questions: Sequence[Question], image_of: Callable[[str], Any], image_size: int,
                  seed: int) -> tuple[list[Question], Callable[[str], Any]]:
    """The questions as a model baseline asks them, and its pictures. Questions without a picture stay as they are."""
    if baseline == "no_image":
        return [question._replace(image=None) for question in questions], image_of
    if baseline == "grey_image":
        grey = np.zeros((3, image_size, image_size), np.float32)  # the mean colour is zero after preprocessing
        return [question._replace(image=question.image and _GREY) for question in questions], lambda _: grey
    other = other_images([question.image for question in questions if question.image is not None], seed)
    return [question._replace(image=question.image and other[question.image]) for question in questions], image_of
