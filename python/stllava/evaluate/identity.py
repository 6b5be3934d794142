"""Which model, data and settings answers belong to: digests that tell another run's answers from one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from stllava.model import LlavaModel

__all__ = ["digest", "items_digest", "model_digest"]

_SAMPLE = 4096  # bytes of either end of a tensor


def digest(value: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()[:16]


def model_digest(model: LlavaModel) -> str:
    """16 hexadecimal digits of the configuration and of the first and last 4 KiB of every tensor, adapters too.

    Not of every byte: a checkpoint of 13 GB should be at work in a second. Whatever trains a tensor changes its ends.
    """
    found = hashlib.sha256(json.dumps([model.config.to_dict(), model.dtype, model.adapters_enabled], sort_keys=True, default=str).encode())
    for name, array in model.named_parameters():
        flat = np.ascontiguousarray(array).reshape(-1)
        n = max(1, _SAMPLE // flat.itemsize)
        found.update(f"{name} {array.shape} {array.dtype} ".encode())
        found.update(flat[:n].tobytes() + flat[-n:].tobytes())
    return found.hexdigest()[:16]


def items_digest(items: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of the test items, whatever file they came from."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps(item, sort_keys=True, separators=(",", ":"), default=_bytes).encode() + b"\n")
    return found.hexdigest()


def _bytes(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, (bytes, bytearray)) else str(value)
