"""Tokenizers that come as tokenizer.json, over the package `tokenizers` (extra `[tokenizers]`).

The package does the work: byte-level BPE (GPT-2, SmolLM2, LLaMA 3) and BPE with ▁ and byte fallback (LLaMA 1 and 2) alike. This class gives it the
interface of `stllava.text.tokenizer.Tokenizer`, and its promise: text of a user never becomes a special id.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllava.checkpoint import strict_json
from stllava.checkpoint.atomic import make_directory, write_bytes
from stllava.errors import ConfigError, FormatError
from stllava.text import tokenizer_json
from stllava.text.interface import TOKENIZER_JSON
from stllava.text.tokenizer import CONFIG_FILE, length_limit

if TYPE_CHECKING:
    import tokenizers

_MAP_FILE = "special_tokens_map.json"


class FastTokenizer:
    """Text <-> ids.

    Args:
        backend: a built tokenizer; it belongs to this object from now on.
        eos_token, bos_token, unk_token, pad_token: texts of the tokens; padding uses unk, else eos, where there is none.
        add_bos: whether a text starts with the begin token, if there is one; default: as the backend's post-processor does it.
        model_max_length: number of ids that the checkpoint's training data was cut at; nothing is cut here.

    Raises ConfigError for a token that is not in the vocabulary and for post-processors that add anything but the begin token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_token: str, bos_token: str | None = None, unk_token: str | None = None,
                 pad_token: str | None = None, add_bos: bool | None = None, model_max_length: int = 2048) -> None:
        self.model_max_length = model_max_length
        backend.no_truncation()
        backend.no_padding()
        self._texts = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        ids: dict[str, int] = {}
        for key, text in self._texts.items():
            if text is not None:
                token_id = backend.token_to_id(text)
                if token_id is None:
                    raise ConfigError(f"{key} {text[:80]!r} is not in the vocabulary", field=key)
                ids[key] = token_id
        self.bos_token_id, self.unk_token_id = ids.get("bos_token"), ids.get("unk_token")
        self.eos_token_id = ids["eos_token"]
        self.pad_token_id: int = ids.get("pad_token", ids.get("unk_token", self.eos_token_id))
        self.add_bos: bool = _adds_bos(backend, self.bos_token_id) if add_bos is None else add_bos and self.bos_token_id is not None
        added = backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.special_ids |= {text: ids[key] for key, text in self._texts.items() if text is not None}
        self._special_pieces = {i: text for text, i in self.special_ids.items()}
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._post_processor = backend.post_processor
        backend.post_processor = None  # begins of pieces would lose their blank; the begin token is our affair
        self._backend = backend

    # ---- text -> ids

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`; no end token is added, and the begin token only where `self.add_bos`.

        parse_special: turn "</s>" and the like inside `text` into their ids. Give False for anything a user wrote.
        """
        ids = [self.bos_token_id] if add_bos and self.add_bos and self.bos_token_id is not None else []
        found: list[int] = self._backend.encode(text, add_special_tokens=False).ids if parse_special else self.encode_piecewise(text)[0]
        return ids + found

    def encode_piecewise(self, text: str, after_special: bool = False) -> tuple[list[int], list[int]]:
        """Encode one stretch without special tokens: (ids, begins), begins[i] = index in `text` where piece i starts.

        after_special: a special token stands right before the stretch; a tokenizer that puts its ▁ only in front of the first word of a text
        (prepend_scheme "first", i.e. legacy false) then puts none.
        """
        encoding = (self._continuing if after_special else self._plain).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        begins = [begin for begin, _ in encoding.offsets]
        for i, (begin, end) in zip(ids, encoding.offsets, strict=True):
            if i in self._special_pieces and i != self.unk_token_id and end - begin > 1:  # its letters happen to be a piece: take them apart
                head, tail = self.encode_piecewise(text[:begin + 1], after_special), self.encode_piecewise(text[begin + 1:], after_special=True)
                return head[0] + tail[0], head[1] + [begin + 1 + at for at in tail[1]]
        return ids, begins

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without eyes for special tokens. A copy: the switch is the backend's, and threads share it."""
        return _without_special(self._backend.to_str())

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """`_plain` in the middle of a text."""
        values = json.loads(self._backend.to_str())
        first = [step for step in tokenizer_json.steps(values["pre_tokenizer"], "pretokenizers") if step.get("prepend_scheme") == "first"]
        if not first:
            return self._plain
        for step in first:
            step["prepend_scheme"] = "never"
        return _without_special(json.dumps(values))

    # ---- ids -> text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no valid UTF-8 become U+FFFD."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}; remove image markers first")
        text: str = self._backend.decode([int(i) for i in ids if not (skip_special_tokens and i in self._special_pieces)],
                                         skip_special_tokens=skip_special_tokens)
        return text

    # ---- files

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> FastTokenizer:
        """Read `tokenizer.json` with `tokenizer_config.json` and `special_tokens_map.json` where they are present.

        `chat_template` and `legacy` are not looked at: what `legacy` changes is in tokenizer.json already.
        Raises FormatError for missing or damaged files, ConfigError for settings that would change ids and are not implemented, or if the package
        `tokenizers` is missing.
        """
        folder = Path(directory)
        path, config_path = folder / TOKENIZER_JSON, folder / CONFIG_FILE
        if not path.is_file():
            raise FormatError(f"{folder}: no {TOKENIZER_JSON}; copy it from the base model", path=folder)
        config = strict_json.read_object(config_path) if config_path.exists() else {}
        tokens = (strict_json.read_object(folder / _MAP_FILE) if (folder / _MAP_FILE).exists() else {}) | config
        for key, implemented in (("add_eos_token", False), ("add_bos_token", None), ("split_special_tokens", False)):
            value = config.get(key)
            if value is not None and (type(value) is not bool or implemented not in (None, value)):
                want = "true or false" if implemented is None else implemented
                raise ConfigError(f"{config_path}: {key} = {value!r} is not implemented, want {want}", path=config_path, field=key)
        texts = {key: _token_text(tokens.get(key), key, config_path) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
        eos = texts.pop("eos_token")
        if eos is None:
            raise FormatError(f"{config_path}: eos_token is missing; no answer would end", path=config_path, field="eos_token")
        try:
            return cls(build(tokenizer_json.read(path), path), eos_token=eos, add_bos=config.get("add_bos_token"),
                       model_max_length=length_limit(config, config_path), **texts)
        except ConfigError as error:
            if error.path is not None:
                raise
            raise ConfigError(f"{path}: {error}", path=path, field=error.field) from error

    def to_dict(self) -> dict[str, Any]:
        """The object of tokenizer.json, with the post-processor that the tokenizer came with."""
        values: dict[str, Any] = json.loads(self._backend.to_str())
        if self._post_processor is not None:
            values["post_processor"] = json.loads(self._post_processor.__getstate__())
        return values

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the files `from_pretrained` (and transformers) reads."""
        folder = make_directory(directory)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.model_max_length, "padding_side": "right",
                  "add_bos_token": self.add_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
        texts = {key: text for key, text in self._texts.items() if text is not None}
        write_bytes(folder / TOKENIZER_JSON, json.dumps(self.to_dict(), ensure_ascii=False).encode("utf-8"))
        write_bytes(folder / CONFIG_FILE, strict_json.dump_object(config | texts))
        write_bytes(folder / _MAP_FILE, strict_json.dump_object(texts))


def import_tokenizers(path: str | os.PathLike[str]) -> Any:
    """The package. `path`: the file that needs it, for the message. Raises ConfigError."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"{os.fspath(path)}: this tokenizer needs the package tokenizers: pip install 'stllava[tokenizers]'", path=path) from error
    return tokenizers


def build(text: str, path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The package's tokenizer from its JSON. Raises FormatError."""
    package = import_tokenizers(path)
    try:
        backend: tokenizers.Tokenizer = package.Tokenizer.from_str(text)
    except Exception as error:  # the package has no class of its own
        raise FormatError(f"{os.fspath(path)}: not a tokenizer: {error}", path=path) from error
    return backend


def _token_text(value: object, key: str, path: Path) -> str | None:
    """A token is its text, or an object with the text as `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{path}: {key} is {str(value)[:80]!r}, want a text", path=path, field=key)
    return value


def _adds_bos(backend: tokenizers.Tokenizer, bos_token_id: int | None) -> bool:
    added: list[int] = backend.encode("", add_special_tokens=True).ids
    if added not in ([], [bos_token_id]):
        raise ConfigError(f"the post-processor adds the ids {added}, supported: the begin token or nothing", field="post_processor")
    return bool(added)


def _without_special(text: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer
    backend = Tokenizer.from_str(text)
    backend.encode_special_tokens = True
    return backend
