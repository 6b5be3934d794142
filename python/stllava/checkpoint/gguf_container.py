"""One .gguf file: typed metadata and tensors, whatever they mean. Reader and writer.

    "GGUF", version u32, number of tensors u64, number of keys u64
    keys      name, type u32, value                         a string is its length u64 and UTF-8; an array its type u32, length u64, items
    tensors   name, rank u32, sizes u64 (fastest first), type u32, offset u64
    data      each tensor on a multiple of `general.alignment` (32), in the order of the table, without holes

Everything is little-endian; versions 2 and 3 do not differ for that. The table is checked against the file's size before any array exists, so a
hostile file cannot make us allocate. The `gguf` package (extra `[gguf]`) is asked for one thing: the values of quantised blocks.
Source: ggml's docs/gguf.md, and `gguf.cpp` for what it refuses.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from stllava.checkpoint import atomic
from stllava.checkpoint.tensor_file import NUMPY_DTYPES, Tensor, check_name, dtype_name, is_shape, little_endian, map_file, view
from stllava.errors import ConfigError, FormatError
from stllava.limits import MAX_GGUF_KEYS, MAX_GGUF_STRINGS, MAX_HEADER_BYTES, MAX_NAME_BYTES, MAX_STRING_CHARS, MAX_TENSORS

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

Value: TypeAlias = int | float | bool | str | list[str] | np.ndarray
"""What a key may hold; an array of numbers is a NumPy array. Written: int as u32, float as f32."""

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_DIMENSIONS = 4

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY, _U32, _F32 = 7, 8, 9, 4, 6
_SCALAR_IDS = {np.dtype(name): number for number, name in _SCALARS.items()}
_PLAIN = {0: "f32", 1: "f16", 30: "bf16", 28: "f64"}  # ggml's types that NumPy holds as they are
_PLAIN_IDS = {name: number for number, name in _PLAIN.items()}
_DEQUANTIZED_AT_ONCE = 1 << 20  # elements; blocks unpack into several times their size


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """kind: ggml's type, lower case ('f32', 'q4_1'). shape: NumPy's order. offset: from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def is_quantized(self) -> bool:
        return self.kind not in _PLAIN_IDS


class GgufFile:
    """Metadata and the table of tensors of one file; `array` gives values."""

    def __init__(self, path: Path, buffer: mmap.mmap, metadata: dict[str, Value], tensors: dict[str, TensorEntry]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._buffer = buffer

    def array(self, name: str) -> np.ndarray:
        """Values of a tensor: f32, f16, f64 and bf16 (as uint16) as a read-only view on the file; quantised ones as new float32 values.

        Raises ConfigError where quantised blocks need the package and it is missing.
        """
        entry = self.tensors[name]
        if entry.is_quantized:
            return _dequantize(view(self._buffer, np.dtype("u1"), (entry.n_bytes,), entry.offset), entry, self.path)
        return view(self._buffer, NUMPY_DTYPES[entry.kind], entry.shape, entry.offset)


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Map a .gguf file.

    Raises FormatError naming the file, the key or tensor, what was found and what is allowed; ConfigError for a quantised type if the package
    `gguf` is missing; OSError from the system.
    """
    path = Path(path)
    return _Header(map_file(path), path).read()


class _Header:
    """Reads the file from its start; `field` is what the next error is about."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer, self._path = buffer, path
        self._position = 0
        self._end = min(len(buffer), MAX_HEADER_BYTES)
        self._n_strings = 0
        self.field = "magic"

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {self.field}: {what}", path=self._path, field=self.field)

    def read(self) -> GgufFile:
        if (magic := self._bytes(4)) != MAGIC:
            raise self.fail(f"the file starts with {magic!r}, want {MAGIC!r}: not a GGUF file")
        self.field = "version"
        version = self._number("<u4")
        if version not in (2, VERSION):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "a big-endian file" if swapped in (2, VERSION) else f"version {version}"
            raise self.fail(f"{why}, supported: little-endian files of version 2 and 3; convert the model again")
        self.field = "tensor count"
        n_tensors = self._count(MAX_TENSORS, item_bytes=24)
        self.field = "key count"
        n_keys = self._count(MAX_GGUF_KEYS, item_bytes=13)
        metadata = self._metadata(n_keys)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        self.field = "general.alignment"
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.fail(f"is {str(alignment)[:80]}, want a power of two from 8 to {1 << 20}")
        tensors = self._tensors(n_tensors, alignment)
        return GgufFile(self._path, self._buffer, metadata, tensors)

    def _bytes(self, n: int) -> bytes:
        start = self._position
        if n > self._end - start:
            raise self.fail(f"{n} bytes at byte {start}, but the file has {len(self._buffer)} (and a header at most {MAX_HEADER_BYTES}): "
                            "truncated, or not a GGUF file")
        self._position += n
        return self._buffer[start:self._position]

    def _number(self, dtype: str) -> int:
        return int.from_bytes(self._bytes(np.dtype(dtype).itemsize), "little")

    def _count(self, limit: int, item_bytes: int) -> int:
        n = self._number("<u8")
        if n > limit or n * item_bytes > self._end - self._position:
            raise self.fail(f"{n} items, limit {limit} and {len(self._buffer)} bytes in the file: truncated, or not a GGUF file")
        return n

    def _string(self, limit: int = MAX_STRING_CHARS) -> str:
        n = self._number("<u8")
        if n > limit:
            raise self.fail(f"a string of {n} bytes, limit {limit}")
        try:
            return self._bytes(n).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8: {error}") from error

    def _metadata(self, n_keys: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for i in range(n_keys):
            self.field = f"key {i}"
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise self.fail(f"{key!r} is there twice")
            self.field = key or self.field
            kind = self._number("<u4")
            metadata[key] = self._array() if kind == _ARRAY else self._scalar(kind)
        return metadata

    def _scalar(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise self.fail(f"type {kind} is unknown")
        dtype = np.dtype(_SCALARS[kind])
        data = self._bytes(dtype.itemsize)
        if kind == _BOOL and data not in (b"\0", b"\1"):
            raise self.fail(f"byte {data[0]} is no truth value")
        value: int | float | bool = np.frombuffer(data, dtype)[0].item()
        return value

    def _array(self) -> Value:
        kind = self._number("<u4")
        if kind == _STRING:
            n = self._count(MAX_GGUF_STRINGS - self._n_strings, item_bytes=8)
            self._n_strings += n
            return self._strings(n)
        if kind not in _SCALARS:
            raise self.fail(f"an array of type {kind}, want numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        n = self._count(MAX_HEADER_BYTES, dtype.itemsize)
        start = self._position
        data = self._bytes(n * dtype.itemsize)
        if kind == _BOOL and data.translate(None, b"\0\1"):
            raise self.fail("an array of truth values has other bytes")
        return view(self._buffer, dtype, (n,), start)

    def _strings(self, n: int) -> list[str]:
        """`_string` for the hundred thousands of a vocabulary."""
        buffer, position, end, size_of = self._buffer, self._position, self._end, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(n):
                begin = position + 8
                position = begin + size_of(buffer, position)[0]
                if position > end:
                    raise self.fail(f"string {len(strings)} of {n} ends at byte {position}, but the file has {len(buffer)} (and a header at most "
                                    f"{MAX_HEADER_BYTES}): truncated")
                strings.append(str(buffer[begin:position], "utf-8"))
        except struct.error as error:
            raise self.fail(f"the file ends in string {len(strings)} of {n}: truncated") from error
        except UnicodeDecodeError as error:
            raise self.fail(f"string {len(strings)} is not UTF-8: {error}") from error
        self._position = position
        return strings

    def _tensors(self, n: int, alignment: int) -> dict[str, TensorEntry]:
        entries = []
        for i in range(n):
            self.field = f"tensor {i}"
            name = self.field = check_name(self._string(MAX_NAME_BYTES), self._path)
            rank = self._number("<u4")
            if not 1 <= rank <= MAX_DIMENSIONS:
                raise self.fail(f"{rank} dimensions, want 1 to {MAX_DIMENSIONS}")
            sizes = [self._number("<u8") for _ in range(rank)]
            if not is_shape(sizes) or 0 in sizes:
                raise self.fail(f"sizes {sizes}: not those of a possible tensor")
            kind, block, block_bytes = self._block(self._number("<u4"))
            if sizes[0] % block:
                raise self.fail(f"rows of {sizes[0]} values, but {kind} has blocks of {block}")
            entries.append((name, kind, tuple(reversed(sizes)), self._number("<u8"), math.prod(sizes) // block * block_bytes))
        start = self._position + -self._position % alignment
        tensors, expected = {}, 0
        for name, kind, shape, offset, n_bytes in entries:
            self.field = name
            if name in tensors:
                raise self.fail("is there twice")
            if offset != expected:
                raise self.fail(f"starts at byte {offset} of the data, want {expected}: it {'overlaps' if offset < expected else 'is behind a hole'}")
            if start + offset + n_bytes > len(self._buffer):
                raise self.fail(f"ends at byte {start + offset + n_bytes}, but the file has {len(self._buffer)}: truncated")
            tensors[name] = TensorEntry(name, kind, shape, start + offset, n_bytes)
            expected = offset + n_bytes + -n_bytes % alignment
        return tensors

    def _block(self, number: int) -> tuple[str, int, int]:
        """Name, values per block and bytes per block of a type."""
        if number in _PLAIN:
            return _PLAIN[number], 1, NUMPY_DTYPES[_PLAIN[number]].itemsize
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError as error:
            raise ConfigError(f"{self._path}: {self.field}: type {number} is quantised; to read it: pip install 'stllava[gguf]'",
                              path=self._path, field=self.field) from error
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self.fail(f"type {number} is unknown to the package gguf") from error
        if kind.name[0] == "I" and kind.name[1:].isdigit():
            raise self.fail(f"type {kind.name} holds integers, want weights")
        return kind.name.lower(), block, block_bytes


def _dequantize(data: np.ndarray, entry: TensorEntry, path: Path) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    kind: GGMLQuantizationType = GGMLQuantizationType[entry.kind.upper()]
    n_values = entry.shape[-1]
    rows = data.reshape(math.prod(entry.shape[:-1]), -1)
    out = np.empty((len(rows), n_values), np.float32)
    step = max(1, _DEQUANTIZED_AT_ONCE // n_values)
    try:
        with np.errstate(all="ignore"):  # what is not finite is found by who asks for the values
            for start in range(0, len(rows), step):
                out[start:start + step] = dequantize(rows[start:start + step], kind)
    except NotImplementedError as error:
        raise FormatError(f"{path}: tensor {entry.name} has type {entry.kind}, which the package gguf cannot unpack: {error}", path=path,
                          field=entry.name) from error
    out.flags.writeable = False
    return out.reshape(entry.shape)


# ---- writing -----------------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of version 3, atomically. tensors: f32, f16 or bf16 (uint16), C order, 1 to 4 dimensions, none empty.

    Raises FormatError for what the format cannot hold; OSError from the system, and then what `path` held before still stands.
    """
    path = Path(path)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string_bytes(check_name(key, path)) + _value_bytes(key, value, path)
    offset = 0
    for name, array in tensors.items():
        if not 1 <= array.ndim <= MAX_DIMENSIONS or not array.size or dtype_name(array) not in _PLAIN_IDS:
            raise FormatError(f"{path}: {name}: {dtype_name(array)} of shape {array.shape}, want {', '.join(_PLAIN_IDS)} with 1 to "
                              f"{MAX_DIMENSIONS} dimensions and no empty one", path=path, field=name)
        sizes = array.shape[::-1]
        header += _string_bytes(check_name(name, path)) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, _PLAIN_IDS[dtype_name(array)], offset)
        offset += array.nbytes + -array.nbytes % ALIGNMENT
    header += bytes(-len(header) % ALIGNMENT)
    with atomic.writing(path, n_bytes=len(header) + offset) as file:
        file.write(bytes(header))
        for array in tensors.values():
            file.write(little_endian(array).reshape(-1).view(np.uint8).data)
            file.write(bytes(-array.nbytes % ALIGNMENT))


def _string_bytes(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value_bytes(key: str, value: Value, path: Path) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string_bytes(value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, int) and 0 <= value < 2**32:
        return struct.pack("<II", _U32, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string_bytes, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.newbyteorder("<") in _SCALAR_IDS:
        kind = _SCALAR_IDS[value.dtype.newbyteorder("<")]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + little_endian(value).tobytes()
    raise FormatError(f"{path}: {key}: {str(value)[:80]!r} cannot be stored", path=path, field=key)
