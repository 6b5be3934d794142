"""What prompts, labels and generation ask of a tokenizer, and which class a directory wants."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stllava.errors import FormatError
from stllava.text.tokenizer import MODEL_FILE, Tokenizer

TOKENIZER_JSON = "tokenizer.json"


class AnyTokenizer(Protocol):
    """`Tokenizer` (SentencePiece) and `FastTokenizer` (tokenizer.json): text <-> ids, and the ids with a meaning of their own."""

    model_max_length: int

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def unk_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> Mapping[str, int]: ...

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`; `add_bos` puts the begin token in front where the model wants one, so `encode("")` is that token or nothing."""

    def encode_piecewise(self, text: str, after_special: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a stretch without special tokens, and where in `text` each begins."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None: ...


def has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    """Whether `load_tokenizer` finds one there."""
    return any((Path(directory) / name).is_file() for name in (MODEL_FILE, TOKENIZER_JSON))


def load_tokenizer(directory: str | os.PathLike[str]) -> AnyTokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.model if it is there, since LLaVA was trained with the slow tokenizer, else tokenizer.json.

    Raises FormatError, ConfigError naming file and key.
    """
    folder = Path(directory)
    if (folder / MODEL_FILE).is_file():
        return Tokenizer.from_pretrained(folder)
    if (folder / TOKENIZER_JSON).is_file():
        from stllava.text.fast_tokenizer import FastTokenizer
        return FastTokenizer.from_pretrained(folder)
    raise FormatError(f"{folder}: neither {MODEL_FILE} nor {TOKENIZER_JSON}; copy the tokenizer's files from the base model", path=folder)
