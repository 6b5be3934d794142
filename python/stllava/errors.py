"""Exceptions of the friendly package.

Each one is also the builtin a caller would expect (ValueError), carries `path` and `field` where they are known, and
its text says what is wrong, where, what was found and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable


class StllavaError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)
        self.field = field


class ConfigError(StllavaError, ValueError):
    """A setting is unknown, out of range, or asks for maths that is not implemented."""


class FormatError(StllavaError, ValueError):
    """A file or a checkpoint directory is damaged, incomplete, hostile, or not of the expected format."""


class NumericsError(StllavaError, ValueError):
    """Values are NaN or infinite where finite ones are required. `sample_ids`: the samples they may come from, in training."""

    def __init__(self, message: str, *, path: str | os.PathLike[str] | None = None, field: str | None = None, sample_ids: Iterable[str] = ()) -> None:
        super().__init__(message, path=path, field=field)
        self.sample_ids = list(sample_ids)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a wrong word: the nearest that exists, if one is near."""
    import difflib  # for a mistake only
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
