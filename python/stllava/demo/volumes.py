"""Decodes the source files into arrays: the MNI152 head, an EPI series and six 2-D pictures.

World coordinates are millimetres, x to the right, y to the front, z up (RAS), from the affine in the NIfTI header.
"""

from __future__ import annotations

import gzip
import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .sources import Sources, import_pydicom

__all__ = ["Pictures", "Volume", "fluid", "load", "read_nifti", "t2_like"]


@dataclass(frozen=True, slots=True)
class Volume:
    """`data` (X,Y,Z) or (X,Y,Z,T) as stored; `affine` (3,4) maps voxel indices to RAS millimetres."""

    data: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True, slots=True)
class Pictures:
    """All decoded sources. Volumes are uint8 0..255; 2-D pictures are uint8 grey (H,W) or RGB (H,W,3)."""

    mni: dict[str, np.ndarray]  # "T1", "GM", "WM", each (197,233,189); T1 is 0 outside the brain
    mni_origin: np.ndarray  # RAS mm of voxel (0,0,0); voxels are 1 mm and axis-aligned
    epi: np.ndarray  # (X,Y,Z,T)
    epi_spacing_mm: tuple[float, float, float]
    flat: dict[str, np.ndarray]  # "retina", "ihc", "cell", "ct", "abdomen", "doppler"
    echo: np.ndarray  # (30,H,W)


def load(sources: Sources) -> Pictures:
    """Reads and decodes every source file (about one second, half of it for importing pydicom)."""
    t1, gm, wm = (read_nifti(sources.read(name), name) for name in ("mni_t1", "mni_gm", "mni_wm"))
    if not np.array_equal(t1.affine[:, :3], np.eye(3)):
        raise ValueError(f"mni_t1: affine {t1.affine.tolist()}, expected 1 mm axis-aligned voxels")
    epi = read_nifti(sources.read("epi"), "epi")
    x_mm, y_mm, z_mm = np.linalg.norm(epi.affine[:, :3], axis=0).tolist()
    return Pictures(
        mni={"T1": t1.data, "GM": gm.data, "WM": wm.data},
        mni_origin=t1.affine[:, 3],
        epi=_window(epi.data, 1.0, 99.8),
        epi_spacing_mm=(x_mm, y_mm, z_mm),
        flat=_flat_pictures(sources),
        # Columns and rows of the ultrasound sector; the rest of the frame is text and controls.
        # The stored colours are luminance and two chroma channels; echo is grey, so only luminance is kept.
        echo=_window(_dicom(sources, "echo", raw=True)[:, 26:194, 58:226, 0], 1.0, 99.5),
    )


def read_nifti(raw: bytes, name: str) -> Volume:
    """Reads a NIfTI-1 single file (.nii or .nii.gz), little-endian, integer voxels without scaling, with an sform.

    Only what the pinned demo files use is supported; everything else is a ValueError that names the file and field. The package's
    extra `nibabel` reads arbitrary files. Source: NIfTI-1 header layout, nifti1.h.
    """
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 352 or struct.unpack_from("<i", raw, 0)[0] != 348 or raw[344:347] != b"n+1":
        raise ValueError(f"{name}: not a little-endian NIfTI-1 single file")
    n_axes, *shape = struct.unpack_from("<8h", raw, 40)
    if not 1 <= n_axes <= 7 or min(shape[:n_axes]) < 1:
        raise ValueError(f"{name}: dim {[n_axes, *shape]}, expected 1 to 7 axes of positive length")
    shape = shape[:n_axes]
    (code,) = struct.unpack_from("<h", raw, 70)
    offset, slope, intercept = struct.unpack_from("<3f", raw, 108)
    dtypes: dict[int, np.dtype[Any]] = {2: np.dtype("u1"), 4: np.dtype("<i2")}
    dtype = dtypes.get(code)
    if dtype is None or (slope, intercept) not in ((1.0, 0.0), (0.0, 0.0)):
        raise ValueError(f"{name}: datatype {code}, slope {slope}, intercept {intercept}; expected uint8 or int16 without scaling")
    if struct.unpack_from("<h", raw, 254)[0] <= 0:
        raise ValueError(f"{name}: sform_code is 0, the file has no affine")
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    if len(raw) < int(offset) + n_bytes:
        raise ValueError(f"{name}: {len(raw)} bytes, expected {int(offset) + n_bytes}")
    data = np.frombuffer(raw, dtype, count=n_bytes // dtype.itemsize, offset=int(offset)).reshape(shape, order="F")
    affine = np.frombuffer(raw, "<f4", count=12, offset=280).reshape(3, 4).astype(np.float64)
    return Volume(data, affine)


def _flat_pictures(sources: Sources) -> dict[str, np.ndarray]:
    retina = Image.open(io.BytesIO(sources.read("retina"))).convert("RGB").reduce(3)
    return {
        "retina": np.asarray(retina),
        "ihc": np.asarray(Image.open(io.BytesIO(sources.read("ihc"))).convert("RGB")),
        "cell": np.asarray(Image.open(io.BytesIO(sources.read("cell"))).convert("L")),
        "ct": _window(_dicom(sources, "ct"), 0.5, 99.5),
        "abdomen": _window(_dicom(sources, "abdomen"), 0.5, 99.5),
        # The frame carries burned-in text with a hospital's name above and colour bars at the sides: only tissue is kept.
        "doppler": _dicom(sources, "doppler")[54:158, 24:284],
    }


def _dicom(sources: Sources, name: str, *, raw: bool = False) -> np.ndarray:
    """Pixels of a DICOM file; `raw` leaves the colour space as stored."""
    pixels = import_pydicom(sources, "pydicom.pixels")
    array: np.ndarray = pixels.pixel_array(io.BytesIO(sources.read(name)), raw=raw)
    return array


def _window(values: np.ndarray, low_percent: float, high_percent: float) -> np.ndarray:
    """Maps the given percentiles to 0 and 255."""
    low, high = np.percentile(values, [low_percent, high_percent])
    window: np.ndarray = np.clip((values - low) / (high - low), 0, 1) * 255
    return window.astype(np.uint8)


def fluid(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """Share of cerebrospinal fluid, uint16 0..255: what is neither grey nor white matter inside the (skull-stripped) brain."""
    tissue = np.minimum(255, gm.astype(np.uint16) + wm)
    share: np.ndarray = (255 - tissue) * (t1 > 0)
    return share


def t2_like(t1: np.ndarray, gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """A T2 picture, uint8, synthesised from the tissue maps, since the template has none.

    It has the usual T2 order of brightness: fluid brightest, grey matter in the middle, white matter dark.
    """
    # The three shares add up to 255, so the sum stays below 2^16.
    bright = 243 * fluid(t1, gm, wm) + (t1 > 0) * (141 * gm.astype(np.uint16) + 82 * wm.astype(np.uint16))
    return (bright >> 8).astype(np.uint8)
