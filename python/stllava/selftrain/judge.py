"""Step C: a judge scores answers two at a time, in both orders, and everything it said is kept (spec 9.1.8, D40-D43)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from stllava.data.steps import run_step
from stllava.errors import ConfigError

__all__ = ["Judge", "RecordedJudge", "judge"]


class Judge(Protocol):
    """Anything that compares two answers: rules, a model, an API, recorded replies."""

    def score(self, image_id: str, question: str, answer_1: str, answer_2: str) -> tuple[float, float, str]:
        """(score 1, score 2, raw reply); scores from 1 to 10, or (-1, -1) where the reply could not be read."""


class RecordedJudge:
    """Plays back raw replies. replies: (image id, question, answer 1, answer 2) -> reply text; parsed as `judge_parse` does."""

    def __init__(self, replies: Mapping[tuple[str, str, str, str], str], *, strict: bool = True) -> None:
        self.replies, self.strict = replies, strict

    def score(self, image_id: str, question: str, answer_1: str, answer_2: str) -> tuple[float, float, str]:
        from .judge_parse import parse_scores
        key = (image_id, question, answer_1, answer_2)
        if key not in self.replies:
            raise ConfigError(f"no recorded reply for image {image_id!r}, question {question!r} and these two answers in this order")
        raw = self.replies[key]
        return *parse_scores(raw, strict=self.strict), raw


def judge(answered: Iterable[dict[str, Any]], by: Judge, *, both_orders: bool = True, out: str | Path | None = None,
          progress: bool = True) -> list[dict[str, Any]]:
    """Scores the answers of every record of `answer`.

    Different answers are compared neighbour by neighbour (first with second, second with third, ...), each pair in both orders unless
    `both_orders` is off (the original's way). An answer's score is the mean of the scores it got.

    Returns:
        the records with ``"candidates"``: ``[{"answer", "score" (None: no readable reply)}]``, and ``"replies"``: every
        ``{"answers": [first, second], "scores", "raw"}``.
    """

    def work(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in batch:
            answers = list(dict.fromkeys(text for text in row["answers"] if text))
            replies = []
            for pair in itertools.pairwise(answers):
                for first, second in ((pair, pair[::-1]) if both_orders else (pair,)):
                    score_1, score_2, raw = by.score(row["image"], row["question"], first, second)
                    replies.append({"answers": [first, second], "scores": [score_1, score_2], "raw": raw})
            scores: dict[str, list[float]] = {text: [] for text in answers}
            for reply in replies:
                if min(reply["scores"]) >= 0:
                    for text, score in zip(reply["answers"], reply["scores"], strict=True):
                        scores[text].append(score)
            yield {**row, "candidates": [{"answer": text, "score": sum(found) / len(found) if found else None} for text, found in scores.items()],
                   "replies": replies}

    return run_step(answered, lambda row: row["id"], work, out=out, batch_size=64, label="judge", progress=progress)
