"""JSON as checkpoints and data files use it: UTF-8, bounded, no duplicate keys, no NaN or infinity.

A duplicate key lets one file mean two things to two readers, so it is an error and not "last one wins".
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from stllava.errors import FormatError
from stllava.limits import MAX_JSON_BYTES, MAX_JSON_DEPTH, MAX_JSON_ITEMS
from stllava.paths import read_regular

_SURROGATE = re.compile("[\ud800-\udfff]")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_object, parse_constant=_refuse_constant, parse_float=_finite)


def is_text(value: str) -> bool:
    """False if `value` holds half of a surrogate pair: JSON can spell it, but it is no character and has no bytes."""
    return _SURROGATE.search(value) is None


def parse(text: str) -> Any:
    """Any JSON value. Raises ValueError: not JSON, duplicate keys, NaN, infinite or absurdly long numbers, nesting beyond MAX_JSON_DEPTH."""
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return value
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
    if level:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def n_items(data: bytes) -> int:
    """At most so many items are in lists and objects: each comes with a comma or behind a bracket."""
    return sum(map(data.count, (b",", b"[", b"{")))


def parse_object(data: bytes, path: str | os.PathLike[str], what: str = "JSON file") -> dict[str, Any]:
    """Parse `data` (UTF-8 bytes that must hold one JSON object). `path` and `what` only appear in errors. Raises FormatError for anything else."""
    try:
        value = parse(data.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: {what} is not valid: {error}", path=path) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what} holds a {type(value).__name__}, want an object {{...}}", path=path)
    return value


def read_object(path: str | os.PathLike[str], max_items: int = MAX_JSON_ITEMS) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises FormatError (content) or OSError (file)."""
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file", path=path)
    data = read_regular(path, MAX_JSON_BYTES)
    if n_items(data) > max_items:
        raise FormatError(f"{path}: more than {max_items} items", path=path)
    return parse_object(data, path)


def dump_object(value: dict[str, Any]) -> bytes:
    """Encode as Hugging Face does: indent 2, sorted keys, ASCII, newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def dump_compact(value: dict[str, Any]) -> bytes:
    """Encode without white space, keys in the order given, non-ASCII as UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
