"""One frame of a DICOM file as 8-bit RGB, by the rules of PS3.3 C.7.6.3 (pixels), C.11.1 (modality) and C.11.2 (values of interest).

Frame: `#frame=N` from 0, by default the middle one. Grey: rescale or modality LUT; then the VOI LUT, or the first window of the file (another one
by `#window=1`, one of your own by `#window=CENTRE,WIDTH`), or, without any, the range of 8-bit samples as they are stored and of deeper ones as the
frame has it. MONOCHROME1 is inverted, padding is black, overlays are not drawn. Colour: palette and YBR become RGB, deeper samples keep their 8 high
bits.
"""

from __future__ import annotations

import io
import math
import zlib
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from stllava.images import check_size, grey_to_rgb
from stllava.limits import MAX_FRAMES, MAX_MEDICAL_BYTES, MAX_PLAIN_UNPACKED_BYTES, MAX_SIDE_PX, MAX_UNPACKED_PER_BYTE

from .choice import Choice, Unreadable, parse_choice, pick, stage
from .codestream import check_codestream

__all__ = ["burned_in", "read", "size"]

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_TECHNICAL = (
    "SOPClassUID", "Modality", "BurnedInAnnotation", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "VOILUTSequence", "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", *_PIXELS)
"""All that is parsed. Of these, only numbers and the codes that stand in this file are ever shown."""

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_OFTEN_WITH_TEXT = tuple(f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("7", "6.1", "3.1"))  # secondary capture; ultrasound, one frame and many


def read(data: bytes, chosen: str) -> tuple[NDArray[np.uint8], list[str]]:
    """(rgb, notes). Raises Unreadable; and whatever pydicom raises, to be told in other words."""
    choice = parse_choice(chosen, ("frame", "window"))
    ds = _parse(data)
    if not any(name in ds for name in _PIXELS):
        raise Unreadable("a DICOM file without pixels: a report, a plan or the like")
    columns, rows = _size(ds, len(data))
    n_frames = _integer(ds, "NumberOfFrames", 1, MAX_FRAMES, 1)
    frame, notes = pick(choice.frame, n_frames, "frame"), _burned_in(ds)
    if n_frames > 1:
        notes.append(f"frame {frame} of {n_frames}")
    photometric, samples = _code(ds, "PhotometricInterpretation", (*_GREY, *_COLOUR, "PALETTE COLOR")), _integer(ds, "SamplesPerPixel", 1, 3, 1)
    if samples != (3 if photometric in _COLOUR else 1):
        raise Unreadable(f"{samples} samples a pixel with photometric interpretation {photometric}")
    stored = _decode(ds, frame, n_frames)
    if stored.shape != ((rows, columns) if samples == 1 else (rows, columns, samples)):
        raise Unreadable(f"the pixels decode to {stored.shape}, the header says {rows} rows and {columns} columns")
    if photometric in _GREY:
        return _grey(stored, ds, frame, choice, photometric, notes), notes
    if choice.window is not None:
        raise Unreadable("a window is asked for, but the picture is in colour")
    if photometric == "PALETTE COLOR":
        with stage("its palette cannot be used"):
            stored = apply_color_lut(stored, ds)[..., :3]
        bits = 8 if stored.max(initial=0) < 256 else 16  # some write 8-bit entries as 16-bit ones
    else:
        bits = _integer(ds, "BitsStored", 1, 64)
    if photometric != "RGB":
        notes.append(f"{photometric} converted to RGB")
    if bits > 8:
        notes.append(f"{bits}-bit samples reduced to their high bytes")
    return np.ascontiguousarray(np.clip(stored >> max(bits - 8, 0), 0, 255).astype(np.uint8)), notes


def size(data: bytes, chosen: str) -> tuple[int, int]:
    """(width, height) of every frame."""
    parse_choice(chosen, ("frame", "window"))
    return _size(_parse(data, pixels=False), len(data))


def burned_in(data: bytes) -> list[str]:
    """What the header says about text in the pixels, from the header alone."""
    return _burned_in(_parse(data, pixels=False))


# ---- the header ------------------------------------------------------------------------------------------------------------------


def _parse(data: bytes, pixels: bool = True) -> pydicom.Dataset:
    with stage("its header is damaged"):
        ds = pydicom.dcmread(io.BytesIO(_inflated(data)), force=True, stop_before_pixels=not pixels, specific_tags=list(_TECHNICAL))
        if "TransferSyntaxUID" not in ds.file_meta:
            implicit, little = ds.original_encoding
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return ds


def _inflated(data: bytes) -> bytes:
    """A deflated file as an explicit little-endian one, since pydicom would inflate without bounds."""
    if _DEFLATED not in data:
        return data
    start = 144 + int.from_bytes(data[140:144], "little")  # preamble, mark, and the element with the length of the file meta information
    if data[132:138] != b"\x02\0\0\0UL" or _DEFLATED not in data[:start]:
        raise Unreadable("a deflated file whose meta information has no length")
    limit = min(MAX_MEDICAL_BYTES, max(MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE * len(data)))
    rest = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limit + 1)
    if len(rest) > limit or _DEFLATED in rest:
        raise Unreadable(f"it inflates to more than {limit} bytes" if len(rest) > limit else "a deflated file in a deflated file")
    return data[:start].replace(_DEFLATED, b"1.2.840.10008.1.2.1\0\0\0") + rest


def _size(ds: pydicom.Dataset, n_bytes: int) -> tuple[int, int]:
    columns, rows = _integer(ds, "Columns", 1, MAX_SIDE_PX), _integer(ds, "Rows", 1, MAX_SIDE_PX)
    try:
        check_size(columns, rows, n_bytes)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    return columns, rows


def _numbers(ds: pydicom.Dataset, keyword: str) -> list[float]:
    """Empty where the element is missing or empty. Raises Unreadable."""
    with stage(f"{keyword} is not a number"):
        value = ds.get(keyword)
        if value is None or (isinstance(value, (str, list, MultiValue)) and not value):
            return []
        found = [float(one) for one in (value if isinstance(value, (list, MultiValue)) else [value])]
    if not all(map(math.isfinite, found)):
        raise Unreadable(f"{keyword} is not finite")
    return found


def _integer(ds: pydicom.Dataset, keyword: str, low: int, high: int, default: int | None = None) -> int:
    found = _numbers(ds, keyword)
    if not found and default is not None:
        return default
    if len(found) != 1 or not low <= found[0] <= high or found[0] != int(found[0]):
        what = f"{found[0]:g}" if len(found) == 1 else "several numbers" if found else "missing"
        raise Unreadable(f"{keyword} is {what}, want an integer from {low} to {high}")
    return int(found[0])


def _code(ds: pydicom.Dataset, keyword: str, known: tuple[str, ...], default: str | None = None) -> str:
    """A value that is in `known`; any other is not shown, whatever it is."""
    with stage(f"{keyword} is damaged"):
        value = ds.get(keyword)
        text = value.strip().upper() if isinstance(value, str) else ""
    if text in known:
        return text
    if default is not None:
        return default
    raise Unreadable(f"{keyword} is {'missing' if value is None else 'none of those that are read'}: {', '.join(known)}")


def _burned_in(ds: pydicom.Dataset) -> list[str]:
    said = _code(ds, "BurnedInAnnotation", ("YES", "NO"), "")
    if said == "YES":
        return ["text is burned into the pixels, the file says; it may identify a patient"]
    with stage("SOPClassUID is damaged"):
        kind = str(ds.get("SOPClassUID") or "")
    if not said and (kind.startswith(_OFTEN_WITH_TEXT) or _code(ds, "Modality", ("US", "IVUS"), "")):
        return ["ultrasound or secondary capture that does not say whether text is burned into the pixels; it may identify a patient"]
    return []


# ---- the pixels ------------------------------------------------------------------------------------------------------------------


def _decode(ds: pydicom.Dataset, frame: int, n_frames: int) -> NDArray[Any]:
    """One frame as stored, YBR as RGB."""
    syntax = ds.file_meta.TransferSyntaxUID
    with stage("pixels in a transfer syntax that is not read"):
        name = syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "an unknown transfer syntax"
        decoder = get_decoder(syntax) if syntax.is_compressed and not syntax.is_deflated else None
    if decoder is not None and not decoder.is_available:
        raise Unreadable(f"pixels in {name}, for which no decoder is installed; pip install 'stllava[dicom]' has JPEG, JPEG-LS, JPEG 2000 and RLE, "
                         "JPEG lossless needs pylibjpeg-libjpeg or python-gdcm")
    with stage(f"the pixels are damaged, cut off, or not as the header says ({name})"):
        if decoder is not None:
            check_codestream(ds, frame, n_frames)
        found: NDArray[Any] = pixel_array(ds, index=frame)
    return found


def _group(ds: pydicom.Dataset, frame: int, sequence: str) -> pydicom.Dataset:
    """Where an enhanced object keeps what concerns a frame; the data set itself in all others."""
    with stage(f"{sequence} is damaged"):
        per_frame, shared = ds.get("PerFrameFunctionalGroupsSequence") or [], ds.get("SharedFunctionalGroupsSequence") or []
        for item in [*per_frame[frame:frame + 1], *shared[:1]]:
            if found := item.get(sequence):
                group: pydicom.Dataset = found[0]
                return group
    return ds


def _grey(stored: NDArray[Any], ds: pydicom.Dataset, frame: int, choice: Choice, photometric: str, notes: list[str]) -> NDArray[np.uint8]:
    padding = _padding(stored, ds)
    values, span = _modality(stored, ds, frame)
    if not np.isfinite(values).all():
        raise Unreadable("grey values that are NaN or infinite")
    shown, note = _of_interest(values, ds, frame, choice)
    if shown is None:
        if span is None:
            inner = values if padding is None or padding.all() else values[~padding]
            span = float(inner.min()), float(inner.max())
        rgb, note = grey_to_rgb(values, *span), f"no window, range {span[0]:g}..{span[1]:g}"
    else:
        rgb = grey_to_rgb(shown, 0.0, 1.0)
    notes.append(note)
    if photometric == "MONOCHROME1":
        notes.append("MONOCHROME1 inverted")
        rgb = 255 - rgb
    if padding is not None:
        rgb[padding] = 0
    return rgb


def _padding(stored: NDArray[Any], ds: pydicom.Dataset) -> NDArray[np.bool_] | None:
    value, limit = _numbers(ds, "PixelPaddingValue")[:1], _numbers(ds, "PixelPaddingRangeLimit")[:1]
    if not value:
        return None
    ends = value + limit
    mask: NDArray[np.bool_] = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() else None


def _modality(stored: NDArray[Any], ds: pydicom.Dataset, frame: int) -> tuple[NDArray[np.float64], tuple[float, float] | None]:
    """Values in the modality's unit, and the range that samples of 8 bits or less have by themselves."""
    with stage("ModalityLUTSequence is damaged"):
        if items := ds.get("ModalityLUTSequence"):
            return _looked_up(stored.astype(np.float64), items[0], ds)[0], None
    group = _group(ds, frame, "PixelValueTransformationSequence")
    slope, intercept = (_numbers(group, "RescaleSlope") or [1.0])[0], (_numbers(group, "RescaleIntercept") or [0.0])[0]
    values = stored.astype(np.float64) * slope + intercept
    bits = _integer(ds, "BitsStored", 1, 64, 64)
    if bits > 8 or stored.dtype.kind == "f":
        return values, None
    first = -(1 << (bits - 1)) if stored.dtype.kind == "i" else 0
    low, high = sorted(one * slope + intercept for one in (first, first + (1 << bits) - 1))
    return values, (low, high)


def _of_interest(values: NDArray[np.float64], ds: pydicom.Dataset, frame: int, choice: Choice) -> tuple[NDArray[np.float64] | None, str]:
    """Values between 0 and 1, and what was done; None: the file says nothing."""
    group = _group(ds, frame, "FrameVOILUTSequence")
    function = _code(group, "VOILUTFunction", ("LINEAR", "LINEAR_EXACT", "SIGMOID"), "LINEAR")
    if isinstance(choice.window, tuple):
        centre, width, function = *choice.window, "LINEAR"
    else:
        with stage("VOILUTSequence is damaged"):
            if choice.window is None and (items := group.get("VOILUTSequence")):
                table, bits = _looked_up(values, items[0], ds)
                return table / ((1 << bits) - 1), "VOI lookup table"
        centres, widths = _numbers(group, "WindowCenter"), _numbers(group, "WindowWidth")
        if not centres and not widths and choice.window is None:
            return None, ""
        number = choice.window or 0
        if number >= min(len(centres), len(widths)):
            raise Unreadable(f"window {number} is wanted, the file has {len(centres)} centres and {len(widths)} widths")
        centre, width = centres[number], widths[number]
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise Unreadable(f"a window of width {width:g} with function {function}")
    return windowed(values, centre, width, function), f"window {centre:g},{width:g} {function}"


def windowed(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, output 0..1."""
    if function == "SIGMOID":
        out: NDArray[np.float64] = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
        return out
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return np.where(values <= centre, 0.0, 1.0)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _looked_up(values: NDArray[np.float64], item: pydicom.Dataset, ds: pydicom.Dataset) -> tuple[NDArray[np.float64], int]:
    """PS3.3 C.11.1.1.1: the entries of `values`, those outside the table as its ends; and the bits of an entry."""
    n, first, bits = (int(number) for number in item.LUTDescriptor)
    n = n or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, "u1" if bits <= 8 and len(data) in (n, n + n % 2) else "<u2" if ds.original_encoding[1] else ">u2")
    table = np.asarray(data, np.float64)[:n]
    if len(table) != n or not 1 <= bits <= 16:
        raise Unreadable(f"a lookup table of {len(table)} entries of {bits} bits, {n} are announced")
    return table[np.clip(np.rint(values) - first, 0, n - 1).astype(np.intp)], bits
