"""Where the recorded text cases lie, and the tokenizers all text tests share."""

import functools
import json
from pathlib import Path
from typing import Any

from stllava.text import Tokenizer

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
TEMPLATES = GOLDENS / "templates"


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def tokenizer(legacy: bool = True) -> Tokenizer:
    return Tokenizer(TEMPLATES / "tokenizer.model", legacy=legacy)


@functools.cache
def dialogues() -> dict[str, dict[str, Any]]:
    return {item["id"]: item for item in load(TEMPLATES / "conversations.json")}


def label_files() -> list[Path]:
    return sorted(TEMPLATES.glob("*_max*.json"))
