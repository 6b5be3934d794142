"""Reader and writer of torch `.bin` files (zip format) without torch and without pickle.

    NAME/data.pkl     protocol-2 pickle: {tensor name: _rebuild_tensor_v2(storage, offset, size, stride, ...)}
    NAME/data/KEY     raw bytes of each storage, stored (never compressed)
    NAME/version, NAME/byteorder

A pickle is a program. `_Program` below runs only the thirty opcodes that such a file needs, knows three kinds of names
(OrderedDict, _rebuild_tensor_v2, the storage classes), and calls nothing: every "call" is one of three constructions written
here. There is no fall-back to a real unpickler.
"""

from __future__ import annotations

import math
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint import atomic
from stllava.checkpoint.tensor_file import (MAX_RANK, MAX_TENSORS, NUMPY_DTYPES, TensorFile, check_name, dtype_name,
                                            little_endian, map_file, view)
from stllava.errors import FormatError

MAX_PICKLE_BYTES = 64 * 2**20
_ALIGNMENT = 64  # of every storage in the file, as torch writes it
_STORAGES = {"f64": "DoubleStorage", "f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage",
             "i64": "LongStorage", "i32": "IntStorage", "i16": "ShortStorage", "i8": "CharStorage", "u8": "ByteStorage",
             "bool": "BoolStorage"}
_DTYPE_OF_STORAGE = {f"torch {storage}": name for name, storage in _STORAGES.items()}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"


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

    result = _Program(content("data.pkl", MAX_PICKLE_BYTES), path, storage).run()
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


@dataclass(frozen=True)
class _Global:
    """A name of the pickle, e.g. 'torch FloatStorage': never looked up, only compared."""

    name: str


_MARK = object()


class _Program:
    """Interpreter for the opcodes that a dictionary of tensors needs; anything else is a FormatError.

    Work and memory are bounded by the pickle's length: each opcode pushes at most one object, nothing is copied or
    compared recursively, dictionary keys must be strings, and messages never print a nested object (a memo can build one
    that is exponentially larger than the file).
    """

    def __init__(self, code: bytes, path: Path, storage: Callable[[str, np.dtype, int], np.ndarray]) -> None:
        self._code, self._path, self._storage = code, path, storage
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            while True:
                opcode = self._take(1)
                if opcode == b".":
                    break
                step = _OPCODES.get(opcode)
                if step is None:
                    raise self._fail(f"opcode {opcode!r} is not allowed")
                step(self)
            if len(self._stack) != 1:
                raise self._fail(f"{len(self._stack)} objects left at the end, want 1")
            return self._stack[0]
        except (IndexError, KeyError, UnicodeDecodeError) as error:
            raise self._fail(f"malformed: {type(error).__name__} {error}") from error

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: data.pkl, byte {self._at}: {what}. Only dictionaries of tensors are read; "
                           "a pickle is never run", path=self._path, field="data.pkl")

    def _take(self, count: int) -> bytes:
        data = self._code[self._at:self._at + count]
        if len(data) != count:
            raise self._fail("ends too early")
        self._at += count
        return data

    def _uint(self, n_bytes: int) -> int:
        return int.from_bytes(self._take(n_bytes), "little")

    def _line(self) -> str:
        end = self._code.find(b"\n", self._at, self._at + 256)
        if end < 0:
            raise self._fail("name without an end")
        line = self._code[self._at:end].decode("ascii")
        self._at = end + 1
        return line

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise self._fail("mark where a value is wanted")
        return value

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _protocol(self) -> None:
        if (version := self._uint(1)) != 2:
            raise self._fail(f"pickle protocol {version}, want 2")

    def _global(self) -> None:
        name = f"{self._line()} {self._line()}"
        if name not in (_ORDERED_DICT, _REBUILD) and name not in _DTYPE_OF_STORAGE:
            raise self._fail(f"name {name!r} is not allowed")
        self._stack.append(_Global(name))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._uint(1)), "little", signed=True))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self._fail("items set on something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise self._fail(f"key of type {type(key).__name__}, want a string")
            if key in target:
                raise self._fail(f"duplicate key {key!r}")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _build(self) -> None:
        """A module's state_dict carries its version table as an attribute (`_metadata`); weights do not depend on it."""
        state = self._pop()
        if not isinstance(state, dict) or not isinstance(self._stack[-1], dict):
            raise self._fail("state set on something that is not a dictionary")

    def _persistent(self) -> None:
        """('storage', storage class, key, device, count) -> flat array."""
        match self._pop():
            case ("storage", _Global(name), str(key), str(_), int(count)) if name in _DTYPE_OF_STORAGE and count >= 0:
                self._stack.append(self._storage(key, NUMPY_DTYPES[_DTYPE_OF_STORAGE[name]], count))
            case other:
                raise self._fail(f"persistent object of type {type(other).__name__} is not a storage")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise self._fail("call of something that is not a name")
        if function.name == _ORDERED_DICT and arguments == ():
            self._stack.append({})
        elif function.name == _REBUILD:
            self._stack.append(self._tensor(arguments))
        else:
            raise self._fail(f"call of {function.name!r} is not allowed")

    def _tensor(self, arguments: tuple[Any, ...]) -> np.ndarray:
        """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) -> view on the storage."""
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], np.ndarray):
            raise self._fail("tensor with unknown arguments")
        storage, offset, size, stride = arguments[:4]
        if not (_is_sizes(size) and _is_sizes(stride) and _is_sizes((offset,)) and len(size) == len(stride) <= MAX_RANK):
            raise self._fail(f"tensor whose size, stride or offset is not made of non-negative integers, rank at most {MAX_RANK}")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if last >= storage.size or count > storage.size:
            raise self._fail(f"tensor of size {size} at {offset} does not fit its storage of {storage.size} values")
        byte_strides = tuple(step * storage.itemsize for step in stride)
        return np.lib.stride_tricks.as_strided(storage[offset:], size, byte_strides, writeable=False)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and 0 <= item < 2**63 for item in value)


_OPCODES: dict[bytes, Callable[[_Program], None]] = {
    b"\x80": _Program._protocol,
    b"}": lambda p: p._stack.append({}),
    b"(": lambda p: p._stack.append(_MARK),
    b")": lambda p: p._stack.append(()),
    b"N": lambda p: p._stack.append(None),
    b"\x88": lambda p: p._stack.append(True),
    b"\x89": lambda p: p._stack.append(False),
    b"K": lambda p: p._stack.append(p._uint(1)),
    b"M": lambda p: p._stack.append(p._uint(2)),
    b"J": lambda p: p._stack.append(int.from_bytes(p._take(4), "little", signed=True)),
    b"\x8a": _Program._long1,
    b"X": lambda p: p._stack.append(p._take(p._uint(4)).decode("utf-8")),
    b"t": lambda p: p._tuple(p._pop_to_mark()),
    b"\x85": lambda p: p._tuple([p._pop()]),
    b"\x86": lambda p: p._tuple([p._pop(), p._pop()][::-1]),
    b"\x87": lambda p: p._tuple([p._pop(), p._pop(), p._pop()][::-1]),
    b"c": _Program._global,
    b"Q": _Program._persistent,
    b"R": _Program._reduce,
    b"b": _Program._build,
    b"s": _Program._set_item,
    b"u": lambda p: p._set_items(p._pop_to_mark()),
    b"q": lambda p: p._put(p._uint(1)),
    b"r": lambda p: p._put(p._uint(4)),
    b"h": lambda p: p._stack.append(p._memo[p._uint(1)]),
    b"j": lambda p: p._stack.append(p._memo[p._uint(4)]),
}


def save(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a dictionary of tensors (uint16 = bf16) atomically, so that `torch.load(weights_only=True)` reads it.

    One storage per tensor: arrays that share memory are written twice. Equal input gives equal bytes.
    """
    path = Path(path)
    root = path.stem
    with atomic.writing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{root}/data.pkl", _pickle(tensors, path))
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


def _pickle(tensors: Mapping[str, np.ndarray], path: Path) -> bytes:
    code = bytearray(b"\x80\x02}(")
    for key, (name, array) in enumerate(tensors.items()):
        storage = _STORAGES[dtype_name(array)]
        strides = [math.prod(array.shape[axis + 1:]) for axis in range(array.ndim)]
        code += _text(check_name(name, path)) + f"c{_REBUILD.replace(' ', chr(10))}\n((".encode()
        code += _text("storage") + f"ctorch\n{storage}\n".encode() + _text(str(key)) + _text("cpu") + _integer(array.size)
        code += b"tQ" + _integer(0) + b"(" + b"".join(map(_integer, array.shape)) + b"t"
        code += b"(" + b"".join(map(_integer, strides)) + b"t"
        code += b"\x89" + f"c{_ORDERED_DICT.replace(' ', chr(10))}\n".encode() + b")RtR"
    return bytes(code + b"u.")


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + len(data).to_bytes(4, "little") + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    return b"\x8a\x08" + value.to_bytes(8, "little")
