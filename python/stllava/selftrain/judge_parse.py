"""Scores out of a judge's reply. The rule asks for two numbers, and nothing else, on the first line."""

from __future__ import annotations

import re

NO_SCORES = (-1.0, -1.0)
"""What both parsers return when the reply gives no usable pair."""

_PAIR = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\s*", re.ASCII)


def parse_scores_compat(reply: str) -> tuple[float, float]:
    """(score of answer 1, score of answer 2) as the original reads them, NO_SCORES otherwise.

    Commas become spaces and the first line is split at every single space, so "8, 7" gives three fields and is thrown
    away; any two floats pass, also "nan" and "-3". Source: `parse_score`, `llava/eval/eval_gpt4v_review.py`.
    """
    fields = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(fields) != 2:
        return NO_SCORES
    try:
        return float(fields[0]), float(fields[1])
    except ValueError:
        return NO_SCORES


def parse_scores(reply: str, low: float = 1.0, high: float = 10.0) -> tuple[float, float]:
    """(score of answer 1, score of answer 2) from a first line of two numbers in [low, high], NO_SCORES otherwise.

    The numbers may be separated by spaces, a comma, or both; anything else on the line is refused.
    """
    match = _PAIR.fullmatch(reply.split("\n")[0])
    scores = (float(match[1]), float(match[2])) if match else NO_SCORES
    return scores if all(low <= score <= high for score in scores) else NO_SCORES
