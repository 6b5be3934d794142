"""Scores out of a judge's reply. The rule asks for two numbers, and nothing else, on the first line."""

from __future__ import annotations

import re

LOWEST, HIGHEST = 1.0, 10.0
NO_SCORES = (-1.0, -1.0)
"""What a reply without a usable pair of scores gives."""

_PAIR = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\s*", re.ASCII)


def parse_scores(reply: str, *, strict: bool = True) -> tuple[float, float]:
    """(score of answer 1, score of answer 2), or NO_SCORES.

    strict: two numbers from 1 to 10 with spaces, a comma or both between them. Not strict is the original's rule: commas
    become spaces and the line is split at every single space, so "8, 7" gives three fields and is thrown away, while
    any two floats pass, "nan" and "-3" too. Source: `parse_score`, `llava/eval/eval_gpt4v_review.py`.
    """
    line = reply.split("\n")[0]
    return _parse_pair(line) if strict else _parse_fields(line)


def _parse_pair(line: str) -> tuple[float, float]:
    match = _PAIR.fullmatch(line)
    scores = (float(match[1]), float(match[2])) if match else NO_SCORES
    return scores if all(LOWEST <= score <= HIGHEST for score in scores) else NO_SCORES


def _parse_fields(line: str) -> tuple[float, float]:
    fields = line.replace(",", " ").split(" ")
    if len(fields) != 2:
        return NO_SCORES
    try:
        return float(fields[0]), float(fields[1])
    except ValueError:
        return NO_SCORES
