"""Which picture of a medical file: the part of a name behind `#`, keys and values as in an address."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Choice", "Unreadable", "parse_choice", "pick", "stage"]

AXES = {"0": 0, "1": 1, "2": 2, "sagittal": 0, "coronal": 1, "axial": 2}


class Unreadable(Exception):
    """Why a file cannot be read, in words of our own."""


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Whatever a library says in here becomes `what`."""
    try:
        yield
    except (MemoryError, Unreadable, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the RLE decoder is written in Rust, whose panics are no Exceptions
        raise Unreadable(what) from error


@dataclass(frozen=True, slots=True)
class Choice:
    """window: (centre, width), or the number of one of the file's own. None: the default of the format. All numbers count from 0."""

    frame: int | None = None
    axis: int = 2
    slice: int | None = None
    volume: int = 0
    window: tuple[float, float] | int | None = None


def parse_choice(text: str, allowed: Collection[str]) -> Choice:
    """`frame=3&window=40,400`. Raises Unreadable."""
    found: dict[str, object] = {}
    for part in text.split("&") if text else ():
        key, _, value = part.partition("=")
        if key not in allowed or key in found:
            why = "stands twice" if key in found else "is not known here"
            raise Unreadable(f"{key!r} {why}; want {', '.join(sorted(allowed))}, each at most once")
        if key == "axis":
            if value.lower() not in AXES:
                raise Unreadable(f"axis {value!r}: want {', '.join(AXES)}")
            found[key] = AXES[value.lower()]
        elif key == "window" and "," in value:
            found[key] = _window(value)
        elif not value.isascii() or not value.isdigit() or len(value) > 9:
            raise Unreadable(f"{key} {value!r}: want a number that counts from 0" + ", or CENTRE,WIDTH" * (key == "window"))
        else:
            found[key] = int(value)
    return Choice(**found)  # type: ignore[arg-type] # as checked above


def _window(value: str) -> tuple[float, float]:
    try:
        centre, width = map(float, value.split(","))
    except ValueError:
        centre = width = math.nan
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise Unreadable(f"window {value!r}: want CENTRE,WIDTH, two numbers, the width above 0")
    return centre, width


def pick(number: int | None, n: int, what: str) -> int:
    """`number` of `n`, by default the middle one. Raises Unreadable."""
    if number is None:
        return n // 2
    if number >= n:
        raise Unreadable(f"{what} {number} is asked for, the file has {n}, counted from 0")
    return number
