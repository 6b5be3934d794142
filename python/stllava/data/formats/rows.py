"""Files -> rows as they stand there: JSON lists, JSON lines, the asking step's broken file (spec 6.3), pickles, Parquet. Told by content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.errors import FormatError
from stllava.limits import MAX_DATA_BYTES, MAX_ROW_CHARS
from stllava.paths import read_head, read_regular

__all__ = ["Rows", "read_lines", "read_rows"]

PARQUET_MAGIC = b"PAR1"
_PICKLE_STARTS = (b"\x80", b"(l", b"]q", b"](")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Rows:
    """container: how the rows are stored, in words. rows: to be read once; of Parquet, a few are in memory at a time."""

    container: str
    rows: Iterator[dict[str, Any]]


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, each a dictionary. Raises FormatError naming file, row and what was found, partly while they are read; OSError."""
    head = read_head(path, 64)
    if head.startswith(PARQUET_MAGIC):
        from .parquet import read_parquet
        return Rows("parquet", read_parquet(path))
    if head.startswith(_PICKLE_STARTS):
        from .plain_pickle import read_plain_pickle
        container, rows = "pickle", _flat(read_plain_pickle(path), path)
    else:
        container, rows = _json_rows(path)
    if not isinstance(rows, list):
        raise FormatError(f"{path}: want a list of records, found a {type(rows).__name__}", path=path)
    return Rows(container, _objects(rows, path))


def _objects(rows: list[Any], path: str | Path) -> Iterator[dict[str, Any]]:
    for row, record in enumerate(rows):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: row {row} is a {type(record).__name__}, want an object", path=path)
        yield record


def _flat(rows: Any, path: str | Path) -> Any:
    """`rows`, none of them holding more than PathVQA's do: a pickle may nest one list in itself 2^60 times, and nobody could even print it."""
    if not isinstance(rows, list):
        return rows
    for row, record in enumerate(rows):
        for key, value in record.items() if isinstance(record, dict) else ():
            inner = [*value, *value.values()] if isinstance(value, dict) else [value]
            if not isinstance(key, str) or not all(one is None or isinstance(one, (str, int, float)) for one in inner):
                raise FormatError(f"{path}: row {row}: field {str(key)[:60]!r} is a {type(value).__name__} of more than text and numbers", path=path)
    return rows


def _json_rows(path: str | Path) -> tuple[str, Any]:
    data = read_regular(path, MAX_DATA_BYTES)
    if data.startswith(_UTF_16):
        raise FormatError(f"{path}: UTF-16 text, want UTF-8", path=path)
    data = data.removeprefix(_BOM)
    first = data.lstrip()[:1]
    if first == b"{" or (first != b"[" and Path(path).suffix == ".jsonl"):
        if (joined := _joined_objects(data)) is not None:
            return "JSON objects joined by commas", _checked(joined, path, len(data))
        if Path(path).suffix == ".jsonl" or _is_lines(data):
            return "JSON lines", _checked(read_lines(data, path), path, max(map(len, data.split(b"\n"))))
    try:
        rows = strict_json.parse(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: line {error.lineno} is not JSON: {error.msg}", path=path) from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}", path=path) from error
    return "JSON list", _checked(rows, path, len(data))


def _is_lines(data: bytes) -> bool:
    """The first line is a whole object, and another follows or nothing."""
    line, _, rest = data.lstrip().partition(b"\n")
    try:
        return isinstance(strict_json.parse(line.decode("utf-8")), dict) and rest.lstrip()[:1] in (b"", b"{")
    except ValueError:
        return False


def _joined_objects(data: bytes) -> Any:
    """Objects with commas between them and nothing around them, else None."""
    text = data.strip()
    line = text.partition(b"\n")[0].rstrip()
    if not text.startswith(b"{") or not (text.endswith(b",") or line.endswith(b"},")):
        return None
    try:
        return strict_json.parse(f"[{text.removesuffix(b',').decode('utf-8')}]")
    except ValueError:
        return None


def _checked(rows: Any, path: str | Path, longest: int) -> Any:
    """`rows`, none longer than MAX_ROW_CHARS; `longest`: no row has more bytes in the file."""
    if longest > MAX_ROW_CHARS and isinstance(rows, list):
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        for row, record in enumerate(rows):
            if (n := len(encode(record))) > MAX_ROW_CHARS:
                raise FormatError(f"{path}: row {row} has {n} characters, limit {MAX_ROW_CHARS}", path=path)
    return rows


def read_lines(data: bytes, path: str | Path) -> list[Any]:
    """One JSON value per line; empty lines are skipped. Raises FormatError naming the line."""
    return [value for _, value in iterate_lines(data, path)]


def iterate_lines(data: bytes, path: str | Path, *, cut_off: bool = False) -> Iterator[tuple[int, Any]]:
    """(line number, value); with `cut_off`, a last line that is an object without its end is left out."""
    lines = data.split(b"\n")  # not splitlines: U+2028 may stand inside a JSON text
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = strict_json.parse(line.decode("utf-8"))
        except ValueError as error:  # not JSON, or not UTF-8
            if cut_off and number == len(lines) - 1 and line.startswith(b"{"):
                return
            raise FormatError(f"{path}: line {number + 1} is not JSON: {error}", path=path) from error
        yield number, value
