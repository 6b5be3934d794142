"""Images that look alike: a 64-bit perceptual hash finds candidates, a small grey picture decides.

The hash alone is not enough for medical pictures: radiographs of two patients share most of what it sees. Those of one picture, scaled, compressed
anew or a little brighter, agree in the small picture as well. So do many neighbouring slices of one volume, which belong into one split as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["MAX_DISTANCE", "MIN_LIKENESS", "Print", "close_pairs", "fingerprint", "likeness", "near_pairs"]

SIDE, LOW = 32, 8
MAX_DISTANCE = 7
"""Bits of the hash in which candidates may differ."""
MIN_LIKENESS = 0.985
"""Correlation of the small pictures from which two are one."""
_FLAT = 2.0  # standard deviation in grey levels below which a picture has no likeness to anything
_BATCH = 1 << 20  # candidates compared at a time


class Print(NamedTuple):
    """hash: 64 bits. grey: uint8 (32, 32)."""

    hash: int
    grey: NDArray[np.uint8]


def _cosines() -> NDArray[np.float64]:
    """(8, 32): the lowest rows of the discrete cosine transform, without the constant one."""
    k, n = np.mgrid[1:LOW + 1, 0:SIDE]
    basis: NDArray[np.float64] = np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))
    return basis


def fingerprint(image: Image.Image) -> Print | None:
    """None for a picture of one grey. Source: the DCT hash ("pHash") of Zauner 2010, without the constant row and column."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0))
    if grey.std() < _FLAT:
        return None
    basis = _cosines()
    low = basis @ grey.astype(np.float64) @ basis.T
    bits = (low > np.median(low)).ravel()
    return Print(int.from_bytes(np.packbits(bits).tobytes(), "big"), grey)


def likeness(a: Print, b: Print) -> float:
    """Correlation of the small pictures, 1.0 for pictures that differ in brightness and contrast alone."""
    x, y = (p.grey.astype(np.float64) - p.grey.mean() for p in (a, b))
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def close_pairs(hashes: NDArray[np.uint64], max_distance: int = MAX_DISTANCE) -> Iterator[tuple[int, int]]:
    """All i < j whose 64 bits differ in at most `max_distance` places, each once.

    Of max_distance + 1 bands of the 64 bits at least one is the same in both, so only hashes that share a band are compared.
    """
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    bands = [(hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1) for low, high in pairwise(edges)]
    for number, band in enumerate(bands):
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] ^ np.uint64(1)))
        for members in np.split(order, starts[1:]) if len(order) else []:
            yield from _within(members, hashes, bands[:number], max_distance)


def _within(members: NDArray[np.intp], hashes: NDArray[np.uint64], before: Sequence[NDArray[np.uint64]],
            max_distance: int) -> Iterator[tuple[int, int]]:
    step = max(_BATCH // max(len(members), 1), 1)
    for begin in range(0, len(members) - 1, step):
        rows = members[begin:begin + step]
        near = np.bitwise_count(hashes[rows][:, None] ^ hashes[members][None, :]) <= max_distance
        for a, b in zip(*np.nonzero(near), strict=True):
            i, j = int(rows[a]), int(members[b])
            if i < j and not any(band[i] == band[j] for band in before):  # which an earlier band has found
                yield i, j


def near_pairs(prints: Sequence[Print | None]) -> Iterator[tuple[int, int]]:
    """All i < j of one picture, in any order."""
    known = [i for i, p in enumerate(prints) if p is not None]
    hashes = np.array([p.hash for p in prints if p is not None], np.uint64)
    for i, j in close_pairs(hashes):
        a, b = prints[known[i]], prints[known[j]]
        assert a is not None and b is not None
        if likeness(a, b) >= MIN_LIKENESS:
            yield known[i], known[j]
