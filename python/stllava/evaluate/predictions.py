"""Answers of any system, from the files that people have."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.data.records import read_records
from stllava.errors import FormatError
from stllava.limits import MAX_DATA_BYTES
from stllava.paths import read_regular

__all__ = ["ANSWERS_FILE", "predictions_file", "read_predictions", "system_name"]

ANSWERS_FILE = "answers.jsonl"
_IDS = ("question_id", "id", "qid")
_SURE, _EITHER = ("prediction", "response"), ("text", "answer")


def read_predictions(path: str | Path, text_field: str | None = None) -> list[dict[str, Any]]:
    """Rows ``{"question_id", "text", "model_id"?}`` of a file of answers.

    Args:
        path: JSON lines, a JSON list, a JSON object of id -> answer, or CSV/TSV with a heading; or a folder that `stllava eval --out` wrote.
            A row has its id in question_id, id or qid, and its answer in prediction or response, else in text or answer.
        text_field: where the answer stands instead.

    Raises:
        FormatError: naming file, row and what was found; also where two fields could be the answer.
    """
    path = predictions_file(path)
    rows = _rows(path)
    return [_row(path, number, row, text_field) for number, row in enumerate(rows)]


def predictions_file(path: str | Path) -> Path:
    """The file itself, or that of a folder which `stllava eval --out` wrote. Raises FormatError."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / ANSWERS_FILE).is_file():
        raise FormatError(f"{path}: no {ANSWERS_FILE} in it; want a folder that `stllava eval --out` wrote, or a file of answers", path=path)
    return path / ANSWERS_FILE


def system_name(path: str | Path, rows: list[dict[str, Any]]) -> str:
    """What to call a system whose answers these are: the `model_id` that all rows have, else the file's name."""
    names = {row.get("model_id") for row in rows}
    only = names.pop() if len(names) == 1 else None
    return only if isinstance(only, str) and only else Path(path).stem


def _rows(path: Path) -> list[Any]:
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(path)
    if path.suffix.lower() == ".json":
        data = strict_json.parse(_text(path))
        if isinstance(data, dict):
            if not all(isinstance(value, (str, int, float)) for value in data.values()):
                raise FormatError(f"{path}: an object whose values are no answers; want id -> answer, or a list of records", path=path)
            return [{"question_id": name, "text": value} for name, value in data.items()]
    return read_records(path)


def _text(path: Path) -> str:
    try:
        return read_regular(path, MAX_DATA_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8: {error}", path=path) from error


def _table(path: Path) -> list[Any]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise FormatError(f"{path}: line {reader.line_num} cannot be read as a table: {error}", path=path) from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise FormatError(f"{path}: row {number} has not the {len(reader.fieldnames or ())} cells of the heading; are commas quoted?", path=path)
    return rows


def _row(path: Path, number: int, row: Mapping[str, Any], text_field: str | None) -> dict[str, Any]:
    where = f"{path}: row {number}"
    name_field = next((field for field in _IDS if field in row), None)
    if name_field is None:
        raise FormatError(f"{where} has no id; want one of the fields {', '.join(_IDS)}, found {_found(row)}", path=path, field="question_id")
    field = text_field or _text_field(where, row)
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        what = f"no {field}" if field not in row else f"{field} is a {type(value).__name__}"
        raise FormatError(f"{where} (id {row[name_field]!r}): {what}, want the answer as a text; found {_found(row)}", path=path, field=field)
    answer = {"question_id": row[name_field], "text": str(value)}
    return answer | ({"model_id": row["model_id"]} if isinstance(row.get("model_id"), str) else {})


def _text_field(where: str, row: Mapping[str, Any]) -> str:
    for fields in (_SURE, _EITHER):
        there = [field for field in fields if field in row]
        if len(there) == 1:
            return there[0]
        if there:
            raise FormatError(f"{where} has {' and '.join(there)}: one may be the question or the reference; say which is the answer (--text_field)",
                              field=there[0])
    raise FormatError(f"{where} has no answer; want one of the fields {', '.join((*_SURE, *_EITHER))}, found {_found(row)}", field="text")


def _found(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))[:20])
