"""What every weight file gives: an immutable mapping from tensor name to NumPy array.

NumPy has no bfloat16. Its bits travel as uint16, and in this package a uint16 array *means* bfloat16: no checkpoint
stores real uint16 weights (readers refuse them), so no side table of dtypes has to follow every array around.

Arrays are read-only views on a memory map. The map follows the file: a file truncated in place by another process makes
the next access fail with SIGBUS. Everything this package writes is replaced by rename and never in place.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stllava.checkpoint.strict_json import is_text
from stllava.errors import FormatError
from stllava.limits import MAX_NAME_BYTES, MAX_RANK

NUMPY_DTYPES: dict[str, np.dtype] = {
    "f64": np.dtype("<f8"), "f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2"),
    "i64": np.dtype("<i8"), "i32": np.dtype("<i4"), "i16": np.dtype("<i2"), "i8": np.dtype("i1"),
    "u8": np.dtype("u1"), "bool": np.dtype("?"),
}
FLOAT_DTYPES = ("f64", "f32", "f16", "bf16")
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
_CHUNK = 1 << 17  # elements looked at at once: they and what is made of them stay in the second cache
_EXPONENT = {"f16": 0x7C00, "bf16": 0x7F80}  # all ones: infinite or NaN. NumPy's isfinite of f16 is seven times slower


class TensorFile(Mapping[str, np.ndarray]):
    """Mapping name -> array of one file; `path` where it lies, `metadata` its string pairs."""

    def __init__(self, path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        self.metadata = dict(metadata or {})
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        n_bytes = sum(array.nbytes for array in self._tensors.values())
        return f"TensorFile({str(self.path)!r}, {len(self)} tensors, {n_bytes} bytes)"

    def dtype(self, name: str) -> str:
        """'f32', 'bf16', ... of one tensor."""
        return dtype_name(self[name])


@dataclass(frozen=True)
class Deferred:
    """An array that is made when it is written: a writer asks for its size and dtype first, and for its values once."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


Tensor: TypeAlias = np.ndarray | Deferred


def dtype_name(array: Tensor) -> str:
    """Name of the array's dtype ('bf16' for uint16). Raises TypeError for one that no checkpoint holds."""
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise TypeError(f"dtype {array.dtype} cannot be stored; supported: {', '.join(NUMPY_DTYPES)} (bf16 as uint16)")
    return name


def values_of(array: Tensor) -> np.ndarray:
    """The array, made now if it is deferred."""
    return array.make() if isinstance(array, Deferred) else array


def little_endian(array: Tensor) -> np.ndarray:
    """The same values C-contiguous and little-endian; no copy if they already are. Keeps rank 0."""
    array = values_of(array)
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def to_float32(array: np.ndarray) -> np.ndarray:
    """Values as float32: exact from f16 and bf16, rounded from f64."""
    if dtype_name(array) == "bf16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def row_norms(matrix: np.ndarray) -> NDArray[np.float64]:
    """Euclidean length of every row of a matrix of floating-point values (n, k), (n,)."""
    norms = np.empty(len(matrix))
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = matrix[start:start + step]
        norms[start:start + step] = np.linalg.norm((to_float32(part) if dtype_name(part) == "bf16" else part).astype(np.float64), axis=1)
    return norms


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating-point values as ``"f32"``, ``"f16"`` or ``"bf16"`` (uint16 bits), rounded to nearest, ties to even; NaN stays NaN.

    A value beyond the largest of the type becomes infinite: `count_nonfinite` tells. f64 becomes bf16 by way of f32.
    """
    if dtype == "bf16" and dtype_name(array) != "bf16":
        bits = to_float32(array).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).astype(np.uint16)
    if dtype == "f16" and dtype_name(array) != "f16":
        with np.errstate(over="ignore"):
            return (to_float32(array) if dtype_name(array) == "bf16" else array).astype(np.float16)
    return to_float32(array) if dtype == "f32" else array


def count_nonfinite(array: np.ndarray) -> int:
    """Number of NaN and infinite values; 0 for integer and bool arrays."""
    kind = dtype_name(array)
    if kind not in FLOAT_DTYPES:
        return 0
    exponent = _EXPONENT.get(kind)
    flat = array.reshape(-1) if exponent is None else array.reshape(-1).view(np.uint16)
    count = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start:start + _CHUNK]
        finite = np.isfinite(part) if exponent is None else (part & exponent) != exponent
        count += part.size - int(np.count_nonzero(finite))
    return count


def map_file(path: Path) -> mmap.mmap:
    """Read-only map of a regular, non-empty file. Raises FormatError, or OSError from the system."""
    if not path.exists():
        raise FormatError(f"{path}: no such file", path=path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
        raise FormatError(f"{path}: not a regular file", path=path)
    if status.st_size == 0:
        raise FormatError(f"{path}: empty file; the copy or download was interrupted", path=path)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_size(value: object) -> bool:
    """A dimension, stride or offset that a file may give: 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def is_shape(sizes: Sequence[int]) -> bool:
    """Whether NumPy can hold an array of these sizes; for an empty one that depends on the sizes that are not 0."""
    return len(sizes) <= MAX_RANK and (0 not in sizes or math.prod(size for size in sizes if size) < 2**59)


def view(buffer: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Array on `buffer` at byte `offset`; the caller has checked the range.

    Data that does not start on a multiple of its item size is copied, because C may not read it in place.
    """
    count = math.prod(shape)
    if count == 0:
        array = np.empty(shape, dtype)
    else:
        array = np.frombuffer(buffer, dtype, count, offset).reshape(shape)
        if not array.flags.aligned:
            array = array.copy()
    array.flags.writeable = False
    return array


def check_name(name: object, path: Path) -> str:
    """A tensor name must be a non-empty string of at most MAX_NAME_BYTES. Returns it."""
    if not isinstance(name, str) or not name or not is_text(name) or len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise FormatError(f"{path}: tensor name {str(name)[:80]!r}: want a string of 1 to {MAX_NAME_BYTES} bytes", path=path)
    return name
