"""What a compressed frame says of itself, before a decoder takes memory for it."""

from __future__ import annotations

import pydicom
from pydicom.encaps import get_frame
from pydicom.uid import JPEGLSTransferSyntaxes

from stllava.limits import MAX_JPEG_SCANS

from .choice import Unreadable

__all__ = ["check_codestream", "codestream_size"]

_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG markers without a segment
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}  # JPEG and JPEG-LS frame headers


def check_codestream(ds: pydicom.Dataset, frame: int, n_frames: int) -> None:
    """Raises Unreadable: a frame of another size than the header's, whose decoder would take that much memory, or a costly one."""
    offsets = (ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in ds else None
    data = get_frame(ds.PixelData, frame, number_of_frames=n_frames, extended_offsets=offsets)
    size = codestream_size(data)
    if size is None and data[:2] in (b"\xff\xd8", b"\xff\x4f"):
        raise Unreadable("a compressed frame that does not say its size")
    if size is not None and size != (ds.Columns, ds.Rows):
        raise Unreadable(f"a compressed frame of {size[0]}x{size[1]} pixels, the header says {int(ds.Columns)}x{int(ds.Rows)}")
    if data.startswith(b"\xff\xd8"):
        if (n := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
            raise Unreadable(f"{n} scans of a JPEG, limit {MAX_JPEG_SCANS}")
        # CharLS looks for a missing end mark for seconds.
        if ds.file_meta.TransferSyntaxUID in JPEGLSTransferSyntaxes and not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise Unreadable("a compressed frame without its end mark: cut off")


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, JPEG-LS or JPEG 2000 codestream; None: another one, or damaged."""
    if data.startswith(b"\xff\x4f\xff\x51") and len(data) >= 24:
        right, bottom, left, top = (int.from_bytes(data[at:at + 4]) for at in range(8, 24, 4))
        return right - left, bottom - top
    at = 2
    while data.startswith(b"\xff\xd8") and at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            return int.from_bytes(data[at + 7:at + 9]), int.from_bytes(data[at + 5:at + 7])
        at += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + int.from_bytes(data[at + 2:at + 4])
    return None
