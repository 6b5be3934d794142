"""Reader and writer of torch `.bin` files (zip format) without torch and without pickle.

    NAME/data.pkl     pickle of {tensor name: (storage, offset, size, stride)}, see `torch_pickle`
    NAME/data/KEY     raw bytes of each storage, stored (never compressed)
    NAME/version, NAME/byteorder
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stllava.checkpoint import atomic, torch_pickle
from stllava.checkpoint.tensor_file import Tensor, TensorFile, check_name, little_endian, map_file, view
from stllava.errors import FormatError
from stllava.limits import MAX_PICKLE_BYTES, MAX_TENSORS

# Records of the zip format (APPNOTE.TXT 4.3). zipfile reads the whole directory before one can say no, so reading is done here.
_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENCRYPTED = 1
# Room in the pickle for each entry of the archive: a name of 512 bytes, and some 300 to describe a tensor. A pickle that is much larger is a bomb.
_PICKLE_BYTES_PER_ENTRY = 2048
_PICKLE_BYTES = 65536

_ALIGNMENT = 64  # of every storage in the file, as torch writes it


def load(path: str | os.PathLike[str]) -> TensorFile:
    """Map a torch zip file that holds one dictionary of tensors: name -> read-only array, bf16 as uint16 bits.

    Raises FormatError for every other content: the pre-1.6 format, other objects, unknown opcodes, damaged archives.
    """
    path = Path(path)
    buffer = map_file(path)
    if buffer[:4] != b"PK\x03\x04":
        raise FormatError(f"{path}: not a torch zip file (starts with {buffer[:4]!r}). Files written before torch 1.6 are bare "
                          "pickles, which are never run: re-save as safetensors", path=path)
    entries = _stored_entries(path, buffer)
    roots = {name.partition("/")[0] for name in entries}
    if len(roots) != 1:
        raise FormatError(f"{path}: want one top folder in the archive, found {sorted(roots)[:4]}", path=path)
    root = roots.pop()

    def content(name: str, limit: int) -> bytes:
        if f"{root}/{name}" not in entries:
            raise FormatError(f"{path}: the archive has no {root}/{name}; not a torch checkpoint", path=path, field=name)
        offset, size = entries[f"{root}/{name}"]
        if size > limit:
            raise FormatError(f"{path}: {root}/{name} has {size} bytes, limit {limit}", path=path, field=name)
        return buffer[offset:offset + size]

    if f"{root}/byteorder" in entries and content("byteorder", 16) != b"little":
        raise FormatError(f"{path}: byte order {content('byteorder', 16)!r}; only little-endian files are supported", path=path)

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if f"{root}/data/{key}" not in entries:
            raise FormatError(f"{path}: the archive has no storage {root}/data/{key}", path=path, field=key)
        offset, size = entries[f"{root}/data/{key}"]
        if size != count * dtype.itemsize:
            raise FormatError(f"{path}: storage {key} has {size} bytes, want {count} values of {dtype.itemsize}", path=path,
                              field=key)
        return view(buffer, dtype, (count,), offset)

    limit = min(MAX_PICKLE_BYTES, _PICKLE_BYTES + _PICKLE_BYTES_PER_ENTRY * len(entries))
    result = torch_pickle.parse(content("data.pkl", limit), path, storage)
    if not isinstance(result, dict):
        raise FormatError(f"{path}: holds a {type(result).__name__}, want a dictionary of tensors", path=path)
    for name, value in result.items():
        check_name(name, path)
        if not isinstance(value, np.ndarray):
            raise FormatError(f"{path}: {name!r} is a {type(value).__name__}, want a tensor", path=path, field=name)
    return TensorFile(path, result)


def _stored_entries(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Entry name -> (offset, size) of its bytes. Every byte of the central directory is accounted for, and agrees with the local headers."""
    def fail(what: str) -> FormatError:
        return FormatError(f"{path}: damaged, truncated or hostile zip archive: {what}", path=path)

    try:
        at, end, n_entries = _central_directory(buffer)
        if n_entries > MAX_TENSORS:
            raise fail(f"{n_entries} entries, limit {MAX_TENSORS}")
        entries: dict[str, tuple[int, int]] = {}
        places = []
        for _ in range(n_entries):
            (signature, _, _, flags, method, _, _, _, stored, size, n_name, n_extra, n_comment, _, _, _,
             start) = _ENTRY.unpack_from(buffer, at)
            name_at, at = at + _ENTRY.size, at + _ENTRY.size + n_name + n_extra + n_comment
            if signature != b"PK\x01\x02" or at > end:
                raise fail(f"{n_entries} entries are announced, {len(entries)} are there")
            raw_name = buffer[name_at:name_at + n_name]
            size, stored, start = _wide(buffer[name_at + n_name:name_at + n_name + n_extra], size, stored, start)
            name = raw_name.decode("utf-8")
            if method != zipfile.ZIP_STORED or stored != size or flags & _ENCRYPTED:
                raise fail(f"entry {name[:80]!r} is compressed or encrypted; torch stores them plain")
            if start + size > end:
                raise fail(f"entry {name[:80]!r} lies outside the file")
            if name in entries:
                raise fail(f"two entries named {name[:80]!r}")
            local, _, _, _, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack_from(buffer, start)
            begin = start + _LOCAL.size + n_name + n_extra
            if local != b"PK\x03\x04" or buffer[start + _LOCAL.size:start + _LOCAL.size + n_name] != raw_name:
                raise fail(f"no entry {name[:80]!r} at byte {start}, where the directory says it is")
            entries[name] = (begin, size)
            places.append((start, begin + size, name))
    except (struct.error, UnicodeDecodeError) as error:
        raise fail(str(error)) from error
    if at != end:
        raise fail(f"{end - at} bytes in the directory behind its last entry")
    places.sort()
    for (_, free, name), (start, _, other) in zip(places, [*places[1:], (end, end, "the directory")], strict=True):
        if free > start:
            raise fail(f"entry {name[:80]!r} overlaps {other[:80]!r}")
    return entries


def _central_directory(buffer: mmap.mmap) -> tuple[int, int, int]:
    """(begin, end, number of entries) of the directory: it must end where the end records begin, and they where the file ends."""
    end = len(buffer) - _END.size
    if end < 0 or buffer[end:end + 4] != b"PK\x05\x06":
        raise struct.error("no end record; the copy or download was interrupted")
    _, _, _, _, n_entries, size, begin, n_comment = _END.unpack_from(buffer, end)
    locator = end - _LOCATOR.size
    if locator >= _END64.size and buffer[locator:locator + 4] == b"PK\x06\x07":
        end = locator - _END64.size
        signature, _, _, _, _, _, _, n_entries, size, begin = _END64.unpack_from(buffer, end)
        if signature != b"PK\x06\x06" or _LOCATOR.unpack_from(buffer, locator)[2] != end:
            raise struct.error("no 64-bit end record where its locator says it is")
    if begin + size != end or n_comment:
        raise struct.error(f"a directory of {size} bytes at byte {begin}, want one that ends at byte {end}")
    return begin, end, n_entries


def _wide(extra: bytes, *values: int) -> list[int]:
    """`values` (size, stored size, offset), with those that do not fit 32 bits taken from the zip64 field of `extra`."""
    if 2**32 - 1 not in values:
        return list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{n // 8}Q", extra, at + 4))
            return [value if value != 2**32 - 1 else next(wide, value) for value in values]
        at += 4 + n
    return list(values)


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write a dictionary of tensors (uint16 = bf16) atomically, so that `torch.load(weights_only=True)` reads it.

    One storage per tensor: arrays that share memory are written twice. Equal input gives equal bytes.
    """
    path = Path(path)
    root = path.stem
    for name in tensors:
        check_name(name, path)
    with (atomic.writing(path, n_bytes=sum(array.nbytes for array in tensors.values())) as file,
          zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive):  # type: ignore[call-overload]  # typeshed asks for close(), never called
        _add(archive, f"{root}/data.pkl", torch_pickle.dump(tensors))
        _add(archive, f"{root}/byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            _add(archive, f"{root}/data/{key}", little_endian(array).reshape(-1).view(np.uint8).data)
        _add(archive, f"{root}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Append an entry whose data starts on a multiple of _ALIGNMENT, padded by an extra field as torch does it."""
    n_bytes = len(data)
    info = zipfile.ZipInfo(name)  # its default date keeps files reproducible
    info.file_size = n_bytes
    zip64 = n_bytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile then adds 20 bytes of its own to the header
    assert archive.fp is not None  # it is open
    header_end = archive.fp.tell() + 30 + len(name.encode()) + 4 + 20 * zip64
    padding = -header_end % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as entry:
        entry.write(data)
