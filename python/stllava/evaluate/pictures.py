"""The pictures of a test set: in a folder or an archive, inside its records, DICOM and NIfTI too (`data.image_store`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stllava.data.image_store import ImageStore
from stllava.errors import FormatError
from stllava.image_source import FileSource, shown_name

__all__ = ["ItemPictures"]


class ItemPictures:
    """Name -> what `load_image` takes.

    folder: where names start, None: not known. items: the given records, with a name for every picture. One that a record
    holds (``{"bytes", "path"}``, as Hugging Face stores it) is named by its digest, so that the questions of one picture are one group.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._store = ImageStore(folder)
        self._held: dict[str, Mapping[str, Any]] = {}
        self.items = [self._named(item) for item in items]
        self.names = list(dict.fromkeys(name for item in self.items if isinstance(name := item.get("image"), str)))

    def __call__(self, name: str) -> FileSource:
        """Raises ImageError for a name that leads out of the folder."""
        return self._held[name] if name in self._held else self._store.source(name)

    def require(self) -> None:
        """All are there: hours of answers should not end at a missing file. Raises FormatError listing those that are not."""
        files = [name for name in self.names if name not in self._held]
        if files and self.folder is None:
            raise FormatError(f"{len(files)} pictures are files, the first {shown_name(files[0])!r}; give --image_folder")
        for name in files:
            self._store.source(name)  # refuses what leads out of the folder
        missing = [shown_name(name) for name in files if not self._store.exists(name)]
        if missing:
            shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise FormatError(f"{self.folder}: {len(missing)} of {len(files)} pictures are missing: {shown}; is --image_folder right?",
                              path=self.folder)

    def digest(self) -> str:
        """SHA-256 of the names and the content of all of them, in the order of the items."""
        found = hashlib.sha256()
        for name in self.names:
            found.update(name.encode("utf-8", "backslashreplace") + b"\0" + hashlib.sha256(self._store.read(self._held.get(name, name))).digest())
        return found.hexdigest()

    def _named(self, item: Mapping[str, Any]) -> dict[str, Any]:
        image = item.get("image")
        if not isinstance(image, Mapping):
            return dict(item)
        if not isinstance(image.get("bytes"), bytes):
            return {**item, "image": image.get("path")}
        name = f"embedded:{hashlib.sha256(image['bytes']).hexdigest()[:16]}"
        self._held[name] = image
        return {**item, "image": name}
