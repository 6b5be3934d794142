"""`stllava data VERB`: data files into other layouts, parts, samples, and together."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import Verbs

if TYPE_CHECKING:
    from stllava.data.formats import Loaded
    from stllava.data.image_store import ImageStore

__all__ = ["VERBS"]

TARGETS = ("llava", "llava-med", "question", "dpo", "trl", "parquet")
SUFFIXES = ("json", "jsonl", "parquet")
EPILOG = ("Read are JSON, JSON lines and Parquet in the layouts of LLaVA, LLaVA-Med, the original's DPO data, TRL and Hugging Face, VQA-RAD, SLAKE "
          "and PathVQA (files or directories); `stllava data describe` says what one is. Written is what the name ends in: .json, .jsonl, .parquet.")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Data files: describe, convert, split, sample, merge."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    for name, (add, run) in SUB_VERBS.items():
        sub = verbs.add_parser(name, help=(add.__doc__ or "").split("\n")[0], description=add.__doc__, epilog=EPILOG)
        sub.set_defaults(leaf=sub, run=run)
        add(sub)


def run_data(args: argparse.Namespace) -> None:
    args.run(args)


def _describe_flags(parser: argparse.ArgumentParser) -> None:
    """Say which layout a file or directory is in, its rows, fields and splits."""
    parser.add_argument("path", metavar="FILE|DIR", nargs="+")
    parser.add_argument("--json", action="store_true", help="one JSON object for each")


def _describe(args: argparse.Namespace) -> None:
    from stllava.data.formats import describe
    for path in args.path:
        found = describe(path)
        print(json.dumps(found.as_dict(), ensure_ascii=False) if args.json else found)


def _output_flags(parser: argparse.ArgumentParser, *, to_required: bool = False) -> None:
    parser.add_argument("--to", choices=TARGETS, required=to_required,
                        help="layout to write" + ("" if to_required else "; default: as it is read, LLaVA's or the original's DPO"))
    parser.add_argument("--split", help="of a set that holds several splits, this one")
    parser.add_argument("--image_folder", help="where images that are inside Parquet rows are written, for a .json or .jsonl file (default: images/ "
                        "beside it); with --embed_images, where they are read")
    parser.add_argument("--embed_images", action="store_true", help="put the images' bytes into the rows of a .parquet file")


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    """Write a data set in another layout; other fields stay, texts are not touched."""
    parser.add_argument("path", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    _output_flags(parser, to_required=True)


def _convert(args: argparse.Namespace) -> None:
    out = _Output(args, Path(args.out))
    loaded = out.read(args.path)
    _report(loaded, out.write(Path(args.out), loaded, loaded.records), out)


def _split_flags(parser: argparse.ArgumentParser) -> None:
    """Split a data set so that no image, or no patient, is in two parts; the same seed gives a record the same part when others are added."""
    parser.add_argument("path", metavar="IN")
    parser.add_argument("--out_dir", required=True, help="gets one file for each part")
    parser.add_argument("--fractions", nargs="+", metavar="PART=SHARE", help="as train=0.8 validation=0.1 test=0.1; shares add up to 1")
    parser.add_argument("--n", nargs="+", metavar="PART=N", help="as test=500: so many records; the others go to --rest")
    parser.add_argument("--rest", default="train", help="with --n, the part of all others (default train)")
    parser.add_argument("--by", choices=("sample", "image", "patient"), default="image", help="what is never in two parts (default image)")
    parser.add_argument("--patient_field", help="for --by patient: the field that has the patient")
    parser.add_argument("--patient_regex", help="for --by patient: finds the patient in the image's name; its first group, or all it matches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=SUFFIXES, default=None, help="of the files; default: as IN")
    _output_flags(parser)


def _split(args: argparse.Namespace) -> None:
    from stllava.data.select import patient_by_field, patient_by_name, split_records
    if args.by == "patient" and (args.patient_field is None) == (args.patient_regex is None):
        raise ValueError("--by patient needs --patient_field or --patient_regex")
    if args.by != "patient" and (args.patient_field or args.patient_regex):
        raise ValueError(f"--patient_field and --patient_regex go with --by patient, not --by {args.by}")
    patient_of = patient_by_field(args.patient_field) if args.patient_field else patient_by_name(args.patient_regex) if args.patient_regex else None
    fractions = None if args.fractions is None else _parts(args.fractions, "--fractions", float)
    counts = None if args.n is None else _parts(args.n, "--n", int)
    _name_of_part(args.rest, "--rest")
    folder = Path(args.out_dir)
    out = _Output(args, folder / f"part.{args.format or _suffix_of(args.path)}")
    loaded = out.read(args.path)
    parts = split_records(loaded.records, fractions, counts=counts, rest=args.rest, by=args.by, patient_of=patient_of, seed=args.seed)
    written = {name: out.write(folder / f"{name}{out.suffix}", loaded, records) for name, records in parts.items()}
    _report(loaded, written, out)


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    """Draw some records, each with the same chance, or in proportion within the values of a field."""
    parser.add_argument("path", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("-n", "--n", type=int, default=None)
    parser.add_argument("--fraction", type=float, default=None)
    parser.add_argument("--stratify", default=None, metavar="FIELD", help="each value of the field keeps its share")
    parser.add_argument("--seed", type=int, default=0)
    _output_flags(parser)


def _sample(args: argparse.Namespace) -> None:
    from stllava.data.select import sample_records
    out = _Output(args, Path(args.out))
    loaded = out.read(args.path)
    records = sample_records(loaded.records, args.n, args.fraction, stratify=args.stratify, seed=args.seed)
    _report(loaded, out.write(Path(args.out), loaded, records), out)


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    """Put several data sets of one kind together."""
    parser.add_argument("path", metavar="IN", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--on_duplicate", choices=("error", "rename", "skip"), default="error", help="of an id that an earlier record has")
    parser.add_argument("--image_prefix", nargs="+", metavar="FOLDER", help="one for each IN, put before its images' names ('' for none)")
    _output_flags(parser)


def _merge(args: argparse.Namespace) -> None:
    from stllava.data.select import merge_records
    out = _Output(args, Path(args.out))
    sets = [out.read(path) for path in args.path]
    kinds = {loaded.path: loaded.layout.kind for loaded in sets if loaded.layout is not None}
    if len(set(kinds.values())) > 1 and set(kinds.values()) != {"instruction", "vqa"}:
        raise ValueError(f"records of different kinds: {', '.join(f'{path} has {kind} records' for path, kind in kinds.items())}")
    merged, n_twice = merge_records([(loaded.path, loaded.records) for loaded in sets], on_duplicate=args.on_duplicate, prefixes=args.image_prefix)
    like = next((loaded for loaded in sets if kinds[loaded.path] == "instruction"), sets[0])
    n = out.write(Path(args.out), like, merged)
    print(json.dumps({"read": {loaded.path: len(loaded.records) for loaded in sets}, "written": n, "duplicates": n_twice, **out.said()}))


class _Output:
    """What the flags of `_output_flags` say about the files that are written."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        from stllava.data.formats.write import SUFFIXES as known
        self.to, self.split, self.embed = args.to, args.split, args.embed_images
        self.suffix = out.suffix
        if self.suffix not in known or (self.to == "parquet" and self.suffix != ".parquet"):
            want = ".parquet" if self.to == "parquet" else ", ".join(known)
            raise ValueError(f"{out}: the name ends in {self.suffix or 'nothing'!r}, want {want}")
        if self.embed and (self.suffix != ".parquet" or args.image_folder is None):
            raise ValueError("--embed_images needs a .parquet file to write, and --image_folder, where the images are")
        self.folder = Path(args.image_folder) if args.image_folder is not None else out.parent / "images"
        self.sources: list[str] = []
        self.n_images = 0
        self._store: ImageStore | None = None

    def read(self, path: str) -> Loaded:
        from stllava.data.formats import load
        from stllava.data.formats.write import extract_images
        self.sources.append(path)
        loaded = load(path, self.split, extract_images(self.folder, self._count)) if self.suffix != ".parquet" else load(path, self.split)
        for note in loaded.checked().notes:
            print(f"{path}: note: {note}", file=sys.stderr)
        return loaded

    def write(self, path: Path, like: Loaded, records: list[dict[str, Any]]) -> int:
        """Number of rows written."""
        from stllava.checkpoint.atomic import make_directory
        from stllava.checkpoint.lock import run_lock
        from stllava.data.formats.write import convert_records, embed_images, write_rows
        if path.exists() and any(os.path.samefile(path, source) for source in self.sources):
            raise ValueError(f"{path}: would take the place of what is read; give another name")
        assert like.layout is not None
        rows = records if self.to is None else convert_records(records, like.layout.kind, self.to, like.path)
        if self.embed:
            rows = [embed_images(row, self._bytes_of) for row in rows]
        make_directory(path.parent)
        with run_lock(path):
            write_rows(path, rows)
        return len(rows)

    def said(self) -> dict[str, Any]:
        return {"images_written": self.n_images, "image_folder": str(self.folder)} if self.n_images else {}

    def _count(self) -> None:
        self.n_images += 1

    def _bytes_of(self, name: str) -> bytes:
        from stllava.data.image_store import ImageStore
        self._store = self._store or ImageStore(self.folder)
        return self._store.read(name)


def _report(loaded: Loaded, written: int | dict[str, int], out: _Output) -> None:
    assert loaded.layout is not None
    print(json.dumps({"layout": loaded.layout.name, "read": len(loaded.records), "written": written, **out.said()}))


def _suffix_of(path: str) -> str:
    suffix = Path(path).suffix.lstrip(".")
    return suffix if suffix in SUFFIXES else "json"


def _parts(words: list[str], flag: str, number: Callable[[str], Any]) -> dict[str, Any]:
    """train=0.8 test=0.2 -> {"train": 0.8, "test": 0.2}"""
    parts: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        _name_of_part(name, flag)
        if name in parts:
            raise ValueError(f"{flag}: {name} is given twice")
        try:
            parts[name] = number(value)
        except ValueError:
            raise ValueError(f"{flag}: {word!r}, want PART=NUMBER as in {'test=500' if number is int else 'test=0.1'}") from None
    return parts


def _name_of_part(name: str, flag: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{flag}: {name!r} is no name of a part, want letters, digits, _, - and .")


SUB_VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "describe": (_describe_flags, _describe), "convert": (_convert_flags, _convert), "split": (_split_flags, _split),
    "sample": (_sample_flags, _sample), "merge": (_merge_flags, _merge)}

VERBS: Verbs = {"data": (add_data, run_data)}
