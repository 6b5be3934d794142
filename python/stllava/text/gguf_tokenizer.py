"""The tokenizer inside a GGUF file, both ways.

Two kinds. "llama" lists the pieces of a SentencePiece model with scores and types: the model is put together again, and the library that made it
encodes, so nothing can differ. "gpt2" is byte-level BPE: tokens, merges, and the name of the rule that cuts a text into words
(`tokenizer.ggml.pre`); those whose rule is known here are built with the package `tokenizers`. Source: llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from stllava.checkpoint import gguf_container
from stllava.checkpoint.gguf_container import GgufFile, Value
from stllava.checkpoint.gguf_metadata import boolean
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_PIECE_BYTES
from stllava.text.fast_tokenizer import FastTokenizer, build
from stllava.text.interface import AnyTokenizer
from stllava.text.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel
from stllava.text.tokenizer import Tokenizer
from stllava.text.tokenizer_json import LLAMA3, TEKKEN, check_merges

_ROOT = "tokenizer.ggml."
_TYPES = range(NORMAL, BYTE + 1)
_UNKNOWN_SCORE = -1e4  # of tokens that fill up a vocabulary: never a merge


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2_WORDS = _byte_level(use_regex=True)  # has GPT-2's rule built in
_DIGITS_APART = _sequence({"type": "Digits", "individual_digits": True}, _GPT2_WORDS)
_LLAMA3_WORDS = _sequence(_split(LLAMA3), _byte_level(use_regex=False))
_TEKKEN_WORDS = _sequence(_split(TEKKEN), _byte_level(use_regex=False))
# name -> (pre-tokenizer of tokenizer.json, whether a word that is a token is taken whole, whether a text starts with the begin token by default).
# With each of them 104 awkward strings gave the ids of llama.cpp itself. The first name of a rule is the one that is written.
_WORDS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2_WORDS, False, False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGITS_APART, False, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3_WORDS, True, True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), (_LLAMA3_WORDS, False, False)), "tekken": (_TEKKEN_WORDS, True, True)}


# ---- reading -----------------------------------------------------------------------------------------------------------------


def read_tokenizer(path: str | os.PathLike[str]) -> AnyTokenizer | None:
    """`from_gguf` of the file at `path`."""
    return from_gguf(gguf_container.read(path))


def from_gguf(file: GgufFile) -> AnyTokenizer | None:
    """The tokenizer in `file`; None where it has none.

    Raises FormatError for keys that are missing or damaged, ConfigError naming the key for kinds and rules that are not known.
    """
    model = file.metadata.get(_ROOT + "model")
    if model in (None, "none", "no_vocab"):
        return None
    if model not in ("llama", "gpt2"):
        raise ConfigError(f"{file.path}: {_ROOT}model is {model!r}, supported: 'llama', 'gpt2'", path=file.path, field=_ROOT + "model")
    if boolean(file, _ROOT + "add_eos_token", False):
        raise ConfigError(f"{file.path}: {_ROOT}add_eos_token is true, which is not implemented", path=file.path, field=_ROOT + "add_eos_token")
    tokens = _strings(file, "tokens")
    for i, token in enumerate(tokens):
        if not token or len(token.encode()) > MAX_PIECE_BYTES:
            raise FormatError(f"{file.path}: {_ROOT}tokens: token {i} is {token[:80]!r}, want 1 to {MAX_PIECE_BYTES} bytes", path=file.path,
                              field=_ROOT + "tokens")
    types = _numbers(file, "token_type", len(tokens))
    if bad := [kind for kind in types if kind not in _TYPES]:
        raise FormatError(f"{file.path}: {_ROOT}token_type holds {bad[0]}, want {_TYPES[0]} to {_TYPES[-1]}", path=file.path,
                          field=_ROOT + "token_type")
    context = file.metadata.get("llama.context_length")
    length = context if type(context) is int and context > 0 else 2048
    make = _sentencepiece if model == "llama" else _byte_level_bpe
    return make(file, tokens, types, length)


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int], length: int) -> Tokenizer:
    scores = _numbers(file, "scores", len(tokens))
    for key, wanted in (("remove_extra_whitespaces", False), ("add_bos_token", True)):
        if boolean(file, _ROOT + key, wanted) != wanted:
            raise ConfigError(f"{file.path}: {_ROOT}{key} is {not wanted}, which is not implemented for LLaMA's tokenizer", path=file.path,
                              field=_ROOT + key)
    if _ROOT + "precompiled_charsmap" in file.metadata:
        raise ConfigError(f"{file.path}: {_ROOT}precompiled_charsmap rewrites text, which is not implemented for LLaMA's tokenizer", path=file.path,
                          field=_ROOT + "precompiled_charsmap")
    unk, bos, eos = (_token(file, key, tokens, default) for key, default in (("unknown", 0), ("bos", 1), ("eos", 2)))
    types = [UNKNOWN if i == unk else CONTROL if i in (bos, eos) else NORMAL if kind == UNKNOWN else kind for i, kind in enumerate(types)]
    model = SentencePieceModel(tokens, scores, types, tokens[unk], tokens[bos], tokens[eos], boolean(file, _ROOT + "add_space_prefix", True))
    special = {tokens[i]: i for i, kind in enumerate(types) if kind == CONTROL and i not in (bos, eos)}
    try:
        return Tokenizer(model.to_bytes(), model_max_length=length, added_tokens=special)
    except FormatError as error:
        raise FormatError(f"{file.path}: {_ROOT}tokens: {error}", path=file.path, field=_ROOT + "tokens") from error


def _byte_level_bpe(file: GgufFile, tokens: list[str], types: list[int], length: int) -> FastTokenizer:
    pre = file.metadata.get(_ROOT + "pre")
    if not isinstance(pre, str) or pre not in _WORDS:
        raise ConfigError(f"{file.path}: {_ROOT}pre is {str(pre)[:80]!r}, known: {', '.join(_WORDS)}", path=file.path, field=_ROOT + "pre")
    words, whole, adds_bos = _WORDS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise FormatError(f"{file.path}: {_ROOT}tokens: a token is there twice", path=file.path, field=_ROOT + "tokens")
    merges = _strings(file, "merges")
    check_merges(merges, vocabulary, file.path, _ROOT + "merges")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": kind != USER_DEFINED}
             for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (CONTROL, USER_DEFINED)]
    values = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": words,
              "post_processor": None, "decoder": _byte_level(use_regex=True),
              "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                        "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole, "vocab": vocabulary,
                        "merges": [merge.split(" ") for merge in merges]}}
    special = {f"{ours}_token": None if i is None else tokens[i] for ours, i in (
        (ours, _token(file, theirs, tokens, None)) for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")))}
    eos = special.pop("eos_token")
    if eos is None:
        raise FormatError(f"{file.path}: key {_ROOT}eos_token_id is missing", path=file.path, field=_ROOT + "eos_token_id")
    try:
        return FastTokenizer(build(json.dumps(values), file.path), eos_token=eos, model_max_length=length,
                             add_bos=boolean(file, _ROOT + "add_bos_token", adds_bos), **special)
    except ConfigError as error:
        raise error if error.path else ConfigError(f"{file.path}: {error}", path=file.path, field=error.field) from error


def _strings(file: GgufFile, name: str) -> list[str]:
    value = file.metadata.get(_ROOT + name)
    if not isinstance(value, list):
        what = "is missing" if value is None else "is no array of strings"
        raise FormatError(f"{file.path}: {_ROOT}{name} {what}", path=file.path, field=_ROOT + name)
    return value


def _numbers(file: GgufFile, name: str, n: int) -> list[Any]:
    value = file.metadata.get(_ROOT + name)
    if not isinstance(value, np.ndarray) or len(value) != n or not np.isfinite(value).all():
        raise FormatError(f"{file.path}: {_ROOT}{name}: want {n} finite numbers, one for each token", path=file.path, field=_ROOT + name)
    numbers: list[Any] = value.tolist()
    return numbers


def _token(file: GgufFile, name: str, tokens: list[str], default: Any) -> Any:
    """Id of a token with a meaning of its own."""
    key = f"{_ROOT}{name}_token_id"
    value = file.metadata.get(key, default)
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise FormatError(f"{file.path}: {key} is {str(value)[:80]}, want an id below {len(tokens)}", path=file.path, field=key)
    return value


# ---- writing -----------------------------------------------------------------------------------------------------------------


def to_metadata(tokenizer: AnyTokenizer, vocab_size: int) -> dict[str, Value]:
    """The keys `tokenizer.ggml.*` for a model of `vocab_size` rows; rows without a token are filled up with unused ones, as llama.cpp does.

    Raises ConfigError for a tokenizer that llama.cpp does not have.
    """
    if isinstance(tokenizer, Tokenizer):
        kind, tokens, types, own = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, FastTokenizer):
        kind, tokens, types, own = _from_byte_level_bpe(tokenizer)
    else:
        raise ConfigError(f"a {type(tokenizer).__name__} cannot be written to a GGUF file, want a Tokenizer or FastTokenizer", field="tokenizer")
    if tokens and max(tokens) >= vocab_size:
        raise ConfigError(f"the tokenizer has the id {max(tokens)}, but the model only {vocab_size} rows", field="vocab_size")
    table = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    metadata: dict[str, Value] = {
        _ROOT + "model": kind, **own, _ROOT + "tokens": table,
        _ROOT + "token_type": np.array([types.get(i, UNUSED) for i in range(vocab_size)], np.int32),
        _ROOT + "eos_token_id": tokenizer.eos_token_id, _ROOT + "padding_token_id": tokenizer.pad_token_id}
    for name, i in (("bos", tokenizer.bos_token_id), ("unknown", tokenizer.unk_token_id)):
        if i is not None:
            metadata[f"{_ROOT}{name}_token_id"] = i
    if kind == "llama":
        scores = metadata[_ROOT + "scores"]
        assert isinstance(scores, np.ndarray)
        metadata[_ROOT + "scores"] = np.pad(scores, (0, vocab_size - len(scores)), constant_values=_UNKNOWN_SCORE)
    return metadata


_Parts = tuple[str, dict[int, str], dict[int, int], dict[str, Value]]


def _from_sentencepiece(tokenizer: Tokenizer) -> _Parts:
    model = SentencePieceModel.from_bytes(tokenizer.model_bytes)
    tokens, types = dict(enumerate(model.pieces)), dict(enumerate(model.types))
    for text, i in tokenizer.added_tokens.items():
        tokens[i], types[i] = text, CONTROL
    return "llama", tokens, types, {
        _ROOT + "pre": "default", _ROOT + "scores": np.array(model.scores, np.float32), _ROOT + "add_space_prefix": model.add_dummy_prefix,
        _ROOT + "add_bos_token": True, _ROOT + "add_eos_token": False}


def _from_byte_level_bpe(tokenizer: FastTokenizer) -> _Parts:
    values = tokenizer.to_dict()
    model = values["model"]
    pre = next((name for name, (words, whole, _) in _WORDS.items()
                if _same_words(words, values["pre_tokenizer"]) and whole == bool(model["ignore_merges"])), None)
    if pre is None or values["normalizer"] is not None or model["byte_fallback"]:
        raise ConfigError("the tokenizer cuts texts into words by a rule that llama.cpp has no name for here; known: "
                          f"{', '.join(_WORDS)} without normalizer (a model with tokenizer.model is written from that)", field="pre_tokenizer")
    tokens = {i: token for token, i in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in values["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return "gpt2", tokens, types, {_ROOT + "pre": pre, _ROOT + "merges": merges, _ROOT + "add_bos_token": tokenizer.add_bos,
                                   _ROOT + "add_eos_token": False, _ROOT + "add_space_prefix": False}


def _same_words(known: dict[str, Any], found: Any) -> bool:
    """Whether two pre-tokenizers cut alike; `trim_offsets` is about offsets only."""
    if not isinstance(found, dict):
        return False
    if found.get("type") == "Sequence":
        steps = found["pretokenizers"]
        return known["type"] == "Sequence" and len(steps) == len(known["pretokenizers"]) and all(map(_same_words, known["pretokenizers"], steps))
    return known == found | {"trim_offsets": True} if found.get("type") == "ByteLevel" else known == found
