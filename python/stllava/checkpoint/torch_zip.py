"""Reader and writer of torch `.bin` files (zip format) without torch and without pickle.

    NAME/data.pkl     pickle of {tensor name: (storage, offset, size, stride)}, see `torch_pickle`
    NAME/data/KEY     raw bytes of each storage, stored (never compressed)
    NAME/version, NAME/byteorder
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stllava.checkpoint import atomic, torch_pickle
from stllava.checkpoint.tensor_file import MAX_TENSORS, TensorFile, check_name, little_endian, map_file, view
from stllava.errors import FormatError

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

    result = torch_pickle.parse(content("data.pkl", torch_pickle.MAX_PICKLE_BYTES), path, storage)
    if not isinstance(result, dict):
        raise FormatError(f"{path}: holds a {type(result).__name__}, want a dictionary of tensors", path=path)
    for name, value in result.items():
        check_name(name, path)
        if not isinstance(value, np.ndarray):
            raise FormatError(f"{path}: {name!r} is a {type(value).__name__}, want a tensor", path=path, field=name)
    return TensorFile(path, result)


def _stored_entries(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Entry name -> (offset, size) of its bytes, from the central directory, checked against the local headers."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: damaged or truncated zip archive: {error}", path=path) from error
    if len(infos) > MAX_TENSORS:
        raise FormatError(f"{path}: {len(infos)} entries in the archive, limit {MAX_TENSORS}", path=path)
    entries: dict[str, tuple[int, int]] = {}
    free = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name, start = info.filename, info.header_offset
        header = buffer[start:start + 30]
        begin = start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        if name in entries:
            raise FormatError(f"{path}: two entries named {name!r}", path=path, field=name)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise FormatError(f"{path}: entry {name!r} is compressed or encrypted; torch stores them plain", path=path, field=name)
        if header[:4] != b"PK\x03\x04" or start < free or begin + info.file_size > len(buffer):
            raise FormatError(f"{path}: entry {name!r} overlaps another one or lies outside the file", path=path, field=name)
        free = begin + info.file_size
        entries[name] = (begin, info.file_size)
    return entries


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dictionary of tensors (uint16 = bf16) atomically, so that `torch.load(weights_only=True)` reads it.

    One storage per tensor: arrays that share memory are written twice. Equal input gives equal bytes.
    """
    path = Path(path)
    root = path.stem
    for name in tensors:
        check_name(name, path)
    with atomic.writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
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
    header_end = archive.fp.tell() + 30 + len(name.encode()) + 4 + 20 * zip64
    padding = -header_end % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as entry:
        entry.write(data)
