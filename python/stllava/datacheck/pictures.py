"""What the image files say about themselves: each is opened once, its header read, and with `deep` its pixels.

A file whose end mark is missing is decoded in any case: that is the sign of a copy that was cut off, and only decoding tells.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from stllava.data.image_store import ImageStore
from stllava.data.pictures import picture_key
from stllava.image_source import HEAD_BYTES, FileSource, ImageError, Stored, byte_limit, medical_kind, read_source, shown_name, split_choice
from stllava.images import FORMATS, check_size, header_orientation, load_image

from .hashes import Print, fingerprint
from .kinds import Found

__all__ = ["Picture", "PictureRules", "digests", "key_of", "probe_all", "thumbnail"]

_FORMAT_OF = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"}
_END_MARK = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096  # bytes at the end in which the mark must be; some programs append a little of their own
_PLAIN_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA")
_PNG_DEPTH_AT = 24
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class PictureRules:
    """deep: decode every file. prints: fingerprints for near duplicates. min_side in pixels, max_aspect = longer side / shorter."""

    deep: bool = False
    prints: bool = False
    min_side: int = 16
    max_aspect: float = 8.0


@dataclass(slots=True)
class Picture:
    """One image of the data.

    key: equal for equal images, see `key_of`. name: what people call it. source: what `load_image` takes; None where there is nothing to read.
    place: where it lies, the same for the same file. size: (width, height) as stored.
    """

    key: Hashable
    name: str
    source: FileSource | None = None
    place: str = ""
    n_bytes: int = 0
    format: str = ""
    size: tuple[int, int] | None = None
    print: Print | None = None
    found: list[Found] = field(default_factory=list)


def key_of(image: Any) -> Hashable | None:
    """`picture_key`; None for what is no image at all."""
    is_image = isinstance(image, str) or (isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes))
    return picture_key(image) if is_image else None


def probe_all(store: ImageStore, images: Mapping[Hashable, Any], rules: PictureRules, tick: Callable[[int], object],
              threads: int | None = None) -> list[Picture]:
    """One `Picture` for each image by its key, in their order. tick: called with the number of pictures done since."""
    with _silent_pillow(), ThreadPoolExecutor(threads or min(8, 2 * (os.cpu_count() or 1))) as pool:
        pictures = []
        for picture in pool.map(lambda key: probe(store, key, images[key], rules), images):
            pictures.append(picture)
            tick(1)
    return pictures


def probe(store: ImageStore, key: Hashable, image: Any, rules: PictureRules) -> Picture:
    picture = Picture(key, shown_name(image) if isinstance(image, str) else "an image inside its record")
    try:
        source = store.source(image)
    except ImageError as error:
        picture.found.append(("image_name", re.sub("link to .*; want", "link that leads out; want", str(error).partition(": ")[2])))
        return picture
    try:
        if isinstance(source, (str, os.PathLike)):
            path = Path(split_choice(os.fspath(source))[0])
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            picture.place, picture.n_bytes = str(path.resolve()) + os.fspath(source)[len(str(path)):], status.st_size
        elif isinstance(source, Stored) and not store.exists(image):
            raise FileNotFoundError
        else:
            picture.place = f"{source.name}#{source.choice}" if isinstance(source, Stored) else str(key)
            picture.n_bytes = len(read_source(source).data)
    except (FileNotFoundError, NotADirectoryError):
        picture.found.append(("image_missing", "no such file"))
    except OSError as error:
        picture.found.append(("image_damaged", f"cannot be read: {error.strerror or error}"))
    except ImageError as error:
        picture.found.append(("image_empty", "0 bytes") if "is empty" in str(error) else ("image_damaged", _without_place(error, source)))
    else:
        picture.source = source
        _look(picture, source, rules)
    return picture


def _choice_of(source: FileSource) -> str:
    """What is inside a medical file: "frame=3"."""
    if isinstance(source, Stored):
        return source.choice
    place = source.get("path") if isinstance(source, Mapping) else source
    return split_choice(os.fspath(place))[1] if isinstance(place, (str, os.PathLike)) else ""


def content(source: FileSource) -> BinaryIO:
    """The file, or what stands for it. Raises OSError, ImageError."""
    if isinstance(source, (str, os.PathLike)):
        path = split_choice(os.fspath(source))[0]
        return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    return io.BytesIO(read_source(source).data)


def _look(picture: Picture, source: FileSource, rules: PictureRules) -> None:
    if not picture.n_bytes:
        picture.found.append(("image_empty", "0 bytes"))
        return
    decode, header = False, list[Found]()
    try:
        with content(source) as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            if picture.n_bytes > (limit := byte_limit(head)):
                picture.found.append(("image_limit", f"{picture.n_bytes} bytes, limit {limit}"))
                return
            if medical_kind(head) or _choice_of(source):
                header, decode = _medical_findings(picture, source, rules), rules.deep or rules.prints
            else:
                with Image.open(file, formats=FORMATS) as image:
                    header = list(_header_findings(image, file, picture, rules))
                    decode = rules.deep or _is_cut(file, picture)
                    if rules.prints and not decode:
                        image.draft("L", (64, 64))
                        picture.print = fingerprint(image)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        picture.found.append(("image_limit", str(error)))
    except UnidentifiedImageError:
        picture.found.append(("image_damaged", f"not one of {', '.join(FORMATS)}, DICOM, NIfTI, or damaged in the header"))
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise a dozen types for damaged files
        picture.found.append(("image_damaged", _without_place(error, source)))
    else:
        picture.found += header
        if decode and not any(kind == "image_limit" for kind, _ in header):
            _decode(picture, source, rules)


def _medical_findings(picture: Picture, source: FileSource, rules: PictureRules) -> list[Found]:
    """Of DICOM and NIfTI files; of their headers nothing is told but the size and whether there may be text in the pixels."""
    from stllava.medical_images import burned_in_text, medical_size
    whole = read_source(source)
    picture.name, picture.format, picture.size = whole.name, whole.kind, medical_size(whole)
    return [*_size_findings(picture.size, None, rules), *(("image_text", note) for note in burned_in_text(whole))]


def _decode(picture: Picture, source: FileSource, rules: PictureRules) -> None:
    try:
        rgb = load_image(source).rgb
    except ImageError as error:
        picture.found.append(("image_damaged", _without_place(error, source)))
        return
    if rules.deep and (rgb == rgb[0, 0]).all():
        picture.found.append(("image_blank", f"all {rgb.shape[1]}x{rgb.shape[0]} pixels are {tuple(map(int, rgb[0, 0]))}"))
    if rules.prints:
        picture.print = fingerprint(Image.fromarray(rgb))


def _header_findings(image: Image.Image, file: BinaryIO, picture: Picture, rules: PictureRules) -> Iterator[Found]:
    picture.format, picture.size = "JPEG" if image.format == "MPO" else image.format or "", image.size
    expected = _FORMAT_OF.get(PurePosixPath(picture.name).suffix.lower())
    if expected not in (None, picture.format):
        yield "image_extension", f"the content is {picture.format}"
    yield from _size_findings(image.size, picture.n_bytes, rules)
    orientation = header_orientation(image)
    if orientation != 1:
        yield "image_rotated", f"EXIF orientation {orientation}"
    if image.mode.startswith(("I", "F")) or (picture.format == "PNG" and _byte_at(file, _PNG_DEPTH_AT) == 16):
        yield "image_16bit", f"mode {image.mode}"
    elif image.mode not in _PLAIN_MODES:
        yield "image_colours", f"mode {image.mode}"
    if image.has_transparency_data:
        yield "image_alpha", f"mode {image.mode}"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        yield "image_frames", f"{getattr(image, 'n_frames', 1)} frames"


def _size_findings(size: tuple[int, int], n_bytes: int | None, rules: PictureRules) -> Iterator[Found]:
    """n_bytes: of the file, where a few bytes cannot hold many pixels."""
    width, height = size
    try:
        check_size(width, height, n_bytes)
    except ValueError as error:
        yield "image_limit", str(error)
        return
    if min(width, height) < rules.min_side or max(width, height) > rules.max_aspect * min(width, height):
        yield "image_size", f"{width}x{height} pixels"


def _byte_at(file: BinaryIO, place: int) -> int:
    before = file.tell()
    file.seek(place)
    value = (file.read(1) or b"\0")[0]
    file.seek(before)
    return value


def _is_cut(file: BinaryIO, picture: Picture) -> bool:
    mark = _END_MARK.get(picture.format)
    if mark is None:
        return False
    before = file.tell()
    file.seek(max(picture.n_bytes - _TAIL, 0))
    tail = file.read()
    file.seek(before)
    return mark not in tail


def _without_place(error: Exception, source: FileSource) -> str:
    """What an error says, without the name before it: the finding has that already."""
    text = str(error) or repr(error)
    place = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source.name if isinstance(source, Stored) else "picture in a record"
    for name in (place, shown_name(place), "picture in a record"):
        text = text.removeprefix(f"{name}: ")
    return text if "cannot be read" in text else f"cannot be read: {text}"


@contextmanager
def _silent_pillow() -> Iterator[None]:
    """Pillow's warnings about side data; changing the filters is the process's affair, so once around all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def digests(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """Place -> hash of content and choice, of those pictures whose size in bytes another one has too: all others cannot be equal to any."""
    by_size: dict[int, dict[str, Picture]] = {}
    for picture in pictures:
        if picture.place and picture.n_bytes:
            by_size.setdefault(picture.n_bytes, {})[picture.place] = picture
    found = {}
    for group in by_size.values():
        for picture in group.values() if len(group) > 1 else ():
            with suppress(OSError, ImageError):  # reported as unreadable
                found[picture.place] = _digest(picture)
    return found


def _digest(picture: Picture) -> bytes:
    assert picture.source is not None
    state = hashlib.blake2b(_choice_of(picture.source).encode(), digest_size=16)
    with content(picture.source) as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.digest()


def thumbnail(picture: Picture, side: int = 96) -> bytes | None:
    """A small JPEG of the picture as training reads it; None where it cannot be read."""
    if picture.source is None:
        return None
    try:
        image = Image.fromarray(load_image(picture.source).rgb)
    except (ImageError, MemoryError):
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
