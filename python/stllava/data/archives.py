"""Zip and tar archives as folders of pictures: indexed once, then any member by its place, from any thread, without unpacking.

A member is read with `pread`, so threads and forked processes share nothing. Zip members are stored or deflated. A compressed tar has no places to
read from, so it is unpacked once into a temporary file without a name, which is gone when the process is.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stllava.errors import FormatError
from stllava.image_source import shown_name
from stllava.limits import MAX_MEMBERS, MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE

__all__ = ["Archive", "is_archive"]

_BLOCK = 1 << 20
_PLAIN_NAMES = (".zip", ".tar")
_PACKED: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ\0", lzma.open), (b"BZh", bz2.open))
_NAMES = (*_PLAIN_NAMES, ".tgz", ".tar.gz", ".txz", ".tar.xz", ".tbz2", ".tbz", ".tar.bz2")
_LOCAL = struct.Struct("<4s5H3L2H")  # the header in front of a zip member, APPNOTE.TXT 4.3.7
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeError, ValueError,
            OverflowError, IndexError)


def is_archive(path: str | os.PathLike[str]) -> bool:
    """By its name."""
    return os.fspath(path).lower().endswith(_NAMES)


@dataclass(frozen=True, slots=True)
class _Member:
    """`offset`: of the bytes, in a zip of the header in front of them. refused: why it is never read."""

    offset: int
    packed: int
    size: int
    crc: int | None = None
    deflated: bool = False
    refused: str = ""


class Archive:
    """The regular files of one archive.

    Members with absolute names or ".." are not there. Links, devices, sparse and encrypted members, unknown compressions and names that stand twice
    are refused when they are asked for, so that one of them does not cost the rest.

    Raises FormatError: damaged, over the limits, or no archive; OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._members: dict[str, _Member] = {}
        self._file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._file)
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise FormatError(f"{self.path}: not a regular file", path=self.path)
        head = os.pread(self._file, 8, 0)
        try:
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                self._index_zip()
            else:
                self._index_tar(head)
        except FormatError:
            raise
        except OSError as error:
            if error.errno is not None:  # the system's, not a reader's about the content (gzip.BadGzipFile)
                raise
            raise self._fail(str(error)) from error
        except _DAMAGED as error:
            raise self._fail(str(error) or type(error).__name__) from error

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: not a readable zip or tar archive: {what}", path=self.path)

    def names(self) -> list[str]:
        """Members that can be read."""
        return sorted(name for name, member in self._members.items() if not member.refused)

    def __contains__(self, name: object) -> bool:
        return name in self._members and not self._members[str(name)].refused

    def read(self, name: str, limit: Callable[[bytes], int]) -> bytes:
        """Content of a member; `limit` says from its first bytes how many it may have. Raises FormatError; OSError."""
        member = self._members.get(name)
        if member is None:
            raise FormatError(f"{self.path}: no member {name[:200]!r}{self._hint(name)}", path=self.path)
        if member.refused:
            raise FormatError(f"{self.path}: member {name[:200]!r} is {member.refused}", path=self.path)

        def fail(what: str) -> FormatError:
            return FormatError(f"{self.path}: member {name[:200]!r}: {what}", path=self.path)

        if member.size > max(MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE * member.packed):
            raise fail(f"{member.size} bytes out of {member.packed}: a decompression bomb")
        try:
            at = member.offset if member.crc is None else self._behind_header(member.offset, fail)
            start = os.pread(self._file, min(member.packed, 4096), at)
            head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, 1024) if member.deflated else start
            if member.size > limit(head):
                raise fail(f"{member.size} bytes, limit {limit(head)}")
            data = self._pread(at, member.packed)
            if member.deflated:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
        except (zlib.error, OverflowError) as error:
            raise fail(f"damaged: {error}") from error
        if len(data) != member.size:
            raise fail(f"damaged: {len(data)} bytes, {member.size} are announced")
        if member.crc is not None and zlib.crc32(data) != member.crc:
            raise fail("damaged: its checksum is wrong")
        return data

    def _pread(self, at: int, n_bytes: int) -> bytes:
        """What is there of `n_bytes`; one call of the system gives at most 2 GB."""
        parts = []
        while n_bytes > 0 and (part := os.pread(self._file, n_bytes, at)):
            parts.append(part)
            at, n_bytes = at + len(part), n_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _behind_header(self, at: int, fail: Callable[[str], FormatError]) -> int:
        header = os.pread(self._file, _LOCAL.size, at)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise fail("damaged: it is not where the directory says")
        *_, n_name, n_extra = _LOCAL.unpack(header)
        return at + _LOCAL.size + int(n_name) + int(n_extra)

    def _hint(self, name: str) -> str:
        """Archives often have one more folder around everything than the data file knows, or one less."""
        parts = PurePosixPath(name)
        for other in self._members:
            if other.endswith("/" + name) or (parts.name and name.endswith("/" + other)):
                return f"; it has {shown_name(other[:200])!r}"
        return f", among {len(self._members)}"

    def _add(self, name: str, member: _Member) -> None:
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            return
        name = str(path)
        if name in self._members:
            member = _Member(0, 0, 0, refused="there twice")
        self._members[name] = member
        self._check_number(len(self._members))

    def _check_number(self, n: int) -> None:
        if n > MAX_MEMBERS:
            raise self._fail(f"more than {MAX_MEMBERS} members")

    # ---- zip -----------------------------------------------------------------------------------------------------------------

    def _index_zip(self) -> None:
        # zipfile reads the whole directory before one can say no, hence the look at its announcement first.
        with open(os.dup(self._file), "rb") as file:
            size = file.seek(0, io.SEEK_END)
            end: Any = getattr(zipfile, "_EndRecData")(file)  # noqa: B009 - private, and typeshed does not know it
            if end is None:
                raise self._fail("no directory at its end; the copy or download was interrupted")
            self._check_number(end[4])
            if end[5] > 4096 * max(end[4], 1) or end[5] > size:
                raise self._fail(f"a directory of {end[5]} bytes for {end[4]} members")
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        self._add(info.filename, self._zip_member(info, size))

    @staticmethod
    def _zip_member(info: zipfile.ZipInfo, size: int) -> _Member:
        kind = stat.S_IFMT(info.external_attr >> 16)
        refused = ("encrypted" if info.flag_bits & 0x41 else
                   "a link, a device or the like" if kind not in (0, stat.S_IFREG) else
                   f"compressed by method {info.compress_type}; only stored and deflated members are read"
                   if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else
                   "outside the file" if not 0 <= info.header_offset <= size or info.compress_size > size else "")
        return _Member(info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type == zipfile.ZIP_DEFLATED, refused)

    # ---- tar -----------------------------------------------------------------------------------------------------------------

    def _index_tar(self, head: bytes) -> None:
        for signature, opened in _PACKED:
            if head.startswith(signature):
                self._unpack(opened)
        with open(os.dup(self._file), "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=_Guarded(file), mode="r:") as archive:
                kept: list[tarfile.TarInfo] = vars(archive)["members"]  # it would keep every one
                while (info := archive.next()) is not None:
                    kept.clear()
                    if not info.isdir():
                        self._add(info.name, _Member(info.offset_data, info.size, info.size,
                                                     refused="" if info.isreg() and not info.issparse() else "a link, a device or sparse"))
                if os.pread(self._file, tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):  # there tarfile takes a damaged header for the end
                    raise self._fail(f"damaged at byte {archive.offset} of {size}")

    def _unpack(self, opened: Any) -> None:
        """Into a file without a name in the directory for temporary files, readable for nobody else."""
        limit = min(MAX_UNPACKED_BYTES, max(MAX_PLAIN_UNPACKED_BYTES, MAX_UNPACKED_PER_BYTE * os.fstat(self._file).st_size))
        with open(os.dup(self._file), "rb") as packed, opened(packed) as content, tempfile.TemporaryFile() as out:
            packed.seek(0)
            written = 0
            while block := content.read(_BLOCK):
                written += len(block)
                if written > limit:
                    raise self._fail(f"it unpacks to more than {limit} bytes; use a zip or a tar that is not compressed")
                out.write(block)
            out.flush()
            self._file = os.dup(out.fileno())
        self._close()
        self._close = weakref.finalize(self, os.close, self._file)


class _Guarded(io.RawIOBase):
    """A file of which `tarfile` never gets more at once than a header can need."""

    MOST = 1 << 20

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, n: int = -1, /) -> bytes:
        if not 0 <= n <= self.MOST:
            raise tarfile.ReadError(f"a header of {n} bytes")
        return self._file.read(n)

    def seek(self, at: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(at, whence)

    def tell(self) -> int:
        return self._file.tell()
