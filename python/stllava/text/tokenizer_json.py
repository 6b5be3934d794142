"""What a tokenizer.json may hold before the package `tokenizers` sees it.

The package ends the thread on some files (a prefix longer than a token, a damaged table of characters, a template with unknown names) and runs
whatever regular expression it is given. So the parts that tokenizers of the LLaMA family are made of are listed here, with the values each field
may have, and everything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from stllava.checkpoint import strict_json
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_ADDED_TOKENS, MAX_PIECE_BYTES, MAX_TOKENIZER_JSON_BYTES, MAX_TOKENIZER_JSON_ITEMS, MAX_VOCABULARY
from stllava.paths import read_regular

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_EXPRESSIONS = (LLAMA3, QWEN2, TEKKEN, GPT2, r"\p{N}")
_MAX_PART_CHARS = 16  # of a prefix, or of what a normalizer puts in place of something
_MAX_STRIPPED = 16

_Allowed: TypeAlias = Callable[[Any], bool]
_Parts: TypeAlias = Mapping[str, Mapping[str, _Allowed]]


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_short(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_PART_CHARS


def _is_character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_STRIPPED


def _is_zero(value: Any) -> bool:
    return type(value) is int and value == 0


def _is_text(value: Any) -> bool:
    """{"String": short text}, which is found as it is."""
    return isinstance(value, dict) and value.keys() == {"String"} and _is_short(value["String"])


def _is_pattern(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and value.keys() == {"Regex"} and value["Regex"] in _EXPRESSIONS)


def _one_of(*values: Any) -> _Allowed:
    return lambda value: any(value is item or (isinstance(value, str) and value == item) for item in values)


def _any(value: Any) -> bool:
    return True


_BYTE_LEVEL = {"add_prefix_space": _is_bool, "trim_offsets": _is_bool, "use_regex": _is_bool}
_METASPACE = {"replacement": _is_character, "prepend_scheme": _one_of("first", "always", "never"), "split": _is_bool, "add_prefix_space": _is_bool,
              "str_rep": _is_character}
_NORMALIZERS: _Parts = {"Prepend": {"prepend": _is_short}, "Replace": {"pattern": _is_text, "content": _is_short}, "NFC": {}, "NFD": {}, "NFKC": {},
                        "NFKD": {}}
_PRE_TOKENIZERS: _Parts = {
    "ByteLevel": _BYTE_LEVEL, "Digits": {"individual_digits": _is_bool}, "Metaspace": _METASPACE,
    "Split": {"pattern": _is_pattern, "behavior": _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"),
              "invert": _is_bool}}
_DECODERS: _Parts = {"ByteLevel": _BYTE_LEVEL, "Replace": {"pattern": _is_text, "content": _is_short}, "ByteFallback": {}, "Fuse": {},
                     "Strip": {"content": _is_character, "start": _is_count, "stop": _is_zero}, "Metaspace": _METASPACE}
_POST_PROCESSORS: _Parts = {"ByteLevel": _BYTE_LEVEL, "TemplateProcessing": {"single": _any, "pair": _any, "special_tokens": _any}}
_STEPS = {"normalizer": ("normalizers", _NORMALIZERS), "pre_tokenizer": ("pretokenizers", _PRE_TOKENIZERS), "decoder": ("decoders", _DECODERS),
          "post_processor": ("processors", _POST_PROCESSORS)}
_MODEL: Mapping[str, _Allowed] = {
    "type": _one_of("BPE"), "dropout": _one_of(None), "unk_token": lambda value: value is None or isinstance(value, str),
    "continuing_subword_prefix": _one_of(None, ""), "end_of_word_suffix": _one_of(None, ""), "fuse_unk": _is_bool, "byte_fallback": _is_bool,
    "ignore_merges": _is_bool, "vocab": lambda value: isinstance(value, dict), "merges": lambda value: isinstance(value, list)}


def read(path: Path) -> str:
    """The text of a tokenizer.json that the package may be given. Raises ConfigError or FormatError naming the file and the part."""
    data = read_regular(path, MAX_TOKENIZER_JSON_BYTES)
    if strict_json.n_items(data) > MAX_TOKENIZER_JSON_ITEMS:
        raise FormatError(f"{path}: more than {MAX_TOKENIZER_JSON_ITEMS} items", path=path)
    values = strict_json.parse_object(data, path)
    for name, (key, parts) in _STEPS.items():
        _check_step(values.get(name), name, key, parts, path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise FormatError(f"{path}: model is {str(model)[:80]!r}, want an object", path=path, field="model")
    _check_fields(model, "model", _MODEL, path)
    _check_tokens(model.get("vocab", {}), values.get("added_tokens") or [], path)
    check_merges(model.get("merges", []), model.get("vocab", {}), path, "model.merges")
    return data.decode("utf-8")


def check_merges(merges: list[Any], vocabulary: Mapping[str, int], path: Path, field: str) -> None:
    """Each merge is two tokens, as a list or with a blank between, which together are a token. Raises FormatError."""
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not is_pair or not all(part in vocabulary for part in (*pair, pair[0] + pair[1])):
            raise FormatError(f"{path}: {field}: merge {i} is {str(merge)[:80]!r}, want two tokens that together are a token", path=path, field=field)


def steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a part that was read, sequences unfolded. key: where a sequence has them, as "pretokenizers"."""
    if part is None:
        return []
    return [step for inner in part[key] for step in steps(inner, key)] if part["type"] == "Sequence" else [part]


def _check_step(step: Any, name: str, key: str, parts: _Parts, path: Path) -> None:
    if step is None:
        return
    kind = step.get("type") if isinstance(step, dict) else step
    if kind == "Sequence" and isinstance(step.get(key), list):
        for i, inner in enumerate(step[key]):
            _check_step(inner, f"{name}.{key}[{i}]", key, parts, path)
        return
    if not isinstance(kind, str) or kind not in parts:
        raise ConfigError(f"{path}: {name}.type is {str(kind)[:80]!r}, supported: {', '.join(parts)}, Sequence", path=path, field=f"{name}.type")
    _check_fields({field: value for field, value in step.items() if field != "type"}, name, parts[kind], path)
    if kind == "TemplateProcessing":
        _check_template(step, name, path)


def _check_fields(values: dict[str, Any], name: str, allowed: Mapping[str, _Allowed], path: Path) -> None:
    for field, value in values.items():
        if field not in allowed or not allowed[field](value):
            raise ConfigError(f"{path}: {name}.{field} is {str(value)[:200]!r}, which is not implemented", path=path, field=f"{name}.{field}")


def _check_template(step: dict[str, Any], name: str, path: Path) -> None:
    """Every special token of the template is in its own table."""
    known = step.get("special_tokens")
    for side in ("single", "pair"):
        for piece in step[side] if isinstance(step.get(side), list) else ():
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            text = token.get("id") if isinstance(token, dict) else token
            if text is not None and not (isinstance(text, str) and isinstance(known, dict) and text in known):
                raise FormatError(f"{path}: {name}.{side} names {str(text)[:80]!r}, which is not in its special_tokens", path=path,
                                  field=f"{name}.{side}")


def _check_tokens(vocabulary: dict[str, Any], added: Any, path: Path) -> None:
    """Texts and ids are possible, and no id has two texts."""
    if not isinstance(added, list) or len(added) > MAX_ADDED_TOKENS or not all(isinstance(token, dict) for token in added):
        raise FormatError(f"{path}: added_tokens: want a list of at most {MAX_ADDED_TOKENS} objects", path=path, field="added_tokens")
    by_id: dict[int, str] = {}
    for text, i in (*vocabulary.items(), *((token.get("content"), token.get("id")) for token in added)):
        if not isinstance(text, str) or not text or len(text.encode("utf-8", "surrogatepass")) > MAX_PIECE_BYTES or type(i) is not int \
                or not 0 <= i < MAX_VOCABULARY:
            raise FormatError(f"{path}: token {str(text)[:80]!r}: {str(i)[:80]}, want a text of 1 to {MAX_PIECE_BYTES} bytes and an id from 0 to "
                              f"{MAX_VOCABULARY - 1}", path=path, field=str(text)[:80])
        if by_id.setdefault(i, text) != text:
            raise FormatError(f"{path}: tokens {by_id[i][:80]!r} and {text[:80]!r} share the id {i}", path=path, field=text[:80])
