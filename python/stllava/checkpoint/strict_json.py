"""JSON as checkpoints use it: UTF-8, bounded, no duplicate keys, no NaN.

A duplicate key lets one file mean two things to two readers, so it is an error and not "last one wins".
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from stllava.errors import FormatError

MAX_JSON_BYTES = 100 * 2**20


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_object(data: bytes, path: str | os.PathLike[str], what: str = "JSON file") -> dict[str, Any]:
    """Parse `data` (UTF-8 bytes that must hold one JSON object). `path` and `what` only appear in errors.

    Raises FormatError for anything else, including duplicate keys, NaN/Infinity and nesting beyond Python's own limit.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {what} is not valid: {error}", path=path) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what} holds a {type(value).__name__}, want an object {{...}}", path=path)
    return value


def read_object(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Raises FormatError (content) or OSError (file)."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file", path=path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FormatError(f"{path}: larger than the limit of {max_bytes} bytes for a JSON file", path=path)
    return parse_object(data, path)


def dump_object(value: dict[str, Any]) -> bytes:
    """Encode as Hugging Face does: indent 2, sorted keys, ASCII, newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def dump_compact(value: dict[str, Any]) -> bytes:
    """Encode without white space, keys in the order given, non-ASCII as UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
