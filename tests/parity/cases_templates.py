"""Recomputes every recorded sample of the `templates` case from its inputs alone.

Inputs: tokenizer.model, conversations.json, the file names (template, sq_r, length limit, tokenizer flag), and per sample
its id and draws. (The recorded strings and open prompts are replayed by tests/python/test_text_*.py.)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stllava.constants import IGNORE_INDEX
from stllava.conversation import ConversationError
from stllava.text import Tokenizer, preprocess_compat

_LABEL_FILE = re.compile(
    r"(?P<nonlegacy>nonlegacy_)?(?P<template>\w+?)(?:_sq(?P<sq_r>\d+(?:\.\d+)?))?_max(?P<max_length>\d+)\.json"
)


def replay_templates(case_dir: Path | str) -> dict[str, Any]:
    """File name -> {"samples": [{"id", "prompt", "input_ids", "labels", ...}]}, in the order of the recording."""
    case_dir = Path(case_dir)
    tokenizers = {legacy: Tokenizer(case_dir / "tokenizer.model", legacy=legacy) for legacy in (True, False)}
    dialogues = {item["id"]: item for item in _load(case_dir / "conversations.json")}
    replayed: dict[str, Any] = {}
    for path in sorted(case_dir.glob("*.json")):
        settings = _LABEL_FILE.fullmatch(path.name)
        if settings:
            tokenizer = tokenizers[settings["nonlegacy"] is None]
            recorded = _load(path)["samples"]
            samples = [_sample(dialogues[entry["id"]], entry.get("draws"), settings, tokenizer) for entry in recorded]
            replayed[path.name] = {"samples": samples}
    return replayed


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _sample(
    dialogue: dict[str, Any], draws: list[dict[str, Any]] | None, settings: re.Match[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    max_length = int(settings["max_length"])
    try:
        result = preprocess_compat(
            dialogue["conversations"],
            settings["template"],
            tokenizer,
            "image" in dialogue,
            sq_r=float(settings["sq_r"] or 0.0),
            draws={draw["turn"]: draw["u"] for draw in draws or ()},
            max_length=max_length,
        )
    except ConversationError:
        return {"id": dialogue["id"], "error": "AssertionError"}  # how the original refuses a dialogue
    ids, labels = result["input_ids"], result["labels"]
    if len(ids) > max_length:
        result |= {"collated_input_ids": ids[:max_length], "collated_labels": labels[:max_length]}
    return result | {
        "id": dialogue["id"],
        "label_tokens_after_cut": sum(label != IGNORE_INDEX for label in labels[:max_length]),
        "attention_mask_false_inside": ids[:max_length].count(tokenizer.pad_token_id),
    }
