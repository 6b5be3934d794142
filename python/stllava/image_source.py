"""Where a picture comes from, a file, its content, a member of an archive, a row of a table; what its readers return; what of it messages may show.

A name may end in a choice of what is inside a medical file: `scan.dcm#frame=3`, `volume.nii.gz#axis=2&slice=40`.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stllava.errors import FormatError
from stllava.limits import MAX_IMAGE_BYTES, MAX_MEDICAL_BYTES
from stllava.paths import read_head, read_regular

__all__ = ["CATCHING", "HEAD_BYTES", "Content", "ImageError", "LoadedImage", "Stored", "byte_limit", "medical_kind", "read_source", "shown_name",
           "split_choice", "suffix_of"]

HEAD_BYTES = 544  # of NIfTI-2, the longest head that tells a kind
SHOW_NAMES = "STLLAVA_SHOW_NAMES"
MEDICAL_SUFFIXES = (".dcm", ".dicom", ".ima", ".nii", ".nii.gz")

_CHOICE = re.compile(r"#((?:frame|axis|slice|volume|window)=[^&#/]*(?:&[a-z]+=[^&#/]*)*)\Z")
_FIRST_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x08")  # of a DICOM file without preamble, little and big endian
_SALT = secrets.token_bytes(16)


class ImageError(FormatError):
    """A picture is missing, empty, damaged, truncated, too large or of an unknown kind."""


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """rgb: uint8 (height, width, 3). notes: what was done to (or ignored in) the file; empty for plain RGB or grey pictures."""

    rgb: NDArray[np.uint8]
    notes: list[str]


CATCHING = threading.Lock()
"""Catching warnings changes the whole process, so readers that do hold this."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A picture that is no file of its own. name: what messages call it. read: its content. choice: what is inside a medical file."""

    name: str
    read: Callable[[], bytes]
    choice: str = ""


FileSource: TypeAlias = str | os.PathLike[str] | bytes | Mapping[str, Any] | Stored


class Content(NamedTuple):
    name: str
    data: bytes
    choice: str
    kind: str
    """Of medical files "DICOM" or "NIfTI", else ""."""


def read_source(source: FileSource, n_bytes: int | None = None) -> Content:
    """The content of a picture; of a file its first `n_bytes` (None: all). Raises ImageError."""
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is None and isinstance(path, str):
            return read_source(path, n_bytes)
        if not isinstance(data, bytes):
            raise ImageError(f"picture in a record: want {{'bytes', 'path'}}, found {sorted(map(str, source))} with a {type(data).__name__} as bytes")
        name, choice = split_choice(path) if isinstance(path, str) and path else ("picture in a record", "")
    elif isinstance(source, bytes):
        name, data, choice = "picture in memory", source, ""
    elif isinstance(source, Stored):
        name, data, choice = source.name, source.read(), source.choice
    else:
        name, choice = split_choice(os.fspath(source))
        data = _read_file(name, n_bytes)
    kind = medical_kind(data[:HEAD_BYTES])
    name = shown_name(name, kind)
    if not data:
        raise ImageError(f"{name}: the file is empty", path=name)
    if len(data) > (limit := byte_limit(data[:HEAD_BYTES])):
        raise ImageError(f"{name}: {len(data)} bytes, larger than the limit of {limit} bytes", path=name)
    if choice and not kind:
        raise ImageError(f"{name}#{choice}: only a DICOM or NIfTI file has something to choose", path=name)
    return Content(name, data, choice, kind)


def split_choice(name: str) -> tuple[str, str]:
    """("scan.dcm", "frame=3") of "scan.dcm#frame=3"; any other "#" belongs to the name."""
    found = _CHOICE.search(name)
    return (name[:found.start()], found[1]) if found else (name, "")


def medical_kind(head: bytes) -> str:
    """From the first bytes of a file: "DICOM", "NIfTI" or "". A gzip stream counts as NIfTI, the only packed kind that is read."""
    if head[128:132] == b"DICM" or (head[:2] in _FIRST_GROUPS and len(head) > 8 and _is_element(head)):
        return "DICOM"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0") or head[:2] == b"\x1f\x8b":
        return "NIfTI"
    return ""


def _is_element(head: bytes) -> bool:
    """Does a DICOM data element begin here: an explicit type, or a length that the first ones of a file can have?"""
    return (head[4:6].isalpha() and head[4:6].isupper()) or 0 < int.from_bytes(head[4:8], "little") < 256


def byte_limit(head: bytes) -> int:
    """How long a picture file may be that begins like this."""
    return MAX_MEDICAL_BYTES if medical_kind(head) else MAX_IMAGE_BYTES


def suffix_of(name: str) -> str:
    """".png", ".nii.gz" in lower case; "" without one."""
    lower = os.path.basename(name).lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else os.path.splitext(lower)[1]


def shown_name(name: str, kind: str = "") -> str:
    """What messages call a picture. Names of medical files often hold a patient's: there it is a digest, other in every process.

    kind: see `medical_kind`; files that cannot be read are medical by their suffix. The environment variable STLLAVA_SHOW_NAMES=1 shows all names.
    """
    medical = kind or suffix_of(split_choice(name)[0]) in MEDICAL_SUFFIXES
    if not medical or name.startswith("picture in ") or os.environ.get(SHOW_NAMES) == "1":
        return name
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=_SALT, digest_size=4).hexdigest()
    return f"{kind or 'medical'} file {digest} ({SHOW_NAMES}=1 shows names)"


def _read_file(path: str, n_bytes: int | None) -> bytes:
    shown = shown_name(path)
    try:
        head = read_head(path, n_bytes or HEAD_BYTES)
        shown = shown_name(path, medical_kind(head))
        return read_regular(path, byte_limit(head)) if n_bytes is None else head
    except OSError as error:
        reason = f"{shown}: cannot be read: {error.strerror or error}"
    except FormatError as error:
        reason = f"cannot be read: {str(error).replace(path, shown)}"
    raise ImageError(reason, path=path)
