"""Step D: judged answers -> preference pairs in the original's training layout; dropped items are counted by reason (spec D37, D38, D42, D45)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stllava.constants import DEFAULT_IMAGE_TOKEN
from stllava.data.steps import item_seed
from stllava.errors import ConfigError

__all__ = ["PairSettings", "build_pairs"]

_YES_NO = re.compile(r"\s*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PairSettings:
    """`margin`: pairs whose scores differ by no more are ties (0: those with the same score). `ties`: "drop" them, or "last": of equal scores the
    later answer is the chosen one, as in the original. `balance`: within a question type, as many chosen "yes" as chosen
    "no" (a judge that mostly says no would otherwise teach "no"). `seed` decides which surplus pairs go."""

    margin: float = 0.0
    ties: str = "drop"
    balance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ties not in ("drop", "last"):
            raise ConfigError(f"ties is {self.ties!r}, supported: drop, last", field="ties")
        if not self.margin >= 0:
            raise ConfigError(f"margin is {self.margin}, want a number >= 0", field="margin")


def build_pairs(judged: Iterable[dict[str, Any]], image_of: Callable[[str], str], settings: PairSettings = PairSettings(), *,
                type_of: Callable[[str], str | None] | None = None) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Best against worst answer of every judged question.

    Args:
        judged: records of `judge`. image_of: id -> the file name written into the pair.
        type_of: question -> its type, for balancing; None: a question that is not wanted ("unknown_question"). Default: all questions are
            of one type.

    Returns:
        pairs (`chosen_conversations`, `reject_conversations`, `image`, `id`, and the provenance: question, type, both scores), and the number of
        items dropped by reason: ``unknown_question``, ``one_answer`` (all answers equal or empty), ``unread`` (no readable reply), ``tie``,
        ``unbalanced``.
    """
    dropped: Counter[str] = Counter({"unknown_question": 0, "one_answer": 0, "unread": 0, "tie": 0, "unbalanced": 0})
    pairs = []
    for row in judged:
        kind = type_of(row["question"]) if type_of is not None else "any"
        scored = [candidate for candidate in row["candidates"] if candidate["score"] is not None]
        if kind is None:
            dropped["unknown_question"] += 1
        elif len(row["candidates"]) < 2:
            dropped["one_answer"] += 1
        elif len(scored) < 2:
            dropped["unread"] += 1
        else:
            ranked = sorted(scored, key=lambda candidate: candidate["score"])  # stable: of equal ones the earlier first
            best, worst = ranked[-1], ranked[0]
            if best["score"] - worst["score"] <= settings.margin and settings.ties == "drop":
                dropped["tie"] += 1
            else:
                pairs.append(_pair(row, kind, best, worst, image_of(row["image"])))
    if settings.balance:
        kept = _balanced(pairs, settings.seed)
        dropped["unbalanced"] = len(pairs) - len(kept)
        pairs = kept
    return pairs, dict(dropped)


def _pair(row: dict[str, Any], kind: str, best: dict[str, Any], worst: dict[str, Any], image: str) -> dict[str, Any]:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{row['question']}"}, {"from": "gpt", "value": answer}]
    return {"id": row["id"], "image": image, "chosen_conversations": turns(best["answer"]), "reject_conversations": turns(worst["answer"]),
            "question": row["question"], "question_type": kind, "scores": [best["score"], worst["score"]]}


def _balanced(pairs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Pairs in their order, without the surplus of chosen yes or no of each type; pairs whose answers are neither stay."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for pair in pairs:
        answer = _YES_NO.match(pair["chosen_conversations"][-1]["value"])
        if answer:
            groups.setdefault((pair["question_type"], answer[1].lower()), []).append(pair)
    surplus: set[str] = set()
    for kind in {kind for kind, _ in groups}:
        yes, no = groups.get((kind, "yes"), []), groups.get((kind, "no"), [])
        larger, size = (yes, len(no)) if len(yes) > len(no) else (no, len(yes))
        ranked = sorted(larger, key=lambda pair: item_seed(seed, "balance", pair["id"]))
        surplus.update(pair["id"] for pair in ranked[size:])
    return [pair for pair in pairs if pair["id"] not in surplus]
