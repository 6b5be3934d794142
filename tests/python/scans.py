"""Medical files and archives for tests, made here, and the real ones that pydicom and nibabel bring."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage


def dataset(pixels: np.ndarray | None = None, *, frames: int = 1, rows: int = 4, columns: int = 6, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Dataset:
    """A data set of `pixels`, (frames, rows, columns) or (frames, rows, columns, 3), by default a ramp of int16. tags: keywords and their values; None: left out."""
    if pixels is None:
        pixels = np.arange(frames * rows * columns, dtype=np.int16).reshape(frames, rows, columns)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    bits = 8 * pixels.dtype.itemsize
    n_frames, ds.Rows, ds.Columns = pixels.shape[:3]
    ds.SamplesPerPixel = 1 if pixels.ndim == 3 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 3 else "RGB"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits, bits - 1, int(pixels.dtype.kind == "i")
    if n_frames > 1:
        ds.NumberOfFrames = n_frames
    if pixels.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def encoded(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom(pixels: np.ndarray | None = None, **options: Any) -> bytes:
    return encoded(dataset(pixels, **options))


def deflated(file: bytes) -> bytes:
    """The same file in the deflated transfer syntax."""
    ds = pydicom.dcmread(io.BytesIO(file))
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    whole = encoded(ds)
    assert zlib.decompressobj(-15).decompress(whole[144 + int.from_bytes(whole[140:144], "little"):])
    return whole


def nifti(volume: np.ndarray, affine: np.ndarray | None = None, *, gzipped: bool = False, two: bool = False, slope: float | None = None, intercept: float = 0.0) -> bytes:
    import nibabel
    kind = nibabel.Nifti2Image if two else nibabel.Nifti1Image
    image = kind(volume, np.eye(4) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    data = image.to_bytes()
    return gzip.compress(data, mtime=0) if gzipped else data


def write_zip(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


SECONDARY_CAPTURE = SecondaryCaptureImageStorage
