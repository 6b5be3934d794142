"""The one door from an image's name in a record to its content, wherever it lies.

    a/b.jpg                        a file in the image folder
    images.zip/a/b.jpg             a member of an archive in it, zip or tar (.gz, .xz, .bz2)
    a/b.jpg, the folder a .zip     the image folder may be an archive itself
    scan.dcm#frame=3, v.nii.gz#axis=2&slice=40     what is inside a medical file
    {"bytes": ..., "path": ...}    a picture inside a record, as `datasets` stores it
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from stllava.errors import FormatError
from stllava.image_source import FileSource, ImageError, Stored, byte_limit, medical_kind, read_source, shown_name, split_choice, suffix_of
from stllava.images import image_size
from stllava.paths import inside, read_head

from .archives import Archive, is_archive

__all__ = ["IMAGE_SUFFIXES", "ImageStore", "open_picture"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tga", ".tif", ".tiff", ".webp", ".dcm", ".dicom", ".ima", ".nii", ".nii.gz"})


class ImageStore:
    """The pictures of a folder or an archive (None: the working directory). Threads may share it; archives are indexed when they are first needed.

    Every name that comes out of a file is refused if it leads out of the folder. Errors are ImageError.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = Path(folder) if folder is not None else Path()
        self._archives: dict[Path, Archive | ImageError] = {}
        self._lock = threading.Lock()

    def source(self, name: object) -> FileSource:
        """What `load_image` takes; nothing is read yet but an archive's index."""
        if isinstance(name, Mapping):
            return name
        if not isinstance(name, str):
            raise ImageError(f"image {str(name)[:120]!r} is a {type(name).__name__}, want a file name, or {{bytes, path}}")
        base, choice = split_choice(name)
        path = self._inside(base)
        if (place := self._archive_on(path)) is None:
            return f"{path}#{choice}" if choice else path
        archive, member = self._archive(place), path.relative_to(place).as_posix()
        return Stored(str(path), lambda: self._read_member(archive, member), choice)

    def read(self, name: object) -> bytes:
        """The content of a picture's file."""
        return read_source(self.source(name)).data

    def exists(self, name: object) -> bool:
        """Is there a file or member of this name, readable or not? False too for names that are refused."""
        if isinstance(name, Mapping):
            return name.get("bytes") is not None or self.exists(name.get("path"))
        try:
            path = self._inside(split_choice(name)[0]) if isinstance(name, str) else None
            if path is None:
                return False
            place = self._archive_on(path)
            return path.is_file() if place is None else path.relative_to(place).as_posix() in self._archive(place)
        except (FormatError, OSError):
            return False

    def size(self, name: object) -> tuple[int, int]:
        """(width, height) of the picture that `load_image` gives, from the headers alone."""
        return image_size(self.source(name))

    def names(self) -> list[str]:
        """Every picture, by its suffix, in archives too; of files without a suffix those that are DICOM."""
        if self.folder.is_file():
            return [name for name in self._archive(self.folder).names() if suffix_of(name) in IMAGE_SUFFIXES]
        found = []
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if is_archive(path) and path.is_file():
                found += [f"{name}/{member}" for member in self._archive(path).names() if suffix_of(member) in IMAGE_SUFFIXES]
            elif suffix_of(name) in IMAGE_SUFFIXES or (not path.suffix and path.is_file() and medical_kind(read_head(path, 132)) == "DICOM"):
                found.append(name)
        return sorted(found)

    def _inside(self, name: str) -> Path:
        try:
            return inside(self.folder, name)
        except FormatError as error:
            found = ImageError(str(error).replace(repr(name[:120]), repr(shown_name(name[:120]))), path=self.folder)
        raise found

    def _archive_on(self, path: Path) -> Path | None:
        """The archive that the way to `path` goes through: the first file on it that is not its end."""
        if self.folder.is_file():
            return self.folder
        n = len(self.folder.parts)
        for i in range(n + 1, len(path.parts)):
            place = Path(*path.parts[:i])
            if not place.is_dir():
                return place if place.is_file() else None
        return None

    def _archive(self, place: Path) -> Archive:
        with self._lock:
            if place not in self._archives:
                try:
                    self._archives[place] = Archive(place)
                except (FormatError, OSError) as error:
                    self._archives[place] = ImageError(str(error), path=place)
            archive = self._archives[place]
        if isinstance(archive, ImageError):
            raise ImageError(str(archive), path=place)
        return archive

    @staticmethod
    def _read_member(archive: Archive, member: str) -> bytes:
        try:
            return archive.read(member, byte_limit)
        except (FormatError, OSError) as error:
            found = ImageError(str(error).replace(repr(member[:200]), repr(shown_name(member[:200]))), path=archive.path)
        raise found


def open_picture(path: str | os.PathLike[str]) -> FileSource:
    """What `load_image` takes for a path that a person gives, which may lead into an archive and end in a choice. Raises ImageError."""
    name, choice = split_choice(os.fspath(Path(path).expanduser()))
    parts = PurePosixPath(name)
    for place in reversed(parts.parents):
        if is_archive(str(place)) and os.path.isfile(place):
            member = parts.relative_to(place).as_posix()
            return ImageStore(str(place)).source(f"{member}#{choice}" if choice else member)
    return f"{name}#{choice}" if choice else name
