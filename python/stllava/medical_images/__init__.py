"""Medical files -> 8-bit RGB. Nothing of a header but numbers and codes that are known beforehand ever leaves this package.

    dicom         one frame of a DICOM file       (extra: dicom)
    codestream    what a compressed frame says of itself
    nifti         one slice of a NIfTI volume     (extra: nifti)
    choice        which one: `scan.dcm#frame=3`, `volume.nii.gz#axis=2&slice=40&window=40,400`
    silence       what pydicom and nibabel say is not heard, since it may quote the header

Texts of a header (names, dates, identifiers, descriptions, private elements, comments) are not even parsed where the format allows it. What fails is
told in words of our own, without the exception that it was. Pixels are another matter: text that is burned into them stays there, so this is no
de-identification; where a file says, or is of a kind, that it may have such text, a note says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from stllava.errors import ConfigError
from stllava.image_source import Content, ImageError, LoadedImage

from .choice import Unreadable
from .silence import silence

__all__ = ["burned_in_text", "load_medical", "medical_size"]

T = TypeVar("T")


def load_medical(content: Content) -> LoadedImage:
    """The chosen picture. Raises ImageError; ConfigError: the extra is not installed; MemoryError."""
    def read(reader: ModuleType) -> LoadedImage:
        rgb, notes = reader.read(content.data, content.choice)
        return LoadedImage(rgb, notes)

    return _in_silence(content, read)


def medical_size(content: Content) -> tuple[int, int]:
    """(width, height) of the picture that `load_medical` gives, from the header alone."""
    def size(reader: ModuleType) -> tuple[int, int]:
        width, height = reader.size(content.data, content.choice)
        return width, height

    return _in_silence(content, size)


def burned_in_text(content: Content) -> list[str]:
    """A note where the header says, or the kind of file makes it likely, that text is burned into the pixels."""
    def notes(reader: ModuleType) -> list[str]:
        return list(reader.burned_in(content.data))

    return _in_silence(content, notes) if content.kind == "DICOM" else []


def _in_silence(content: Content, call: Callable[[ModuleType], T]) -> T:
    reader = _reader(content)
    with silence():
        try:
            return call(reader)
        except MemoryError:
            raise
        except Unreadable as error:
            reason = str(error)
        except Exception:  # noqa: BLE001 - whatever it says may quote the header
            reason = f"it is damaged, or not as {content.kind} says"
    # Raised here, not in the handler, so that the exception does not carry that one along.
    raise ImageError(f"{content.name}: cannot be read: {reason}", path=content.name)


def _reader(content: Content) -> ModuleType:
    extra, package = ("dicom", "pydicom") if content.kind == "DICOM" else ("nifti", "nibabel")
    try:
        return importlib.import_module(f"{__name__}.{extra}")
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"{content.kind} files need {package}: pip install 'stllava[{extra}]'") from error
