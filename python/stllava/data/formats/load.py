"""A file or a directory -> neutral records, and what it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stllava.data.problems import DataError, Problem, listed
from stllava.errors import FormatError

from .directory import DataFile, canonical_split, data_files, place_images, split_of_name
from .layouts import Layout, known_layouts, layout_of, neutral
from .rows import read_rows

__all__ = ["Description", "Loaded", "describe", "load", "neutral_records", "why_not"]

_OWN_IDS = frozenset({"vqa-rad", "slake", "pathvqa", "pathvqa-qa", "vqa"})  # ids are given here, so they can be told apart here


@dataclass(slots=True)
class Loaded:
    """Records of a file or directory in their neutral form.

    layout: of most rows; None where no layout fits. records: one per row; a row that could not be brought into its neutral form stands as it was
    and is in `problems`. files: those that were read. fields: field of the files -> rows that have it. notes: what was done or noticed.
    """

    path: str
    layout: Layout | None
    container: str
    records: list[dict[str, Any]]
    files: list[str] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def splits(self) -> dict[str, int]:
        """Split -> number of records, where records say so."""
        return dict(Counter(str(record["split"]) for record in self.records if "split" in record))

    def checked(self) -> Loaded:
        """Itself. Raises FormatError where no layout fits, DataError listing the rows that are not of the layout."""
        if not self.records:
            raise FormatError(f"{self.path}: no records", path=self.path)
        if self.layout is None:
            raise FormatError(f"{self.path}: rows of no known layout, with the fields {', '.join(sorted(self.fields)) or '(none)'}; known are: "
                              f"{known_layouts()}", path=self.path)
        if self.problems:
            raise DataError(f"{self.path}: {len(self.problems)} of {len(self.records)} rows are not of the layout {self.layout.name}:\n"
                            + listed(self.problems), self.problems)
        return self


Keep = Callable[[dict[str, Any]], dict[str, Any]]


def _whole(record: dict[str, Any]) -> dict[str, Any]:
    return record


def load(path: str | Path, split: str | None = None, keep: Keep = _whole) -> Loaded:
    """Reads a data file, or a directory in a published layout.

    Args:
        split: of a set that holds several splits, this one; None: all. A file that is of one split is read whatever it is.
        keep: called with every neutral record as it comes, gives what is kept of it: so that images inside a Parquet file need not all be in memory.

    Raises:
        FormatError: unreadable, or without that split. OSError. ConfigError: Parquet without pyarrow.
    """
    path = Path(path)
    wanted = None if split is None else canonical_split(split)
    if not path.is_dir():
        return _of_split(_load_file(DataFile(path, split_of_name(path.name)), keep), wanted)
    files = data_files(path)
    own = {file.split for file in files}
    if wanted is not None and len(files) > 1 and None not in own:
        files = [file for file in files if file.split == wanted]
        if not files:
            raise FormatError(f"{path}: no file of the split {split!r}, found {', '.join(sorted(map(str, own)))}", path=path)
    parts = [_load_file(file, keep) for file in files]
    names = list(dict.fromkeys(part.layout.name if part.layout else "unknown" for part in parts))
    if len(names) > 1:
        found = ", ".join(f"{part.path} ({part.layout.name if part.layout else 'unknown'})" for part in parts)
        raise FormatError(f"{path}: files of different layouts: {found}", path=path)
    records = [record for part in parts for record in part.records]
    whole = Loaded(str(path), parts[0].layout, parts[0].container, place_images(path, records), [part.path for part in parts],
                   dict(sum((Counter(part.fields) for part in parts), Counter())), [problem for part in parts for problem in part.problems],
                   [note for part in parts for note in part.notes])
    _rename_duplicates(whole)
    return _of_split(whole, wanted)


def neutral_records(records: Iterable[Any]) -> Iterator[Any]:
    """Records in memory in their neutral form; what cannot be brought into it stays as it is, for the data set's own checks to name."""
    for row, record in enumerate(records):
        yield _neutral_or_raw(record, row, None, "")[0] if isinstance(record, Mapping) else record


def why_not(record: Mapping[str, Any], kind: str) -> str | None:
    """Why a record is not of this kind once it is neutral: what its layout misses, or that it is another thing. None: it may be, or nobody knows."""
    layout = layout_of(record.keys())
    if layout is None:
        return None
    if layout.kind not in ({kind, "vqa"} if kind == "instruction" else {kind}):
        return f"the record is of the layout {layout.name} ({layout.fields}), which is no {kind} record"
    _, problem = _neutral_or_raw(record, 0, None, "")
    return None if problem is None else f"layout {layout.name}: {problem}"


def _load_file(file: DataFile, keep: Keep) -> Loaded:
    found = read_rows(file.path)
    fields: Counter[str] = Counter()
    layouts: Counter[Layout | None] = Counter()
    kinds: list[tuple[Layout | None, frozenset[str]]] = []
    shapes: dict[frozenset[str], frozenset[str]] = {}  # one object for equal ones
    whole = Loaded(str(file.path), None, found.container, [], [str(file.path)])
    for row, raw in enumerate(found.rows):
        layout = layout_of(raw.keys(), found.container)
        record, problem = _neutral_or_raw(raw, row, file.split, found.container)
        if problem is not None:
            whole.problems.append(Problem(row, str(raw.get("id", row)), "layout", str(problem)))
        whole.records.append(keep(record))
        fields.update(raw.keys())
        layouts[layout] += 1
        kinds.append((layout, shapes.setdefault(shape := frozenset(raw), shape)))
    whole.fields = dict(fields)
    whole.layout = next((layout for layout, _ in layouts.most_common() if layout is not None), None)
    if whole.layout is not None and len({layout.kind if layout else None for layout in layouts}) > 1:
        whole.problems += [Problem(row, str(whole.records[row].get("id", row)), "layout",
                                   f"fields {', '.join(sorted(keys)) or '(none)'}, want {whole.layout.fields}")
                           for row, (layout, keys) in enumerate(kinds) if layout is None or layout.kind != whole.layout.kind]
        whole.problems = sorted({problem.row: problem for problem in reversed(whole.problems)}.values(), key=lambda problem: problem.row)
    _rename_duplicates(whole)
    return whole


def _neutral_or_raw(record: Mapping[str, Any], row: int, split: str | None, container: str) -> tuple[dict[str, Any], FormatError | None]:
    try:
        return neutral(record, row, split, container), None
    except FormatError as error:
        return dict(record), error


def _rename_duplicates(whole: Loaded) -> None:
    """Published sets are read even where an id stands twice; answers are told apart by the ids, so the later one gets another."""
    if whole.layout is None or whole.layout.name not in _OWN_IDS:
        return
    taken = {str(record.get("id")) for record in whole.records}
    seen: set[str] = set()
    last: dict[str, int] = {}
    renamed = []
    for row, record in enumerate(whole.records):
        name = str(record.get("id"))
        if "conversations" in record and name in seen:
            whole.records[row] = {**record, "id": next_name(name, taken, last)}
            renamed.append(name)
        seen.add(name)
    if renamed:
        whole.notes.append(f"{len(renamed)} ids occur more than once, the first {renamed[0]!r}; later ones are called {renamed[0]}-2 and so on")


def next_name(name: str, taken: set[str], last: dict[str, int]) -> str:
    """NAME-2, NAME-3, ...: the next that is not `taken`, which it then is. `last`: the numbers given so far."""
    number = last.get(name, 1) + 1
    while f"{name}-{number}" in taken:
        number += 1
    last[name] = number
    taken.add(f"{name}-{number}")
    return f"{name}-{number}"


def _of_split(whole: Loaded, wanted: str | None) -> Loaded:
    """Only the records of a split, where they are of several."""
    if wanted is None or whole.layout is None or whole.layout.kind != "vqa" or len(whole.splits) < 2:
        return whole
    if wanted not in whole.splits:
        raise FormatError(f"{whole.path}: no record of the split {wanted!r}, found {', '.join(sorted(whole.splits))}", path=whole.path)
    whole.records = [record for record in whole.records if record.get("split") == wanted]
    return whole


def without_bytes(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose images inside are gone but for their names."""
    def name(image: Any) -> Any:
        return image.get("path") or "(inside)" if isinstance(image, dict) else image

    return {key: ([name(one) for one in value] if isinstance(value, list) else name(value)) if key in ("image", "images") else value
            for key, value in record.items()}


@dataclass(frozen=True, slots=True)
class Description:
    """What a data file or directory is; `str()` of it is for people, `asdict` for programs."""

    path: str
    layout: str
    kind: str
    container: str
    rows: int
    files: list[str]
    fields: dict[str, int]
    splits: dict[str, int]
    problems: int
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.layout} ({self.kind}), {self.container}, {self.rows} rows"]
        lines.append("  fields: " + ", ".join(f"{name}{'' if n == self.rows else f' ({n})'}" for name, n in self.fields.items()))
        if self.files != [self.path]:
            lines.append("  files: " + ", ".join(str(Path(file).relative_to(self.path)) for file in self.files))
        if self.splits:
            lines.append("  splits: " + ", ".join(f"{name} {n}" for name, n in self.splits.items()))
        if self.problems:
            lines.append(f"  {self.problems} rows are not of this layout; `stllava data convert` lists them")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: str | Path) -> Description:
    """What was found in a file or directory. Raises as `load`, and FormatError naming the fields and the known layouts where none fits."""
    found = load(path, keep=without_bytes)
    if found.layout is None and found.records:
        found.checked()
    name, kind = (found.layout.name, found.layout.kind) if found.layout else ("empty", "nothing")
    return Description(str(path), name, kind, found.container, len(found.records), found.files, found.fields, found.splits,
                       len(found.problems), found.notes)
