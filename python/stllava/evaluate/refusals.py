"""Answers that answer nothing: empty ones, and those that decline."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stllava.evaluate.report import VqaItem

__all__ = ["REFUSAL", "is_refusal", "unhelpful"]

REFUSAL = "refusal@1"
"""Version of the patterns. They know English, and forms that models use; what they find is listed, never scored differently."""

_VERB = r"(?:determine|answer|provide|tell|say|assess|interpret|analy[sz]e|diagnose|give|help|assist|comment|access)"
_PATTERNS = tuple(re.compile(pattern) for pattern in (
    rf"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to) (?:be )?(?:\w+ )?{_VERB}",
    r"\b(?:i am|i'm|we are|we're) (?:\w+ )?(?:sorry|unable|not able|not qualified)",
    r"\b(?:i|we) (?:do not|don't) (?:know|have (?:enough|access|the ability))",
    r"\bas an? (?:ai|artificial intelligence|language model|large language model)\b",
    rf"\b(?:is not|isn't|it's not|not) possible to {_VERB}",
    r"\b(?:no|without an?|not see any) image (?:was |is |has been )?(?:provided|attached|given|shown|supplied)",
    r"\bplease (?:provide|upload|attach) (?:an?|the) image",
    r"\b(?:please )?consult (?:a|an|your|with) (?:\w+ )?(?:doctor|physician|radiologist|professional|specialist|clinician|provider)"))


def is_refusal(text: str) -> bool:
    """Whether a text declines to answer. "I cannot see a fracture" and "a tumour cannot be excluded" are answers."""
    folded = " ".join(text.lower().replace("’", "'").split())
    return any(pattern.search(folded) for pattern in _PATTERNS)


def unhelpful(items: Sequence[VqaItem]) -> tuple[list[VqaItem], list[VqaItem]]:
    """(empty, refused) items of a report. Empty: no answer, or none with a character that is not white space."""
    empty = [item for item in items if not (item.prediction or "").strip()]
    return empty, [item for item in items if item.prediction is not None and is_refusal(item.prediction)]
