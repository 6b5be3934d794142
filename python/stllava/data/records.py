"""JSON data files -> records, with every problem found before the first update.

Nothing is repaired silently and no sample ever replaces another: a bad record stops the run with a list of all of them, or, when asked, is left
out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stllava.limits import MAX_DATA_BYTES
from stllava.paths import read_regular

from .formats.load import load, neutral_records
from .formats.rows import iterate_lines
from .problems import SHOWN, DataError, Problem, listed

__all__ = ["SHOWN", "DataError", "Problem", "check_records", "read_jsonl", "read_records"]


def read_records(data: str | Path | Iterable[dict[str, Any]], split: str | None = None) -> list[dict[str, Any]]:
    """Records in their neutral form: instruction ``{"id"?, "image"?, "conversations"}``, pair ``{"image"?, "chosen_conversations",
    "reject_conversations"}``, VQA item ``{"id", "image", "answer_type", "conversations"}``; question and answer files as they stand.

    Args:
        data: JSON, JSON lines, Parquet, PathVQA's pickles, a directory in a published layout (see `stllava.data.formats`), or records in memory.
        split: of a set that holds several splits, this one; None: all.

    Raises:
        FormatError: naming file, row and what was found. A record that only does not fit its layout comes back as it stands: whoever uses it says
        what is missing, see `formats.load` for the list.
    """
    if not isinstance(data, (str, Path)):
        return list(neutral_records(data))
    return load(data, split).records


def read_jsonl(path: str | Path, *, cut_off: bool = False) -> list[Any]:
    """One JSON value per line; empty lines are skipped. cut_off: leave out a last line that a crash cut off. Raises FormatError naming the line.

    Only an object without its newline counts as cut off: `checkpoint.atomic.appending` deletes such a line, and may not delete what was never ours.
    """
    return [value for _, value in iterate_lines(read_regular(path, MAX_DATA_BYTES), path, cut_off=cut_off)]


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
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
        raise DataError(f"{source}: {len(problems)} of {len(records)} records cannot be used ({counts}); mend them, or leave them out with "
                        "on_bad_sample='skip':\n" + listed(problems), problems)
    bad = {p.row for p in problems}
    rows = [row for row in range(len(records)) if row not in bad]
    if not rows:
        raise DataError(f"{source}: no usable record left of {len(records)}", problems)
    return rows, problems
