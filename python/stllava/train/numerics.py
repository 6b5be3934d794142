"""What an error says about a number that is not finite. Looked for only after one was noticed, so a healthy update pays nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

import stllava_c
from stllava.checkpoint.tensor_file import count_nonfinite
from stllava.errors import NumericsError
from stllava.model import LlavaModel

if TYPE_CHECKING:
    from .update import Micro

__all__ = ["all_finite", "bad_tensors", "explained", "failure", "shown"]

SHOWN = 3  # names printed


def all_finite(values: np.ndarray) -> bool:
    """One pass and no copy: the sum is finite if all values are. A sum that overflowed is looked into."""
    with np.errstate(all="ignore"):
        return math.isfinite(values.sum()) or bool(np.isfinite(values).all())


def bad_tensors(model: LlavaModel, flat: np.ndarray) -> list[str]:
    """Trainable tensors whose part of a flat buffer holds NaN or Inf."""
    return [name for name, where in model.trainable_slices().items() if not all_finite(flat[where])]


def failure(when: str, what: str, micros: Seq[Micro], model: LlavaModel) -> NumericsError:
    """The error for `what` was noticed: with the pictures that cause it, else the weights, and the samples it may come from."""
    ids = [str(i) for micro in micros for item, _ in micro.items for i in _ids(micro.dataset, item)]
    return NumericsError(f"{when}: {what}{_cause(micros, model)}; samples: {', '.join(ids)}", sample_ids=ids)


@contextmanager
def explained(when: str, micro: Micro, model: LlavaModel) -> Iterator[None]:
    """The core's NumericError as a NumericsError that names causes and samples."""
    try:
        yield
    except stllava_c.NumericError as error:
        raise failure(when, str(error), [micro], model) from error


def _ids(dataset: object, item: int) -> Iterable[object]:
    return dataset.ids(item) if hasattr(dataset, "ids") else [item]


def _cause(micros: Seq[Micro], model: LlavaModel) -> str:
    pictures = [str(key) for micro in micros if micro.pixels is not None
                for key, pixels in zip(micro.trees.image_keys, micro.pixels, strict=True) if not all_finite(pixels)]
    if pictures:
        return f"; NaN or Inf in the pixels of {shown(pictures)}"
    weights = [name for name, values in model.named_parameters() if count_nonfinite(values)]
    return f"; NaN or Inf in the weights {shown(weights)}" if weights else ""


def shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
