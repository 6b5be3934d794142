"""Reader and writer of one .safetensors file.

    8 bytes  header length n, little-endian
    n bytes  JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    rest     the tensors' bytes; the ranges cover it from 0 to the end without hole or overlap

Everything in the header is checked against the file's size before any array exists, so a hostile file cannot make us
allocate. The `safetensors` package is the oracle in the tests and is not used here: its NumPy side has no bf16 and copies.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stllava.checkpoint import atomic, strict_json
from stllava.checkpoint.tensor_file import NUMPY_DTYPES, Tensor, TensorFile, check_name, dtype_name, is_shape, is_size, little_endian, map_file, view
from stllava.errors import FormatError
from stllava.limits import MAX_HEADER_BYTES, MAX_RANK, MAX_STRING_CHARS, MAX_TENSORS

_STEP = 1 << 20
_DTYPE = b'"dtype"'
_ITEMS_PER_TENSOR = 16  # commas and brackets of an entry of rank 8
_OTHER_ITEMS = 65536  # of the metadata
_METADATA = "__metadata__"
_FILE_DTYPES = {name.upper(): name for name in NUMPY_DTYPES}


def read(path: str | os.PathLike[str]) -> TensorFile:
    """Map a .safetensors file: name -> read-only array, bf16 as uint16 bits.

    Raises FormatError naming the file, the tensor, what was found and what is allowed; OSError from the system.
    """
    path = Path(path)
    buffer = map_file(path)
    header, data_start = _read_header(buffer, path)
    metadata = _check_metadata(header.pop(_METADATA, {}), path)
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path}: {len(header)} tensors, limit {MAX_TENSORS}", path=path)
    n_data = len(buffer) - data_start
    entries = [_check_entry(name, entry, n_data, path) for name, entry in header.items()]

    expected_begin = 0
    for begin, end, name, _, _ in sorted(entries):
        if begin != expected_begin:
            what = "overlaps the tensor before it" if begin < expected_begin else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name!r} starts at byte {begin}, want {expected_begin}: it {what}",
                              path=path, field=name)
        expected_begin = end
    if expected_begin != n_data:
        raise FormatError(f"{path}: the tensors end at byte {expected_begin} of the data, the file at {n_data}", path=path)
    tensors = {name: view(buffer, dtype, shape, data_start + begin) for begin, _, name, dtype, shape in entries}
    return TensorFile(path, tensors, metadata)


def _read_header(buffer: mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    if len(buffer) < 8:
        raise FormatError(f"{path}: {len(buffer)} bytes, too short for a safetensors file", path=path)
    n_header = int.from_bytes(buffer[:8], "little")
    if n_header > MAX_HEADER_BYTES:
        raise FormatError(f"{path}: header of {n_header} bytes, limit {MAX_HEADER_BYTES}; not a safetensors file?", path=path)
    if n_header > len(buffer) - 8:
        raise FormatError(f"{path}: header of {n_header} bytes, but only {len(buffer) - 8} follow; truncated file", path=path)
    _check_cost(buffer, 8, 8 + n_header, path)
    data = buffer[8:8 + n_header]
    if data[:1] != b"{":
        raise FormatError(f"{path}: header starts with {data[:1]!r}, want b'{{'; not a safetensors file", path=path)
    return strict_json.parse_object(data, path, "safetensors header"), 8 + n_header


def _check_cost(buffer: mmap.mmap, begin: int, end: int, path: Path) -> None:
    """Refuse a header that would be large in memory, before it is there: parsed JSON takes up to 30 times its text."""
    n_tensors = n_items = 0
    for start in range(begin, end, _STEP):
        piece = buffer[start:min(start + _STEP, end)]
        n_tensors += buffer[start:min(start + _STEP + len(_DTYPE) - 1, end)].count(_DTYPE)
        n_items += strict_json.n_items(piece)
        if n_tensors > MAX_TENSORS:
            raise FormatError(f"{path}: more than {MAX_TENSORS} tensors", path=path)
        if n_items > _ITEMS_PER_TENSOR * n_tensors + _OTHER_ITEMS or b"\0" in piece:
            raise FormatError(f"{path}: safetensors header is not valid: no table of tensors ({n_items} items, {n_tensors} tensors)", path=path)


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) and len(value) <= MAX_STRING_CHARS for value in metadata.values()):
        raise FormatError(f"{path}: {_METADATA} must map strings to strings of at most {MAX_STRING_CHARS} characters", path=path, field=_METADATA)
    return metadata


def _check_entry(name: str, entry: Any, n_data: int, path: Path) -> tuple[int, int, str, np.dtype, tuple[int, ...]]:
    """One header entry -> (begin, end, name, dtype, shape), checked against itself and the file's size."""
    check_name(name, path)

    def fail(what: str) -> FormatError:
        return FormatError(f"{path}: tensor {name!r}: {what}", path=path, field=name)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("entry must have exactly dtype, shape, data_offsets")
    kind = _FILE_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if kind is None:
        raise fail(f"dtype {entry['dtype']!r} is not supported; supported: {', '.join(_FILE_DTYPES)}")
    dtype = NUMPY_DTYPES[kind]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or not is_shape(shape):
        raise fail(f"shape {str(shape)[:80]}: want at most {MAX_RANK} non-negative integers of a possible size")
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= n_data:
        raise fail(f"data_offsets {str(offsets)[:80]}: want [begin, end] with begin <= end <= {n_data}, the bytes of data "
                   "in the file; truncated file?")
    begin, end = offsets
    n_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != n_bytes:
        raise fail(f"shape {shape} of {entry['dtype']} needs {n_bytes} bytes, data_offsets give {end - begin}")
    return begin, end, name, dtype, tuple(shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_size, value))


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor],
          metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors (uint16 = bf16) atomically; `metadata` defaults to {"format": "pt"}, which PEFT and HF ask for.

    Same order and padding as the reference implementation (widest dtype first, then by name), so equal input gives
    equal bytes. Raises TypeError for a dtype that cannot be stored, FormatError for a bad name.
    """
    path = Path(path)
    header: dict[str, Any] = {_METADATA: dict({"format": "pt"} if metadata is None else metadata)}
    order = sorted(tensors, key=lambda name: (-_RANK_OF_DTYPE[dtype_name(tensors[name])], name))
    offset = 0
    for name in order:
        if check_name(name, path) == _METADATA:
            raise FormatError(f"{path}: {_METADATA} cannot be a tensor's name", path=path, field=name)
        array = tensors[name]
        header[name] = {"dtype": dtype_name(array).upper(), "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = strict_json.dump_compact(header)
    text += b" " * (-len(text) % 8)
    with atomic.writing(path, n_bytes=8 + len(text) + offset) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(little_endian(tensors[name]).reshape(-1).view(np.uint8).data)


# Order of dtypes in the reference implementation's enumeration; it sorts by it, widest first.
_RANK_OF_DTYPE = {name: rank for rank, name in enumerate(
    ("bool", "u8", "i8", "i16", "f16", "bf16", "i32", "f32", "f64", "i64"))}
