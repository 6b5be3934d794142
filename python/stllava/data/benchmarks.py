"""VQA-RAD, SLAKE and PathVQA as lists of test items, with their numbers held against the published ones (spec 5)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stllava.errors import FormatError

from .formats import images_of
from .formats.directory import canonical_split, split_of_name
from .formats.load import Loaded, load
from .formats.vqa import item_of_conversation, item_of_question
from .problems import DataError, Problem, listed

__all__ = ["BENCHMARKS", "PUBLISHED", "Benchmark", "Counts", "load_benchmark", "read_benchmark"]

BENCHMARKS = ("vqa-rad", "slake", "pathvqa")
_ALIASES = {"vqarad": "vqa-rad", "rad": "vqa-rad", "datarad": "vqa-rad", "slake": "slake", "pathvqa": "pathvqa", "pvqa": "pathvqa"}


class Counts(NamedTuple):
    """Items of a split. None: not published. source: which version of the set."""

    total: int
    open: int | None
    closed: int | None
    images: int | None
    source: str


PUBLISHED: dict[tuple[str, str], tuple[Counts, ...]] = {
    ("vqa-rad", "train"): (Counts(1797, 770, 1027, 313, "OSF"), Counts(3064, 1241, 1823, 314, "data_RAD"),
                           Counts(1793, None, None, None, "Hugging Face")),
    ("vqa-rad", "test"): (Counts(451, 179, 272, 203, "OSF, data_RAD"), Counts(451, None, None, None, "Hugging Face")),
    ("slake", "train"): (Counts(4919, 2976, 1943, 450, "English"),),
    ("slake", "validation"): (Counts(1053, 631, 422, 96, "English"),),
    ("slake", "test"): (Counts(1061, 645, 416, 96, "English"),),
    ("slake-zh", "test"): (Counts(1033, None, None, None, "Chinese"),),
    ("slake-all", "test"): (Counts(2094, None, None, None, "both languages"),),
    ("pathvqa", "train"): (Counts(19755, 9949, 9806, 2599, "LLaVA-Med"), Counts(19654, 9903, 9751, None, "without duplicates")),
    ("pathvqa", "validation"): (Counts(6279, 3144, 3135, 832, "LLaVA-Med"), Counts(6259, None, None, None, "without duplicates")),
    ("pathvqa", "test"): (Counts(6761, 3370, 3391, 858, "LLaVA-Med"), Counts(6719, 3357, 3362, None, "without duplicates")),
}
"""(set, split) -> its published versions (spec 5.1-5.3)."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """name: one of BENCHMARKS, None: another set. items: LLaVA-Med test items. layout: of the files. notes: for people; a difference to the
    published numbers is always among them."""

    name: str | None
    split: str | None
    language: str | None
    layout: str
    items: list[dict[str, Any]]
    notes: tuple[str, ...]


def read_benchmark(path: str | Path, benchmark: str | None = None, split: str = "test", language: str = "en") -> list[dict[str, Any]]:
    """`load_benchmark`'s items; its notes become warnings."""
    found = load_benchmark(path, benchmark, split, language)
    for note in found.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return found.items


def load_benchmark(path: str | Path, benchmark: str | None = None, split: str = "test", language: str = "en") -> Benchmark:
    """Reads a VQA test set.

    Args:
        path: a directory in a published layout, or a file: VQA-RAD's, SLAKE's or PathVQA's own, Parquet of {image, question, answer}, LLaVA-Med
            items, or a question file that has the answers too.
        benchmark: vqa-rad, slake or pathvqa; None: what the files are.
        split: train, validation, test, or all; of a set that holds several splits. language: en, zh or all, of SLAKE.

    Returns:
        items ``{"id", "image", "answer_type": "OPEN" | "CLOSED", "question_type"?, "modality"?, "organ"?, "split"?, "conversations"}``, in file
        order, ids all different. Image names are relative to `path` where that is a directory, else as they stand in the file.

    Raises:
        DataError: listing every row that is no such item. FormatError: no such layout, split, language, or another set than `benchmark`.
    """
    name = None if benchmark is None else _benchmark_name(benchmark)
    if language not in ("en", "zh", "all"):
        raise ValueError(f"language {language!r}, want en, zh or all")
    loaded = load(path, None if split == "all" else split).checked()
    own = _name_of(loaded)
    if name is not None and own is not None and own != name:
        raise FormatError(f"{path}: the files are those of {own}, not of {name}", path=path)
    assert loaded.layout is not None
    items = _items(loaded)
    has_languages = any("q_lang" in item for item in items)
    if has_languages and language != "all":
        items = [item for item in items if item.get("q_lang") == language]
        if not items:
            raise FormatError(f"{path}: no question in the language {language!r} (field q_lang)", path=path)
    if not items:
        raise FormatError(f"{path}: no items", path=path)
    _check_ids(items, path)
    splits = {str(item["split"]) for item in items if "split" in item} or {split_of_name(Path(path).name)} - {None}
    found_split = next(iter(splits)) if len(splits) == 1 else None if splits else canonical_split(split)
    name = name or own or _name_by_count(len(items))
    notes = [*loaded.notes, *_count_notes(name, found_split, language if has_languages else None, loaded.layout.name, items)]
    return Benchmark(name, found_split, language if has_languages else None, loaded.layout.name, items, tuple(notes))


def _benchmark_name(name: str) -> str:
    found = _ALIASES.get(re.sub(r"[-_ ]", "", name.lower()))
    if found is None:
        raise ValueError(f"benchmark {name!r} is unknown, want one of {', '.join(BENCHMARKS)}")
    return found


def _name_of(loaded: Loaded) -> str | None:
    assert loaded.layout is not None
    name = loaded.layout.name.removesuffix("-qa")
    return name if name in BENCHMARKS else None


def _name_by_count(n: int) -> str | None:
    """Items in another layout, as LLaVA-Med's: exactly as many as a published test set has."""
    return next((name for name in BENCHMARKS if n in [version.total for version in PUBLISHED[name, "test"]]), None)


def _items(loaded: Loaded) -> list[dict[str, Any]]:
    assert loaded.layout is not None
    kind = loaded.layout.kind
    if kind not in ("vqa", "instruction", "question"):
        raise FormatError(f"{loaded.path}: rows of the layout {loaded.layout.name} ({loaded.layout.fields}) have no questions with a reference "
                          "answer", path=loaded.path)
    items, problems = [], []
    for row, record in enumerate(loaded.records):
        try:
            items.append(item_of_question(record, row) if kind == "question" else item_of_conversation(record, row))
        except FormatError as error:
            problems.append(Problem(row, str(record.get("id", record.get("question_id", row))), "item", str(error)))
    if problems:
        raise DataError(f"{loaded.path}: {len(problems)} of {len(loaded.records)} rows are no question with an answer:\n"
                        + listed(problems), problems)
    return items


def _check_ids(items: Iterable[dict[str, Any]], path: str | Path) -> None:
    first: dict[str, int] = {}
    again = []
    for row, item in enumerate(items):
        if first.setdefault(str(item["id"]), row) != row:
            again.append((row, item["id"]))
    if again:
        row, name = again[0]
        raise FormatError(f"{path}: {len(again)} ids occur more than once, the first {name!r} in rows {first[str(name)]} and {row}; answers could "
                          "not be told apart. `stllava data merge --on_duplicate rename` gives new ones", path=path, field="id")


def _count_notes(name: str | None, split: str | None, language: str | None, layout: str, items: list[dict[str, Any]]) -> list[str]:
    key = name if language in (None, "en") else f"{name}-{language}"
    versions = PUBLISHED.get((key or "", split or ""), ())
    versions = tuple(version for version in versions if version.open is not None or language == "zh" or language == "all" or layout == "vqa")
    n_open = sum(item["answer_type"] == "OPEN" for item in items)
    images = {image for item in items for image in images_of(item) if isinstance(image, str)}
    found = (len(items), n_open, len(items) - n_open, len(images))
    if not versions or any(_agrees(found, version) for version in versions):
        return []
    return [f"{name} {split}: {_said(found)}; published: " + "; ".join(f"{_said(version[:4])} ({version.source})" for version in versions)]


def _agrees(found: tuple[int, int, int, int], version: Counts) -> bool:
    """Images count where they have names."""
    return all(published is None or n == published for n, published in zip(found[:3], version[:3], strict=True)) and \
        (version.images is None or not found[3] or found[3] == version.images)


def _said(counts: Iterable[int | None]) -> str:
    total, n_open, closed, images = counts
    kinds = "" if n_open is None else f" ({n_open} open, {closed} closed)"
    return f"{total} questions{kinds}" + (f" on {images} images" if images else "")
