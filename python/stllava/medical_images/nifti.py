"""One slice of a NIfTI volume as 8-bit RGB, as radiologists look at it.

The axes are those of the volume turned to the nearest anatomical ones (RAS+, nibabel's `as_closest_canonical`): 0 sagittal, 1 coronal, 2 axial,
slices counted from 0 at the left, the back and the feet. Radiological convention: the patient's right is at the picture's left; front (axial) or
head (sagittal, coronal) is up; sagittal slices look to the left. By default the middle axial slice of the first volume (`#axis=`, `#slice=`,
`#volume=`).

Grey from the 0.5th percentile of the slice to the 99.5th is stretched to 0..255, or `#window=CENTRE,WIDTH` is. Pixels that are not square in
millimetres are made square.
"""

from __future__ import annotations

import importlib
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stllava.image_source import HEAD_BYTES
from stllava.images import check_size, grey_to_rgb
from stllava.limits import MAX_MEDICAL_BYTES, MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE

from .choice import Choice, Unreadable, parse_choice, pick, stage

__all__ = ["read", "size"]

nibabel: Any = importlib.import_module("nibabel")  # it has no types

KEYS = ("axis", "slice", "volume", "window")
PERCENTILES = (0.5, 99.5)
MAX_STRETCH = 20.0  # of pixels that are longer than wide; beyond it the spacing is wrong rather than real
PLANES = ("sagittal", "coronal", "axial")
GZIP = 16 + zlib.MAX_WBITS


class _Plane(NamedTuple):
    """Where the slice lies in the stored volume. across, down: stored axes of the picture's width and height."""

    position: int
    axis: int
    across: int
    down: int
    mirrored: tuple[bool, bool]
    width: int
    height: int
    notes: list[str]


def read(data: bytes, chosen: str) -> tuple[NDArray[np.uint8], list[str]]:
    """(rgb, notes). Raises Unreadable; and whatever nibabel raises, to be told in other words."""
    choice = parse_choice(chosen, KEYS)
    header, shape, dtype = _header(data)
    plane, volume, offset = _plane(header, shape, choice), pick(choice.volume, shape[3], "volume"), _offset(header)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    if data[:2] == b"\x1f\x8b":
        data = _inflate(data, offset + n_bytes)
    if len(data) < offset + n_bytes:
        raise Unreadable(f"cut off: {len(data)} bytes, want {offset + n_bytes}")
    voxels = np.ndarray(shape, dtype, buffer=data, offset=offset, order="F")[..., volume]
    stored = voxels.take(plane.position, axis=plane.axis)  # (lower stored axis, higher one)
    rows = stored.T if plane.across < plane.down else stored
    rows = rows[::-1 if plane.mirrored[1] else 1, ::-1 if plane.mirrored[0] else 1]
    notes = list(plane.notes)
    if dtype.names:
        if choice.window is not None:
            raise Unreadable("a window is asked for, but the volume is in colour")
        rgb = np.stack([rows[name] for name in ("R", "G", "B")], axis=-1)
    else:
        rgb = _grey(rows, header, choice, notes)
    if rgb.shape[:2] != (plane.height, plane.width):
        rgb = np.asarray(Image.fromarray(rgb).resize((plane.width, plane.height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(rgb), notes


def size(data: bytes, chosen: str) -> tuple[int, int]:
    """(width, height) of the chosen slice."""
    choice = parse_choice(chosen, KEYS)
    header, shape, _ = _header(data)
    plane = _plane(header, shape, choice)
    return plane.width, plane.height


# ---- the header ------------------------------------------------------------------------------------------------------------------


def _inflate(data: bytes, n_bytes: int) -> bytes:
    """The first `n_bytes` of a gzip stream."""
    stream = zlib.decompressobj(GZIP)
    with stage("its gzip stream is damaged"):
        found = stream.decompress(data, n_bytes)
        if len(found) == n_bytes and not stream.eof:
            stream.decompress(stream.unconsumed_tail, 1 << 16)  # at its end the checksum is tested
    return found


def _header(data: bytes) -> tuple[Any, tuple[int, int, int, int], np.dtype[Any]]:
    """The header without its extensions, which are comments; shape (x, y, z, volumes); type of a voxel."""
    packed = len(data)
    if gzipped := data[:2] == b"\x1f\x8b":
        with stage("its gzip stream is damaged"):
            data = zlib.decompressobj(GZIP).decompress(data[:4096], HEAD_BYTES)
    if data[344:348] == b"ni1\0" or data[4:8] == b"ni2\0":
        raise Unreadable("a header whose voxels are in another file; make it one file, .nii or .nii.gz")
    if data[344:348] != b"n+1\0" and data[4:8] != b"n+2\0":
        raise Unreadable("a gzip stream that holds no NIfTI volume" if gzipped else "no NIfTI volume")
    kind = nibabel.nifti2.Nifti2Header if data[4:8] == b"n+2\0" else nibabel.nifti1.Nifti1Header
    with stage("its header is damaged"):
        header = kind(data[:kind.sizeof_hdr], check=True)
        shape, dtype = [int(n) for n in header.get_data_shape()], header.get_data_dtype()
    if not 2 <= len(shape) <= 7 or min(shape) < 1 or max(shape[4:], default=1) > 1:
        raise Unreadable("its shape is not that of a volume, or of a series of volumes")
    if dtype.kind not in "iuf" and not (dtype.names and dtype.names[:3] == ("R", "G", "B")):
        raise Unreadable("voxels that are neither real numbers nor colours")
    x, y, z, t = [*shape, 1, 1][:4]
    n_bytes = _offset(header) + x * y * z * t * dtype.itemsize
    if n_bytes > MAX_MEDICAL_BYTES:
        raise Unreadable(f"voxels of {n_bytes} bytes, limit {MAX_MEDICAL_BYTES}")
    if n_bytes > max(MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE * packed):
        raise Unreadable(f"voxels of {n_bytes} bytes in a file of {packed}: cut off, or a decompression bomb")
    return header, (x, y, z, t), dtype


def _offset(header: Any) -> int:
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= MAX_MEDICAL_BYTES or offset != int(offset):
        raise Unreadable(f"the voxels begin at byte {offset:g}")
    return int(offset)


def _plane(header: Any, shape: tuple[int, int, int, int], choice: Choice) -> _Plane:
    axes, flipped, notes = [0, 1, 2], [False, False, False], list[str]()
    with stage("its orientation is damaged"):
        turns = nibabel.orientations.io_orientation(header.get_best_affine())
        if np.isfinite(turns).all():
            axes = [int(np.flatnonzero(turns[:, 0] == axis)[0]) for axis in range(3)]
            flipped = [bool(turns[axis, 1] < 0) for axis in axes]
        else:
            notes.append("orientation unknown, axes as they are stored")
        spacing = [float(step) for step in [*header.get_zooms(), 1.0, 1.0][:3]]
    axis = axes[choice.axis]
    number = pick(choice.slice, shape[axis], "slice")
    position = shape[axis] - 1 - number if flipped[choice.axis] else number
    right, up = [other for other in range(3) if other != choice.axis]
    across, down = axes[right], axes[up]
    width, height = shape[across], shape[down]
    ratio = abs(spacing[across] / spacing[down]) if spacing[down] else 0.0
    if 1 / MAX_STRETCH <= ratio <= MAX_STRETCH and not 0.98 < ratio < 1.02:
        notes.append(f"pixels of {spacing[across]:g} x {spacing[down]:g} mm made square")
        width, height = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
    try:
        check_size(width, height)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    notes.insert(0, f"{PLANES[choice.axis]} slice {number} of {shape[axis]}" + (f", volume {choice.volume} of {shape[3]}" if shape[3] > 1 else ""))
    # In RAS+ both axes of the picture run against ours: to the left or the front, and up.
    return _Plane(position, axis, across, down, (not flipped[right], not flipped[up]), width, height, notes)


def _grey(rows: NDArray[Any], header: Any, choice: Choice, notes: list[str]) -> NDArray[np.uint8]:
    with stage("its scale is damaged"):
        slope, intercept = header.get_slope_inter()
    values = rows.astype(np.float64) * (1.0 if slope is None else float(slope)) + (0.0 if intercept is None else float(intercept))
    finite = np.isfinite(values)
    if not finite.any():
        raise Unreadable("no value of the slice is finite")
    if isinstance(choice.window, int):
        raise Unreadable("a NIfTI file has no windows to choose from; want window=CENTRE,WIDTH")
    if choice.window is not None:
        centre, width = choice.window
        low, high = centre - width / 2, centre + width / 2
        notes.append(f"window {centre:g},{width:g}")
    else:
        low, high = (float(end) for end in np.percentile(values[finite], PERCENTILES))
        if low == high:
            low, high = float(values[finite].min()), float(values[finite].max())
        notes.append(f"range {low:g}..{high:g}")
    if not finite.all():
        notes.append("values that are not finite are black")
        values[~finite] = low
    return grey_to_rgb(values, low, high)
