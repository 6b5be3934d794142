"""What the image files say about themselves: each is opened once, its header read, and with `deep` its pixels.

A file whose end mark is missing is decoded in any case: that is the sign of a copy that was cut off, and only decoding tells.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from stllava.errors import FormatError
from stllava.images import FORMATS, ImageError, load_image
from stllava.limits import MAX_IMAGE_BYTES, MAX_PIXELS, MAX_SIDE_PX
from stllava.paths import inside

from .hashes import Print, fingerprint
from .kinds import Found

__all__ = ["PictureRules", "Picture", "digests", "probe_all", "thumbnail"]

_FORMAT_OF = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF"}
_END_MARK = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096  # bytes at the end in which the mark must be; some programs append a little of their own
_ORIENTATION = 0x0112
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
    """One image name of the data. `path` None: there is no such file, or it is not one file of its own. `size`: (width, height) as stored."""

    name: str
    path: Path | None = None
    n_bytes: int = 0
    format: str = ""
    size: tuple[int, int] | None = None
    print: Print | None = None
    found: list[Found] = field(default_factory=list)


def probe_all(folder: Path, names: Sequence[str], rules: PictureRules, tick: Callable[[int], object], threads: int | None = None) -> list[Picture]:
    """One `Picture` per name, in their order. tick: called with the number of pictures done since."""
    with _silent_pillow(), ThreadPoolExecutor(threads or min(8, 2 * (os.cpu_count() or 1))) as pool:
        pictures = []
        for picture in pool.map(lambda name: probe(folder, name, rules), names):
            pictures.append(picture)
            tick(1)
    return pictures


def probe(folder: Path, name: str, rules: PictureRules) -> Picture:
    picture = Picture(name)
    try:
        picture.path = inside(folder, name)
        status = os.stat(picture.path)
    except FormatError as error:
        picture.found.append(("image_name", str(error).partition(": ")[2] or str(error)))
    except (FileNotFoundError, NotADirectoryError):
        picture.path = None
        picture.found.append(("image_missing", "no such file"))
    except OSError as error:
        picture.found.append(("image_damaged", f"cannot be read: {error.strerror or error}"))
    else:
        picture.n_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            picture.found.append(("image_damaged", "not a regular file"))
            picture.path = None
        elif not status.st_size:
            picture.found.append(("image_empty", "0 bytes"))
        elif status.st_size > MAX_IMAGE_BYTES:
            picture.found.append(("image_limit", f"{status.st_size} bytes, limit {MAX_IMAGE_BYTES}"))
        else:
            _look(picture, picture.path, rules)
    return picture


def _look(picture: Picture, path: Path, rules: PictureRules) -> None:
    try:
        with _opened(path) as image:
            header = list(_header_findings(image, picture, rules))
            decode = rules.deep or _is_cut(path, picture)
            if rules.prints and not decode:
                image.draft("L", (64, 64))
                picture.print = fingerprint(image)
    except (MemoryError, ImageError):
        raise
    except UnidentifiedImageError:
        picture.found.append(("image_damaged", f"not one of {', '.join(FORMATS)}, or damaged in the header"))
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise a dozen types for damaged files
        picture.found.append(("image_damaged", f"cannot be read: {_without_path(error, path)}"))
    else:
        picture.found += header
        if decode and not any(kind == "image_limit" for kind, _ in header):
            _decode(picture, path, rules)


def _decode(picture: Picture, path: Path, rules: PictureRules) -> None:
    try:
        rgb = load_image(path).rgb
    except ImageError as error:
        picture.found.append(("image_damaged", _without_path(error, path)))
        return
    if rules.deep and (rgb == rgb[0, 0]).all():
        picture.found.append(("image_blank", f"all {rgb.shape[1]}x{rgb.shape[0]} pixels are {tuple(map(int, rgb[0, 0]))}"))
    if rules.prints:
        picture.print = fingerprint(Image.fromarray(rgb))


def _header_findings(image: Image.Image, picture: Picture, rules: PictureRules) -> Iterator[Found]:
    picture.format, picture.size = "JPEG" if image.format == "MPO" else image.format or "", image.size
    width, height = image.size
    expected = _FORMAT_OF.get(PurePosixPath(picture.name).suffix.lower())
    if expected not in (None, picture.format):
        yield "image_extension", f"the content is {picture.format}"
    if not (width <= MAX_SIDE_PX and height <= MAX_SIDE_PX and width * height <= MAX_PIXELS):
        yield "image_limit", f"{width}x{height} pixels, the limits are {MAX_SIDE_PX} a side and {MAX_PIXELS} in all"
    elif min(width, height) < rules.min_side or max(width, height) > rules.max_aspect * min(width, height):
        yield "image_size", f"{width}x{height} pixels"
    orientation = _orientation(image)
    if orientation != 1:
        yield "image_rotated", f"EXIF orientation {orientation}"
    if image.mode.startswith(("I", "F")) or (picture.format == "PNG" and _png_depth(picture.path) == 16):
        yield "image_16bit", f"mode {image.mode}"
    elif image.mode not in _PLAIN_MODES:
        yield "image_colours", f"mode {image.mode}"
    if image.has_transparency_data:
        yield "image_alpha", f"mode {image.mode}"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        yield "image_frames", f"{getattr(image, 'n_frames', 1)} frames"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file, Image.open(file, formats=FORMATS) as image:
        yield image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the block is a TIFF file of its own, with as many ways to be damaged
        return 1
    return value if value in range(1, 9) else 1


def _png_depth(path: Path | None) -> int:
    assert path is not None
    with open(path, "rb") as file:
        file.seek(_PNG_DEPTH_AT)
        return (file.read(1) or b"\0")[0]


def _is_cut(path: Path, picture: Picture) -> bool:
    mark = _END_MARK.get(picture.format)
    if mark is None:
        return False
    with open(path, "rb") as file:
        file.seek(max(picture.n_bytes - _TAIL, 0))
        return mark not in file.read()


def _without_path(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ") or repr(error)


@contextmanager
def _silent_pillow() -> Iterator[None]:
    """Pillow's warnings about side data; changing the filters is the process's affair, so once around all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def digests(pictures: Iterable[Picture]) -> Mapping[str, bytes]:
    """Name -> hash of the content, of those pictures whose size in bytes another one has too: all others cannot be equal to any."""
    by_size: dict[int, list[Picture]] = {}
    for picture in pictures:
        if picture.path is not None and picture.n_bytes:
            by_size.setdefault(picture.n_bytes, []).append(picture)
    found = {}
    for group in by_size.values():
        if len({picture.path for picture in group}) > 1:
            for picture in group:
                assert picture.path is not None
                try:
                    found[str(picture.path)] = _digest(picture.path)
                except OSError:
                    continue  # reported as unreadable
    return found


def _digest(path: Path) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return state.digest()


def thumbnail(path: Path, side: int = 96) -> bytes | None:
    """A small JPEG of the picture as training reads it; None where it cannot be read."""
    try:
        image = Image.fromarray(load_image(path).rgb)
    except (ImageError, MemoryError):
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
