"""A directory in a published layout: its data files by split, and where its images lie.

Known: VQA-RAD as on OSF and as MEVF's data_RAD, SLAKE, PathVQA's pickles, LLaVA-Med's train and test files, Parquet shards as `datasets` has them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stllava.errors import FormatError
from stllava.paths import inside

from .messages import images_of

__all__ = ["DataFile", "data_files", "place_images", "split_of_name"]

_SPLITS = {"train": "train", "trainset": "train", "training": "train", "val": "validation", "valid": "validation", "validate": "validation",
           "validation": "validation", "dev": "validation", "test": "test", "testset": "test"}
_IMAGE_FOLDERS = ("", "imgs", "images", "image", "VQA_RAD Image Folder", "pvqa/images", "data/images")
_MAX_ZIP_NAMES = 1_000_000


@dataclass(frozen=True, slots=True)
class DataFile:
    path: Path
    split: str | None


def split_of_name(name: str) -> str | None:
    """'validate.json', 'val_vqa.pkl', 'test-00000-of-00001.parquet' -> 'validation', 'validation', 'test'; else None."""
    word = re.match(r"[a-z]+", name.lower())
    return _SPLITS.get(word[0]) if word and re.match(r"[-_.]|$", name[word.end():]) else None


def canonical_split(name: str) -> str:
    """One spelling of a split's name: validate and val are validation."""
    return _SPLITS.get(name.lower(), name)


def data_files(folder: Path) -> list[DataFile]:
    """The data files of a directory in a published layout. Raises FormatError naming what was looked for."""
    for found in _groups(folder):
        if found:
            return [DataFile(path, split_of_name(path.name)) for path in sorted(found)]
    names = sorted(path.name for path in folder.iterdir())
    raise FormatError(f"{folder}: no data file of a known layout (train.json, validate.json, test.json, trainset.json, testset.json, VQA_RAD Dataset "
                      f"Public.json, qas/*.pkl, *.parquet) and not exactly one .json or .jsonl file; found {', '.join(names[:20]) or 'nothing'}",
                      path=folder)


def _groups(folder: Path) -> Iterator[list[Path]]:
    """What may hold the rows, the more telling first."""
    for root in (folder, folder / "pvqa"):
        for pattern in ("qas/*_vqa.pkl", "*_vqa.pkl", "qas/*/*_qa.pkl", "*/*_qa.pkl"):
            yield [path for path in root.glob(pattern) if split_of_name(path.name)]
    for root in (folder, folder / "data"):
        shards = list(root.glob("*.parquet"))
        yield [path for path in shards if split_of_name(path.name)] or shards
    for root in (folder, folder / "data"):
        texts = [path for path in root.glob("*.json*") if path.suffix in (".json", ".jsonl")]
        yield [path for path in texts if path.name == "VQA_RAD Dataset Public.json"] or [path for path in texts if split_of_name(path.name)] \
            or (texts if len(texts) == 1 else [])


def place_images(folder: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with image names relative to `folder`: below imgs/, images/, ..., or inside a zip file, wherever the first of them is."""
    names = [image for record in records[:50] for image in images_of(record) if isinstance(image, str)]
    prefix = _prefix(folder, names[:3])
    if not prefix:
        return list(records)

    def placed(image: Any) -> Any:
        return [placed(one) for one in image] if isinstance(image, list) else f"{prefix}/{image}" if isinstance(image, str) else image

    return [{key: placed(value) if key in ("image", "images") else value for key, value in record.items()} for record in records]


def _prefix(folder: Path, names: Sequence[str]) -> str:
    for name in names:
        for prefix in _IMAGE_FOLDERS:
            if _is_file(folder / prefix, name):
                return prefix
        for archive in sorted(folder.glob("*.zip")):
            for inner in _zip_names(archive):
                if inner == name or inner.endswith(f"/{name}"):
                    return f"{archive.name}/{inner[:-len(name)]}".rstrip("/")
    return ""


def _is_file(folder: Path, name: str) -> bool:
    try:
        return inside(folder, name).is_file()
    except (FormatError, OSError):
        return False


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()[:_MAX_ZIP_NAMES]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []
