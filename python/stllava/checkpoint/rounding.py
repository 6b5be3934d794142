"""Weights in another dtype: values rounded to nearest even once, a piece at a time, with the largest error on the way.

A value that the new dtype cannot hold (f16 ends at 65504) is an error, never an infinity; values that become 0 are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stllava.checkpoint.names import part_of
from stllava.checkpoint.tensor_file import FLOAT_DTYPES, NUMPY_DTYPES, Deferred, Tensor, count_nonfinite, dtype_name, round_to, to_float32, values_of
from stllava.errors import NumericsError

TargetDtype = Literal["keep", "f32", "f16", "bf16"]
_CHUNK = 1 << 16  # of values: what is computed with them stays in the cache


@dataclass
class RoundingError:
    """Largest errors of the tensors of one part: |new - old|, and the same over |old|. `n_to_zero`: values that became 0."""

    absolute: float = 0.0
    relative: float = 0.0
    n_to_zero: int = 0

    def add(self, old: np.ndarray, new: np.ndarray) -> bool:
        """Take in f32 or f64 values before and after; False, and nothing is taken in, if one is not finite.

        The difference is exact in the wider type: a rounded value is 0 or within a factor of 2 of its origin (Sterbenz).
        """
        with np.errstate(invalid="ignore"):
            difference = np.subtract(new, old)
        np.abs(difference, out=difference)
        largest = float(difference.max(initial=0.0))
        if not math.isfinite(largest):
            return False
        size = np.abs(old)
        np.copyto(size, 1, where=size == 0)
        difference /= size
        self.absolute, self.relative = max(self.absolute, largest), max(self.relative, float(difference.max(initial=0.0)))
        self.n_to_zero += int(np.count_nonzero(old)) - int(np.count_nonzero(new))
        return True


def wide(values: np.ndarray) -> np.ndarray:
    """The same values as f32, or as f64 where they are that already: exact."""
    return values if dtype_name(values) == "f64" else to_float32(values)


def chunks(array: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Pieces of the flattened array, and where they lie."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        piece = slice(start, start + _CHUNK)
        yield piece, flat[piece]


def mean_of_rows(array: np.ndarray) -> np.ndarray:
    """(width,) float64 mean of an (n, width) matrix, summed a few rows at a time."""
    n, width = array.shape
    step = max(1, _CHUNK // width)
    total = np.zeros(width)
    for start in range(0, n, step):
        total += wide(array[start:start + step]).sum(axis=0, dtype=np.float64)
    total /= n
    return total


def rounded(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], errors: dict[str, RoundingError]) -> dict[str, Tensor]:
    """The tensors (canonical names) in the dtypes that `dtypes` names, each made when it is written.

    What rounding costs is in `errors`, by part, when all are written; tensors that keep their dtype are not in it.
    Making one raises NumericsError where a value is NaN or infinite, or too large for its new dtype.
    """
    return {name: _rounded(name, tensor, dtypes[name], errors) for name, tensor in tensors.items()}


def _rounded(name: str, tensor: Tensor, dtype: str, errors: dict[str, RoundingError]) -> Deferred:
    def make() -> np.ndarray:
        values = values_of(tensor)
        if dtype_name(values) == dtype:
            _check_finite(name, values)
            return values
        result = np.empty(values.shape, NUMPY_DTYPES[dtype])
        flat, error = result.reshape(-1), errors.setdefault(part_of(name), RoundingError())
        for piece, old in chunks(values):
            exact = wide(old)
            flat[piece] = round_to(exact, dtype)
            if not error.add(exact, wide(flat[piece])):
                _check_finite(name, values)
                raise _too_large(name, exact, dtype)
        return result

    return Deferred(NUMPY_DTYPES[dtype], tensor.shape, make)


def round_tensor(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` (f32 or f64) in `dtype`; NaN and Inf stay what they are. Raises NumericsError, naming the tensor, if a finite one does not fit."""
    result = values if dtype_name(values) == dtype else round_to(values, dtype)
    if count_nonfinite(result) != count_nonfinite(values):
        raise _too_large(name, values, dtype)
    return result


def _too_large(name: str, values: np.ndarray, dtype: str) -> NumericsError:
    largest = np.max(np.abs(values), where=np.isfinite(values), initial=0)
    return NumericsError(f"{name}: {largest:g} is too large for {dtype}; choose another dtype: bf16 has the range of f32", field=name)


def _check_finite(name: str, values: np.ndarray) -> None:
    if n := count_nonfinite(values):
        raise NumericsError(f"{name} has {n} NaN or infinite values of {values.size}: the file is damaged or training diverged", field=name)


def target_dtypes(tensors: Mapping[str, Tensor], dtype: TargetDtype) -> dict[str, str]:
    """Name -> dtype to write: `dtype`, or the tensor's own for "keep"."""
    if dtype not in ("keep", *FLOAT_DTYPES):
        raise ValueError(f"dtype {dtype!r}: want keep, f32, f16 or bf16")
    return {name: dtype_name(tensor) if dtype == "keep" else dtype for name, tensor in tensors.items()}
