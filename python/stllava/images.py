"""Pictures: file -> 8-bit RGB (`load_image`) -> what the vision tower reads (`ImageProcessor`).

The picture the model sees must be the picture the reader sees, so whatever changes it on the way (orientation, alpha, 16 bits)
is done by a stated rule and noted. One pre-processing serves training and inference.

Pillow reads the files. PNG and BMP files in which nothing needs a rule are decoded by the core, without the GIL and with the
same result; whatever the core refuses or cannot read goes to Pillow, whose word is final, so that a build without the core's
decoder behaves the same. (The core is laxer in two things that cannot change a pixel: what is inside side chunks such as gAMA, and the checksum
of the zlib stream, whose bytes the checksums of the chunks cover.)
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

import stllava_c
from stllava.checkpoint.atomic import write_bytes
from stllava.checkpoint.hf_processor import picture_settings
from stllava.checkpoint.strict_json import dump_object, read_object
from stllava.errors import ConfigError
from stllava.image_source import CATCHING, Content, FileSource, ImageError as ImageError, LoadedImage, read_source
from stllava.limits import MAX_JPEG_SCANS, MAX_NUMBER, MAX_PIXELS, MAX_PIXELS_PER_BYTE, MAX_PLAIN_PIXELS, MAX_PNG_TEXTS, MAX_SIDE_PX

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = (122, 116, 104)  # floor(255 * CLIP_MEAN)

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
CONFIG_FILE = "preprocessor_config.json"

_ORIENTATION = 0x0112  # EXIF tag
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_CORE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"BM")
_COSTLY = ((b"\xff\xd8", (b"\xff\xda",), MAX_JPEG_SCANS, "scans of a JPEG"),
           (b"\x89PNG", (b"zTXt", b"iTXt"), MAX_PNG_TEXTS, "compressed texts in a PNG"))
_PNG_DEPTH_AT = 24  # byte offset of the bit depth
_HEADERS_BYTES = 1 << 18  # the headers of most pictures

Mode: TypeAlias = Literal["default", "compat"]
Colour: TypeAlias = tuple[int, int, int]


Source: TypeAlias = FileSource | Image.Image
Picture: TypeAlias = Source | LoadedImage | np.ndarray
"""An array is uint8 (height, width, 3). `LlavaModel` also takes preprocessed ones, float (3, S, S)."""


def load_image(source: Source, mode: Mode = "default", *, background: Colour = BACKGROUND) -> LoadedImage:
    """Read one picture as 8-bit RGB.

    source: a path, which may end in a choice of what is inside a medical file (`scan.dcm#frame=3`), the content of a file, a picture as `datasets`
    stores it ({"bytes", "path"}), what `stllava.data.image_store.ImageStore` gives, or an opened PIL image. What it is, its content decides.

    mode "default" applies the EXIF orientation, composites alpha on `background`, and stretches grey of more than 8 bits from
    its own range to 0..255. mode "compat" is what the original training did (Pillow's `convert("RGB")`): orientation ignored,
    alpha dropped, deep grey clamped at 255. Both: CMYK and others by Pillow's formula, first frame of animations, 16-bit colour
    by its high bytes. DICOM and NIfTI files have one rule, see `stllava.medical_images`.

    Raises ImageError naming the file and the reason; MemoryError; ConfigError in one line: a medical file, and its extra is not installed.
    """
    if mode not in ("default", "compat"):
        raise ConfigError(f"mode {mode!r}: want 'default' or 'compat'", field="mode")
    content = Content(getattr(source, "filename", "") or "PIL image", b"", "", "") if isinstance(source, Image.Image) else read_source(source)
    if content.kind:
        from stllava.medical_images import load_medical
        return load_medical(content)
    name, data, notes = content.name, content.data, list[str]()
    try:
        if data.startswith(_CORE_SIGNATURES) and (rgb := _decode_in_core(data)) is not None:
            return LoadedImage(rgb, notes)
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ImageError(f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so damaged pictures would be read silently; "
                             "set it to False", path=name)
        with _borrow(source) if isinstance(source, Image.Image) else _open(data, notes) as image:
            return LoadedImage(_convert(image, data, mode, background, notes), notes)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        raise _unreadable(name, error) from error


def image_size(source: FileSource, mode: Mode = "default") -> tuple[int, int]:
    """(width, height) of what `load_image` gives, from the headers alone. Raises as `load_image`, but for what only the pixels show."""
    if isinstance(source, (str, os.PathLike)):
        with suppress(ImageError):  # of a damaged picture; or its headers are longer than what is read here
            content = read_source(source, _HEADERS_BYTES)
            if not content.kind:
                return _size(content, mode)
    content = read_source(source)
    if content.kind:
        from stllava.medical_images import medical_size
        return medical_size(content)
    return _size(content, mode)


def _size(content: Content, mode: Mode) -> tuple[int, int]:
    try:
        with _open(content.data, []) as image:
            return image.size if mode == "compat" or header_orientation(image) < 5 else (image.height, image.width)
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(content.name, error) from error


def _unreadable(name: str, error: Exception) -> ImageError:
    unknown = isinstance(error, UnidentifiedImageError)
    reason = f"not one of {', '.join(FORMATS)}, DICOM, NIfTI, or damaged in the header" if unknown else str(error) or repr(error)
    return ImageError(f"{name}: cannot be read: {reason}", path=name)


def _decode_in_core(data: bytes) -> NDArray[np.uint8] | None:
    """None: Pillow decides what it is."""
    try:
        check_size(*stllava_c.image_probe(data)[:2], len(data))
        return stllava_c.image_decode(data)
    except stllava_c.Error:
        return None


def _open(data: bytes, notes: list[str]) -> Image.Image:
    for signature, marks, limit, what in _COSTLY:
        if data.startswith(signature) and (n := sum(map(data.count, marks))) > limit:
            raise ValueError(f"{n} {what}, limit {limit}")
    with _noted(notes):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(*image.size, len(data))
    return image


def _borrow(image: Image.Image) -> Image.Image:
    """A copy, so that closing it leaves the caller's image open."""
    check_size(*image.size)
    return image.copy()


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Pillow's warnings about damaged side data become notes."""
    with CATCHING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [f"Pillow: {warning.message}" for warning in caught if not issubclass(warning.category, Image.DecompressionBombWarning)]


def check_size(width: int, height: int, n_bytes: int | None = None) -> None:
    """Refuses what is too large, and headers that promise far more pixels than the file can hold, before memory is taken for them."""
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX and width * height <= MAX_PIXELS):
        raise ValueError(f"{width}x{height} pixels, the limits are {MAX_SIDE_PX} a side and {MAX_PIXELS} in all")
    if n_bytes is not None and width * height > max(MAX_PLAIN_PIXELS, MAX_PIXELS_PER_BYTE * n_bytes):
        raise ValueError(f"{width}x{height} pixels in {n_bytes} bytes; a picture of more than {MAX_PLAIN_PIXELS} pixels must have at most "
                         f"{MAX_PIXELS_PER_BYTE} for each byte of its file: truncated file, or a decompression bomb")


def _convert(image: Image.Image, data: bytes, mode: Mode, background: Colour, notes: list[str]) -> NDArray[np.uint8]:
    if getattr(image, "is_animated", False):
        notes.append("first of several frames")
    image.load()
    with _noted(notes):
        orientation = _orientation(image)
        upright = image if mode == "compat" or orientation == 1 else ImageOps.exif_transpose(image)
    if orientation != 1:
        notes.append(f"EXIF orientation {orientation} " + ("ignored" if mode == "compat" else "applied"))
        image = upright
    if image.mode in _DEEP_GREY:
        if "transparency" in image.info:
            notes.append("transparent grey level ignored")
        return _deep_grey(image, mode, notes)
    if data.startswith(_CORE_SIGNATURES[0]) and data[_PNG_DEPTH_AT] == 16:
        notes.append("16-bit samples reduced to their high bytes")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            notes.append("alpha dropped" if mode == "compat" else f"alpha composited on {background}")
            if mode == "default":
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba)
    elif image.mode not in ("RGB", "L", "1", "P"):
        notes.append(f"{image.mode} converted to RGB by Pillow's formula")
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1..8; 1 (upright) also where the block cannot be parsed, as viewers do."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the block is a TIFF file of its own, with as many ways to be damaged
        return 1
    return value if value in range(1, 9) else 1


def header_orientation(image: Image.Image) -> int:
    """`_orientation` from the header alone: of a PNG whose block lies behind its pixels, which Pillow would decode to look, 1."""
    return 1 if image.format == "PNG" and "exif" not in image.info else _orientation(image)


def _deep_grey(image: Image.Image, mode: Mode, notes: list[str]) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("grey values that are NaN or infinite")
    if mode == "compat":
        notes.append(f"{image.mode} grey clamped at 255 (range {low:g}..{high:g})")
        return grey_to_rgb(values, 0, 255, floor=True)
    notes.append(f"{image.mode} grey windowed from {low:g}..{high:g} to 0..255")
    return grey_to_rgb(values, low, high)


def grey_to_rgb(values: NDArray[np.float64], low: float, high: float, *, floor: bool = False) -> NDArray[np.uint8]:
    """(height, width) finite grey values -> (height, width, 3): `low` and below is 0, `high` and above 255, rounded between."""
    scaled = np.clip((values - low) * (255 / (high - low or 1.0)), 0, 255)
    grey = (scaled if floor else np.rint(scaled)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """CLIP's pre-processing: pad to a square or not, bicubic resize of the shorter edge, centre crop, normalise.

    size: side of the model's input in pixels. image_mean, image_std: per channel, of values in 0..1. background: colour of the
    padding; None = floor(255 * image_mean). aspect: "pad" (training, and the default everywhere) or "square" (long sides are
    cropped away). mode: how pictures that are not arrays are loaded.

    The 8-bit picture in the middle has Pillow's bytes (Pillow <= 12, see csrc/image/resize.h).
    Source: Transformers CLIPImageProcessor, LLaVA `expand2square`. Raises ConfigError.
    """

    size: int = 336
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    background: Colour | None = None
    aspect: Literal["pad", "square"] = "pad"
    mode: Mode = "default"

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not 1 <= self.size <= 4096:
            raise ConfigError(f"size {self.size!r}: want an integer from 1 to 4096", field="size")
        if self.aspect not in ("pad", "square"):
            raise ConfigError(f"aspect {self.aspect!r}: want 'pad' or 'square'", field="aspect")
        if self.mode not in ("default", "compat"):
            raise ConfigError(f"mode {self.mode!r}: want 'default' or 'compat'", field="mode")
        for field in ("image_mean", "image_std"):
            values = getattr(self, field)
            values = tuple(values) if isinstance(values, Sequence) else (values,)
            if len(values) != 3 or not all(isinstance(v, int | float) and abs(v) <= MAX_NUMBER for v in values) or (
                    field == "image_std" and min(values) <= 0):
                raise ConfigError(f"{field} {values!r}: want 3 numbers of at most {MAX_NUMBER:g}{', > 0' * (field == 'image_std')}", field=field)
            object.__setattr__(self, field, tuple(map(float, values)))
        colour = tuple(min(max(int(255 * m), 0), 255) for m in self.image_mean) if self.background is None else tuple(self.background)
        if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
            raise ConfigError(f"background {colour!r}: want 3 integers from 0 to 255", field="background")
        object.__setattr__(self, "background", colour)

    @property
    def _colour(self) -> Colour:
        assert self.background is not None  # since __post_init__
        return self.background

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], aspect: Literal["pad", "square"] = "pad", *,
                        mode: Mode = "default") -> Self:
        """Read `preprocessor_config.json`, or since transformers 5 the image processor inside `processor_config.json`.

        A key that changes the maths and is not implemented is a ConfigError.
        """
        path, values = picture_settings(directory) or (Path(directory) / CONFIG_FILE, None)
        try:
            return cls(**_parse_config(read_object(path) if values is None else values), aspect=aspect, mode=mode)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", path=path, field=error.field) from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json` into an existing directory, in the form Transformers reads."""
        write_bytes(Path(directory) / CONFIG_FILE, dump_object({
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
            "size": {"shortest_edge": self.size}, "do_center_crop": True, "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.image_mean), "image_std": list(self.image_std)}))

    def load(self, image: Picture) -> LoadedImage:
        """`image` as 8-bit RGB: arrays (height, width, 3) as they are, everything else through `load_image`."""
        if isinstance(image, LoadedImage):
            return image
        if not isinstance(image, np.ndarray):
            return load_image(image, self.mode, background=self._colour)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"picture array: want uint8 (height, width, 3), found {image.dtype} {image.shape}")
        return LoadedImage(image, [])

    def __call__(self, image: Picture) -> NDArray[np.float32]:
        """float32 (3, size, size). Raises ImageError."""
        rgb = np.ascontiguousarray(self.load(image).rgb)
        return stllava_c.image_preprocess(rgb, size=self.size, pad=self.aspect == "pad", background=self._colour,
                                          mean=self.image_mean, std=self.image_std)

    def resize_crop(self, image: Picture) -> NDArray[np.uint8]:
        """uint8 (size, size, 3): the picture the model sees, before normalisation. Raises ImageError."""
        rgb = np.ascontiguousarray(self.load(image).rgb)
        return stllava_c.image_resize_crop(rgb, size=self.size, pad=self.aspect == "pad", background=self._colour)

    def preprocess_many(self, images: Sequence[Picture],
                        threads: int | None = None) -> NDArray[np.float32]:
        """float32 (n, 3, size, size), loaded and processed by `threads` threads (None: one per core), the same at any number.

        Raises the first ImageError, with the number of the picture as a note.
        """
        out = np.empty((len(images), 3, self.size, self.size), dtype=np.float32)

        def fill(i: int) -> None:
            try:
                out[i] = self(images[i])
            except ImageError as error:
                error.add_note(f"picture {i} of {len(images)}")
                raise

        with ThreadPoolExecutor(max_workers=threads or os.cpu_count()) as pool:
            for _ in pool.map(fill, range(len(images))):
                pass
        return out


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # keys, and the values under which the maths is the implemented one
    "do_resize": (True,), "do_center_crop": (True,), "do_normalize": (True,), "do_rescale": (True,), "resample": (3,),
    "do_convert_rgb": (True, False),  # always converted
    "image_processor_type": (*(f"{kind}ImageProcessor{backend}" for kind in ("CLIP", "Llava") for backend in ("", "Fast", "Pil")),
                             "CLIPFeatureExtractor"),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
    "data_format": ("channels_first",),
    "do_pad": (False,),
}
_NOT_NEUTRAL = ("size", "crop_size", "rescale_factor", "image_mean", "image_std")


def _parse_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ImageProcessor from the JSON object; absent keys have CLIP's values. null means absent."""
    values = {key: value for key, value in values.items() if value is not None and not key.startswith("_") and key != "processor_class"}
    size = _side(values, "size", {"shortest_edge"}, 224)
    crop_size = _side(values, "crop_size", {"height", "width"}, size)
    if crop_size != size:
        raise ConfigError(f"crop_size {crop_size} differs from size {size}: only equal ones are implemented", field="crop_size")
    if str(values.get("image_processor_type")).startswith("Llava"):
        values.pop("do_pad", None)  # to a square: `hf_processor.pads` gives it to the model's configuration, and that to `aspect`
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-12:
        raise ConfigError(f"rescale_factor {factor!r}: only 1/255 is implemented", field="rescale_factor")
    for key, value in values.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise ConfigError(f"{key} is {value!r}: only {' or '.join(map(repr, _NEUTRAL[key]))} is implemented", field=key)
        if key not in _NEUTRAL and key not in _NOT_NEUTRAL:
            raise ConfigError(f"unknown key {key} = {value!r}: it may change the picture; remove it if it does not", field=key)
    return {"size": size, **{key: values[key] for key in ("image_mean", "image_std") if key in values}}


def _side(values: Mapping[str, Any], key: str, names: set[str], default: int) -> int:
    """An edge in pixels, written as a number or as an object with exactly `names`, all equal."""
    value = values.get(key, default)
    sides = list(value.values()) if isinstance(value, dict) and set(value) == names else [value]
    if not all(isinstance(side, int) and side == sides[0] for side in sides):
        raise ConfigError(f"{key} {value!r}: want a number of pixels or an object of {' and '.join(sorted(names))}, equal", field=key)
    side: int = sides[0]
    return side


def expand2square(image: Image.Image, background: Colour | int) -> Image.Image:
    """The picture centred on a square of its longer side (offset rounded down), mode unchanged. Source: LLaVA `expand2square`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(images: Iterable[Picture], image_processor: ImageProcessor,
                   model_cfg: Any) -> NDArray[np.float32]:
    """float32 (n, 3, size, size), padded iff `model_cfg` (object or mapping) says image_aspect_ratio "pad".

    Source: LLaVA `process_images`. Raises ConfigError for aspect ratios that are not implemented ("anyres", ...); ImageError.
    """
    key = "image_aspect_ratio"
    aspect = model_cfg.get(key) if isinstance(model_cfg, Mapping) else getattr(model_cfg, key, None)
    if aspect not in ("pad", "square", None):
        raise ConfigError(f"image_aspect_ratio {aspect!r}: want 'pad' or 'square'", field="image_aspect_ratio")
    return replace(image_processor, aspect="pad" if aspect == "pad" else "square").preprocess_many(list(images))
