"""A judge that knows the truth of every atlas image, in the place of a large vision-language model.

It grades an answer by the facts in it. Every content word of the language (axial, T1, cerebellum, green, upper, yes, …) is one
fact. With the words of the true answer as the reference,

    score = 1 + 9 · max(0, hits − wrong − noise / 2) / (number of true words)

where `hits` are true words that the answer states, `wrong` are content words that are not true, and `noise` counts words outside
the language and repeated content words. So a caption that misses the marker scores lower than a complete one, one that also
names a structure that is not there lower still, and wrong short answers mostly tie at 1, so that a wrong answer is seldom
preferred to another. A structure whose visibility is not certain is neither right nor wrong in a caption. Each answer is graded
alone: exchanging the two answers exchanges the two scores, and position bias is zero by construction.

The reply has the shape that judges are asked for (spec 1.4 step C): the first line holds two numbers, for answer 1 and 2. A
question that cannot be judged gives -1 -1, the value that a failed parse has in the original, and the sample is dropped there.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .questions import COLOURS, MODALITIES, ORGANS, PLANES, QUADRANTS, Facts, parse

__all__ = ["RuleJudge", "classify"]



def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


_STRUCTURES = ("cerebellum", "ventricles")  # each is a fact and its content word
_CONTENT = frozenset(
    word
    for value in (*MODALITIES, *ORGANS, *PLANES, *COLOURS, *QUADRANTS, *_STRUCTURES, "marker", "yes", "no")
    for word in _words(value)
)
_FILLER = frozenset(("a", "an", "and", "in", "lateral", "of", "picture", "showing", "the", "with"))  # the grammar of captions


def classify(question: str) -> str | None:
    """The type of a question text, in any letter case, or None when it is not a well-formed question of the demo's language."""
    known = parse(question)
    return known[0].type if known else None


class RuleJudge:
    """Answers for the truth of a set of images.

    An image is named by its id ("unlabelled/00012") or its file ("unlabelled/00012.png").
    """

    def __init__(self, facts: Mapping[str, Facts]) -> None:
        self._facts = dict(facts)

    @classmethod
    def from_file(cls, truth_path: str | os.PathLike[str]) -> RuleJudge:
        """Reads truth.json of a built atlas."""
        records = json.loads(Path(truth_path).read_text(encoding="utf-8"))
        return cls({name: Facts.from_json(record) for name, record in records.items()})

    def facts(self, image_id: str) -> Facts:
        """Raises KeyError for an image that is not in the truth file."""
        name = image_id.removesuffix(".png")
        if name not in self._facts:
            raise KeyError(f"image {image_id!r} is not in the truth file ({len(self._facts)} images)")
        return self._facts[name]

    def truth(self, image_id: str, question: str) -> str | None:
        """The true answer; None when the question is not well-formed or its answer is not known for this image."""
        facts = self.facts(image_id)
        known = parse(question)
        return known[0].answer(facts, known[1]) if known else None

    def judgeable(self, image_id: str, question: str) -> bool:
        return self.truth(image_id, question) is not None

    def score(self, image_id: str, question: str, answer_1: str, answer_2: str) -> tuple[float, float, str]:
        """Scores from 1 to 10 of both answers (-1 when the question cannot be judged), and the reply they stand in."""
        truth = self.truth(image_id, question)
        if truth is None:
            reason = "is not a known question" if classify(question) is None else "has no certain answer for this image"
            return -1.0, -1.0, f"-1 -1\nThe question {reason}."
        unsure = {name for name in _STRUCTURES if getattr(self.facts(image_id), name) is None}
        grades = [_grade(truth, answer, unsure) for answer in (answer_1, answer_2)]
        (score_1, reason_1), (score_2, reason_2) = grades
        return score_1, score_2, f"{score_1:g} {score_2:g}\nAnswer 1 {reason_1}. Answer 2 {reason_2}. The true answer is: {truth}"


def _grade(truth: str, answer: str, unsure: set[str]) -> tuple[float, str]:
    true_words = {word for word in _words(truth) if word in _CONTENT}
    counts = Counter(_words(answer))
    stated = {word for word in counts if word in _CONTENT and word not in unsure}
    hits, wrong = len(stated & true_words), len(stated - true_words)
    noise = sum(n if word not in _CONTENT else n - 1 for word, n in counts.items() if word not in _FILLER)
    share = max(0.0, hits - wrong - noise / 2) / len(true_words)
    return round(1 + 9 * share, 1), f"states {hits} of {len(true_words)} facts, {wrong} wrong, {noise} stray words"
