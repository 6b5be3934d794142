"""The slow LLaMA tokenizer: SentencePiece plus the special-token rules that LLaVA checkpoints were trained with.

Special tokens are found in the text first; each stretch between them is encoded on its own, with its own dummy prefix.
`legacy` (Transformers' flag of the same name) says what happens after a special token: legacy tokenizers keep the dummy
prefix there ("</s>b" -> "▁b"), the others drop it ("</s>b" -> "b"). Source: `LlamaTokenizer` of Transformers 4.31.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava.checkpoint.atomic import make_directory, write_bytes
from stllava.checkpoint.strict_json import dump_object, read_object
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_ADDED_TOKENS, MAX_JSON_ITEMS, MAX_PIECE_BYTES, MAX_TOKENIZER_BYTES, MAX_VOCABULARY
from stllava.paths import read_regular

if TYPE_CHECKING:
    import sentencepiece

_UNDERLINE = "\u2581"
MODEL_FILE, CONFIG_FILE, _ADDED_FILE = "tokenizer.model", "tokenizer_config.json", "added_tokens.json"


class Tokenizer:
    """Text <-> ids.

    Args:
        model_file: SentencePiece model (`tokenizer.model`), or the bytes of one.
        legacy: see the module text; `tokenizer_config.json` says which one a checkpoint wants, absent means True.
        model_max_length: number of ids that the checkpoint's training data was cut at; nothing is cut here.
        added_tokens: further special tokens and their ids, as in `added_tokens.json`.

    Padding uses the unknown token (id 0), as LLaVA does.
    """

    def __init__(
        self,
        model_file: str | os.PathLike[str] | bytes,
        legacy: bool = True,
        model_max_length: int = 2048,
        added_tokens: Mapping[str, int] | None = None,
    ) -> None:
        path = Path(MODEL_FILE if isinstance(model_file, bytes) else model_file)
        if isinstance(model_file, bytes):
            self.model_bytes = model_file
        elif path.exists():
            self.model_bytes = read_regular(path, MAX_TOKENIZER_BYTES)
        else:
            raise FormatError(f"{path}: no such file, want a SentencePiece model", path=path)
        self._sp = _load(self.model_bytes, path)
        self.legacy = legacy
        self.model_max_length = model_max_length
        self.added_tokens = dict(added_tokens or {})
        if len(self.added_tokens) > MAX_ADDED_TOKENS:
            raise FormatError(f"{path}: {len(self.added_tokens)} added tokens, limit {MAX_ADDED_TOKENS}", path=path)
        for token, i in self.added_tokens.items():
            if not token or len(token.encode("utf-8", "surrogatepass")) > MAX_PIECE_BYTES or type(i) is not int or not 0 <= i < MAX_VOCABULARY:
                raise FormatError(f"{path}: added token {token[:80]!r}: {i!r}, want a text of 1 to {MAX_PIECE_BYTES} bytes and an id from 0 to "
                                  f"{MAX_VOCABULARY - 1}", path=path, field=token[:80])

        self.bos_token_id: int = self._sp.bos_id()
        self.eos_token_id: int = self._sp.eos_id()
        self.unk_token_id: int = self._sp.unk_id()
        if min(self.bos_token_id, self.eos_token_id, self.unk_token_id) < 0:
            raise FormatError(f"{path}: want a LLaMA tokenizer, but there is no begin, end or unknown token", path=path)
        self.pad_token_id = self.unk_token_id
        base = (self.unk_token_id, self.bos_token_id, self.eos_token_id)
        self.special_ids: dict[str, int] = {self._sp.id_to_piece(i): i for i in base} | self.added_tokens
        self._special_pieces = {i: piece for piece, i in self.special_ids.items()}
        self.vocab_size: int = max(self._sp.vocab_size(), *(i + 1 for i in self._special_pieces))
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    # ---- text -> ids

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`; no end token is added.

        parse_special: turn "</s>" and the like inside `text` into their ids. Give False for anything a user wrote:
        then no text can become a special id.
        """
        ids = [self.bos_token_id] if add_bos else []
        after_special = False
        for part in self._special_pattern.split(text) if parse_special else [text]:
            if parse_special and part in self.special_ids:
                ids.append(self.special_ids[part])
                after_special = True
            elif part:
                ids += self.encode_piecewise(part, after_special)[0]
        return ids

    def encode_piecewise(self, text: str, after_special: bool = False) -> tuple[list[int], list[int]]:
        """Encode one stretch without special tokens: (ids, begins), begins[i] = index in `text` where piece i starts.

        A leading "▁" that stands for no character of `text` begins at 0, the bytes of a character at that character.

        after_special: a special token stands right before the stretch. Non-legacy tokenizers then take the "▁" off the
        first piece, and what is left may be unknown ("▁evaluate" is a piece, "evaluate" is none), as in the original.
        In prompts only template text stands there; `check_template` makes sure that it is known.
        """
        if not self.legacy:
            text = text.replace(_UNDERLINE, " ")
        ids: list[int] = self._sp.encode(text, out_type=int)
        if self.unk_token_id in ids:  # then only the library knows which characters it stands for
            pieces: list[str] = self._sp.encode(text, out_type=str)
        else:
            pieces = [self._pieces[i] for i in ids]
        begins = self._begins(text, pieces, ids)
        if not self.legacy and after_special and not text.startswith(" ") and pieces[0].startswith(_UNDERLINE):
            rest = pieces[0][1:]
            ids[:1] = [self._sp.piece_to_id(rest)] if rest else []
            begins[:1] = [0] if rest else []
        return ids, begins

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return [self._sp.id_to_piece(i) for i in range(self._sp.vocab_size())]

    @functools.cached_property
    def _bytes(self) -> frozenset[int]:
        """Ids that stand for one byte."""
        return frozenset(i for i in range(self._sp.vocab_size()) if self._sp.is_byte(i))

    def _begins(self, text: str, pieces: Sequence[str], ids: Sequence[int]) -> list[int]:
        # Pieces spell "▁" + text. Counted here because the library's own offsets changed interface between versions.
        begins, position = [], -1
        if self._bytes.isdisjoint(ids):
            *begins, position = accumulate(map(len, pieces), initial=position)
            begins[:1] = [0] if begins else []
        else:
            for piece, i in zip(pieces, ids, strict=True):
                if i in self._bytes:
                    continues_character = 0x80 <= int(piece[3:5], 16) < 0xC0
                    begins.append(max(position - continues_character, 0))
                    position += not continues_character
                else:
                    begins.append(max(position, 0))
                    position += len(piece)
        if pieces and position != len(text):
            raise ConfigError(
                f"the tokenizer rewrites text ({text!r} became {''.join(pieces)!r}), so labels cannot be placed; "
                "want a model with identity normalisation, as LLaMA's"
            )
        return begins

    # ---- ids -> text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 become U+FFFD.

        With special tokens kept, a run before a special token gets one space in front unless the sequence starts there
        or another special token precedes it (as Transformers 4.31 does).
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}; remove image markers first")
        if skip_special_tokens:
            return self._decode_run([i for i in ids if i not in self._special_pieces])
        text, run = "", []
        previous_is_special = False
        for position, i in enumerate(ids):
            piece = self._special_pieces.get(i)
            if piece is None:
                run.append(i)
            else:
                text += (" " if position and not previous_is_special else "") + self._decode_run(run) + piece
                run = []
            previous_is_special = piece is not None
        return text + self._decode_run(run)

    def _decode_run(self, ids: Sequence[int]) -> str:
        text: str = self._sp.decode([int(i) for i in ids])
        return text

    # ---- files

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.model` and, where present, `tokenizer_config.json` and `added_tokens.json`.

        Raises FormatError for missing or damaged files, ConfigError for settings that would change ids and are not
        implemented.
        """
        folder = Path(directory)
        if not (folder / MODEL_FILE).is_file():
            raise FormatError(
                f"{folder}: no {MODEL_FILE}; copy it from the base model (`load_tokenizer` reads a tokenizer.json too)", path=folder
            )
        config_path = folder / CONFIG_FILE
        config = _read_if_present(config_path)
        for key, implemented in (("add_bos_token", True), ("add_eos_token", False), ("add_prefix_space", True)):
            if config.get(key) not in (None, implemented):
                raise ConfigError(
                    f"{config_path}: {key} = {config[key]!r} is not implemented, want {implemented}",
                    path=config_path,
                    field=key,
                )
        legacy = config.get("legacy")
        if legacy is not None and type(legacy) is not bool:
            raise ConfigError(f"{config_path}: legacy is {legacy!r}, want true or false", path=config_path, field="legacy")
        return cls(
            folder / MODEL_FILE,
            legacy=legacy is not False,
            model_max_length=length_limit(config, config_path),
            added_tokens=_read_if_present(folder / _ADDED_FILE, MAX_ADDED_TOKENS),
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the files `from_pretrained` (and Transformers' LlamaTokenizer) reads."""
        folder = make_directory(directory)
        write_bytes(folder / MODEL_FILE, self.model_bytes)
        unk, bos, eos = (self._special_pieces[i] for i in (self.unk_token_id, self.bos_token_id, self.eos_token_id))
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": self.legacy,
            "model_max_length": self.model_max_length,
            "padding_side": "right",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": bos,
            "eos_token": eos,
            "unk_token": unk,
            "pad_token": unk,
        }
        write_bytes(folder / CONFIG_FILE, dump_object(config))
        if self.added_tokens:
            write_bytes(folder / _ADDED_FILE, dump_object(self.added_tokens))


def _load(data: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """The library's model, with pieces that are text: it takes any bytes, and fails later where they are met."""
    import sentencepiece  # not above: a model that is only trained or measured does not need it

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        n = model.vocab_size()
        if n > MAX_VOCABULARY:
            raise FormatError(f"{path}: {n} pieces, limit {MAX_VOCABULARY}", path=path)
        for i in range(n):
            if len(model.id_to_piece(i).encode("utf-8")) > MAX_PIECE_BYTES:
                raise FormatError(f"{path}: piece {i} is longer than {MAX_PIECE_BYTES} bytes", path=path)
    except (RuntimeError, UnicodeError) as error:
        raise FormatError(f"{path}: not a SentencePiece model: {error}", path=path) from error
    return model


def length_limit(config: Mapping[str, Any], path: Path) -> int:
    """`model_max_length` of a tokenizer_config.json, default 2048. Raises ConfigError."""
    longest = config.get("model_max_length")
    longest = 2048 if longest is None else longest
    if type(longest) not in (int, float) or longest < 1:  # transformers writes 1e30 for "none"
        raise ConfigError(f"{path}: model_max_length is {longest!r}, want a positive number", path=path, field="model_max_length")
    return int(longest)


def _read_if_present(path: Path, max_items: int = MAX_JSON_ITEMS) -> dict[str, Any]:
    return read_object(path, max_items) if path.exists() else {}
