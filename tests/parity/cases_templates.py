"""Recomputes every recorded file of the `templates` case from its inputs alone.

Inputs: tokenizer.model, conversations.json, the file names (template, sq_r, length limit, tokenizer flag), per sample
the id and the draws, the strings of encode_decode.json and the dialogues of open_prompts.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stllava.constants import IGNORE_INDEX
from stllava.conversation import ConversationError, conv_templates
from stllava.text import Tokenizer, preprocess_compat, tokenizer_image_token

_LABEL_FILE = re.compile(
    r"(?P<nonlegacy>nonlegacy_)?(?P<template>\w+?)(?:_sq(?P<sq_r>\d+(?:\.\d+)?))?_max(?P<max_length>\d+)\.json"
)


def replay_templates(case_dir: Path | str) -> dict[str, Any]:
    """File name -> recomputed content; label files as {"samples": [{"id", "prompt", "input_ids", "labels", ...}]}."""
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
    replayed["encode_decode.json"] = _encode_decode(_load(case_dir / "encode_decode.json"), tokenizers)
    open_prompts = _load(case_dir / "open_prompts.json")
    replayed["open_prompts.json"] = [_open_prompt(entry, tokenizers[True]) for entry in open_prompts]
    replayed["system_texts.json"] = {name: _system_text(name) for name in _load(case_dir / "system_texts.json")}
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


def _encode_decode(recorded: dict[str, Any], tokenizers: dict[bool, Tokenizer]) -> dict[str, Any]:
    legacy = tokenizers[True]
    encoded = []
    for entry in recorded["encode"]:
        text, ids = entry["text"], legacy.encode(entry["text"])
        encoded.append(
            {
                "text": text,
                "input_ids": ids,
                "nonlegacy_input_ids": tokenizers[False].encode(text),
                "image_ids": tokenizer_image_token(text, legacy),
                "decoded": legacy.decode(ids),
                "decoded_with_special": legacy.decode(ids, skip_special_tokens=False),
            }
        )
    return {
        "encode": encoded,
        "decode": [
            {"input_ids": entry["input_ids"], "decoded": legacy.decode(entry["input_ids"])}
            for entry in recorded["decode"]
            if "input_ids" in entry
        ],
        "image_markers": [
            {"text": entry["text"], "image_ids": tokenizer_image_token(entry["text"], legacy)}
            for entry in recorded["image_markers"]
        ],
    }


def _open_prompt(entry: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    conversation = conv_templates[entry["template"]].copy()
    user, assistant = conversation.roles[:2]
    if "question" in entry:
        turns = [*entry["earlier_turns"], [entry["question"], None]]
    else:  # the one recorded asking prompt
        turns = [["Can you describe the image in detail?", "It shows a lung."]]
    for i, (question, answer) in enumerate(turns):
        conversation.append_message(user, question if i else f"<image>\n{question}")
        conversation.append_message(assistant, answer)
    if "question" not in entry:
        conversation.append_message(conversation.roles[2], None)
    inputs = {key: entry[key] for key in ("template", "earlier_turns", "question") if key in entry}
    try:
        prompt = conversation.get_prompt()
    except ConversationError:
        return inputs | {"error": "not renderable"}
    return inputs | {"prompt": prompt, "input_ids": tokenizer_image_token(prompt, tokenizer)}


def _system_text(name: str) -> dict[str, Any]:
    template = conv_templates[name]
    return {
        "system": template.system,
        "bytes": len(template.system.encode()),
        "roles": list(template.roles),
        "sep_style": template.sep_style.name,
        "sep": template.sep,
        "sep2": template.sep2,
        "version": template.version,
    }
