"""JSON data files -> records, with every problem found before the first update.

Nothing is repaired silently and no sample ever replaces another: a bad record stops the run with a list of all of them, or, when asked, is left
out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.errors import FormatError, StllavaError
from stllava.limits import MAX_DATA_BYTES, MAX_ROW_CHARS
from stllava.paths import read_regular

__all__ = ["DataError", "Problem", "check_records", "read_jsonl", "read_records"]

SHOWN = 20  # problems printed in full


class DataError(StllavaError, ValueError):
    """Records that cannot be trained on; `problems` has all of them."""

    def __init__(self, message: str, problems: list[Problem]) -> None:
        super().__init__(message)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Problem:
    """`row` counts from 0. `kind` is a short name for counting, `text` says what was found and what is wanted."""

    row: int
    id: str
    kind: str
    text: str


def read_records(data: str | Path | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A JSON list, JSON lines (.jsonl), or records already in memory. Raises FormatError naming file, row and what was found."""
    if not isinstance(data, (str, Path)):
        return list(data)
    path = Path(data)
    if path.suffix == ".jsonl":
        records = read_jsonl(path)
    else:
        try:
            records = strict_json.parse(read_regular(path, MAX_DATA_BYTES).decode("utf-8"))
        except json.JSONDecodeError as error:
            raise FormatError(f"{path}: line {error.lineno} is not JSON: {error.msg}", path=path) from error
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{path}: not JSON: {error}", path=path) from error
    if not isinstance(records, list):
        raise FormatError(f"{path}: want a list of records, found a {type(records).__name__}", path=path)
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise FormatError(f"{path}: row {row} is a {type(record).__name__}, want an object", path=path)
    if path.stat().st_size > MAX_ROW_CHARS:
        for row, record in enumerate(records):
            if (n := len(json.dumps(record, ensure_ascii=False, separators=(",", ":")))) > MAX_ROW_CHARS:
                raise FormatError(f"{path}: row {row} has {n} characters, limit {MAX_ROW_CHARS}", path=path)
    return records


def read_jsonl(path: str | Path, *, cut_off: bool = False) -> list[Any]:
    """One JSON value per line; empty lines are skipped. cut_off: leave out a last line that a crash cut off. Raises FormatError naming the line.

    Only an object without its newline counts as cut off: `checkpoint.atomic.appending` deletes such a line, and may not delete what was never ours.
    """
    lines = read_regular(path, MAX_DATA_BYTES).split(b"\n")  # not splitlines: U+2028 may stand inside a JSON text
    values = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            values.append(strict_json.parse(line.decode("utf-8")))
        except ValueError as error:  # not JSON, or not UTF-8
            if cut_off and number == len(lines) - 1 and line.startswith(b"{"):
                break
            raise FormatError(f"{path}: line {number + 1} is not JSON: {error}", path=path) from error
    return values


def check_records(records: list[dict[str, Any]], check: Callable[[int, dict[str, Any]], tuple[str, str] | None], on_bad_sample: str,
                  source: object, threads: int = 2) -> tuple[list[int], list[Problem]]:
    """Runs `check(row, record) -> (kind, text) | None` on every record.

    Returns:
        rows to train on, and the problems of the rows left out (only with ``on_bad_sample="skip"``).

    Raises:
        DataError: with ``"error"`` (the default of every data set), if any record has a problem; or if none is left.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}, want 'error' or 'skip'")
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(check, range(len(records)), records))
    problems = [Problem(row, str(record.get("id", row)), *answer)
                for row, (record, answer) in enumerate(zip(records, found, strict=True)) if answer is not None]
    if problems and on_bad_sample == "error":
        lines = [f"  row {p.row} (id {p.id}): {p.text}" for p in problems[:SHOWN]]
        more = "" if len(problems) <= SHOWN else f"\n  ... and {len(problems) - SHOWN} more"
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
        raise DataError(f"{source}: {len(problems)} of {len(records)} records cannot be used ({counts}); mend them, or leave them out with "
                        "on_bad_sample='skip':\n" + "\n".join(lines) + more, problems)
    bad = {p.row for p in problems}
    rows = [row for row in range(len(records)) if row not in bad]
    if not rows:
        raise DataError(f"{source}: no usable record left of {len(records)}", problems)
    return rows, problems
