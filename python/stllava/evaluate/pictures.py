"""The pictures of a test set: files of a folder, or bytes inside its records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stllava.errors import FormatError
from stllava.paths import inside

__all__ = ["name_pictures", "require_pictures"]


def name_pictures(items: Sequence[Mapping[str, Any]], folder: str | Path | None) -> tuple[list[dict[str, Any]], Callable[[str], Any]]:
    """The items with a name for every picture, and name -> what `load_image` takes.

    A record that holds its picture (``{"bytes", "path"}``, as Hugging Face stores it) gets a digest of it for a name, so that the questions of one
    picture are one group, whatever rows they stand in.
    """
    held: dict[str, bytes] = {}

    def named(item: Mapping[str, Any]) -> dict[str, Any]:
        image = item.get("image")
        if isinstance(image, Mapping) and isinstance(image.get("bytes"), (bytes, bytearray)):
            data = bytes(image["bytes"])
            name = f"embedded:{hashlib.sha256(data).hexdigest()[:16]}"
            held[name] = data
            return {**item, "image": name}
        return dict(item)

    def image_of(name: str) -> Any:
        return held[name] if name in held else str(inside(folder or ".", name))

    return [named(item) for item in items], image_of


def require_pictures(items: Sequence[Mapping[str, Any]], image_of: Callable[[str], Any], folder: str | Path | None) -> None:
    """All are there: hours of answers should not end at a missing file. Raises FormatError listing those that are not."""
    sources = {name: image_of(name) for name in dict.fromkeys(item.get("image") for item in items) if isinstance(name, str)}
    files = {name: source for name, source in sources.items() if isinstance(source, str)}
    if files and folder is None:
        raise FormatError(f"{len(files)} pictures are files, the first {next(iter(files))!r}; give --image_folder")
    missing = [source for source in files.values() if not Path(source).is_file()]
    if missing:
        raise FormatError(f"{len(missing)} of {len(files)} pictures are missing: {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; "
                          "is --image_folder right?")
