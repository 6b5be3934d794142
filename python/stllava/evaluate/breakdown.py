"""Test items in groups: by modality, organ, question type and what else their files say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["FIELDS", "MIN_GROUP", "groups_of"]

MIN_GROUP = 20
"""Groups of fewer items are shown with their number and without an interval."""

FIELDS: dict[str, tuple[str, ...]] = {
    "modality": ("modality", "domain"), "organ": ("organ", "image_organ", "location"), "question type": ("question_type", "content_type"),
    "phrase type": ("phrase_type",), "knowledge": ("base_type",), "language": ("q_lang", "language")}
"""Heading -> fields of VQA-RAD, SLAKE, PathVQA and LLaVA-Med files; the first that an item has counts."""


def groups_of(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Heading -> group -> rows of its items, largest first, then by name. A heading that puts all items into one group is absent.

    A field with several values ("PRES, POS", LLaVA-Med's `domain`) counts its item in each.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for heading, fields in FIELDS.items():
        groups: dict[str, list[int]] = {}
        for row, item in enumerate(items):
            for name in _names(next((item[field] for field in fields if item.get(field) not in (None, "")), None)):
                groups.setdefault(name, []).append(row)
        if len(groups) > 1:
            found[heading] = dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))
    return found


def _names(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        return [str(name).strip().lower() for name, holds in value.items() if holds is True]
    if value is None or isinstance(value, (list, tuple)):
        return [str(name).strip().lower() for name in value or ()]
    return dict.fromkeys(name for part in str(value).replace(";", ",").split(",") if (name := " ".join(part.lower().split())))
