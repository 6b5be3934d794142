"""Names that come out of files, and files that may be anything: what every reader asks before it opens something."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from stllava.errors import FormatError


def inside(folder: str | os.PathLike[str], name: object, also: Iterable[Path] = ()) -> Path:
    """`folder / name` for a name that a file gave us, if that lies in `folder` (or in one of `also`) with every link on the way followed.

    Raises FormatError for absolute names, "..", backslashes, drive letters, NUL, names the system cannot spell, and links that lead out. Nothing is
    decoded or expanded: "%2e%2e" and "~" are plain names.
    """
    folder = Path(folder)

    def refuse(why: str) -> FormatError:
        return FormatError(f"file {str(name)[:120]!r} lies outside the directory {folder}: {why}; want a relative path that stays inside",
                           path=folder)

    if not isinstance(name, str) or not name:
        raise refuse(f"it is a {type(name).__name__}" if not isinstance(name, str) else "it is empty")
    if "\0" in name or "\\" in name or PureWindowsPath(name).drive:
        raise refuse("it has a NUL, a backslash or a drive letter")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise refuse("it is absolute or goes up by '..'")
    try:
        real, roots = (folder / name).resolve(), [root.resolve() for root in (folder, *also)]
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, characters that no file name has
        raise refuse(f"it cannot be looked up ({error})") from error
    if not any(real.is_relative_to(root) for root in roots):
        raise refuse(f"it is a link to {real}")
    return folder / name


@contextmanager
def _regular(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A regular file, opened. Raises FormatError for anything else."""
    try:
        # A FIFO would wait for ever and a device never end. It may have become one since, hence O_NONBLOCK.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{os.fspath(path)}: not a regular file", path=path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{os.fspath(path)!r}: not a file name: {error}", path=path) from error
    with open(descriptor, "rb") as file:
        yield file


def read_head(path: str | os.PathLike[str], n_bytes: int) -> bytes:
    """The first `n_bytes` of a regular file, or as many as it has. Raises FormatError; OSError from the system."""
    with _regular(path) as file:
        return file.read(n_bytes)


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Content of a regular file of at most `max_bytes`. Raises FormatError; OSError from the system."""
    with _regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        data = file.read(n_bytes + 1) if n_bytes <= max_bytes else None
    if data is None or len(data) > max_bytes:
        raise FormatError(f"{os.fspath(path)}: larger than the limit of {max_bytes} bytes", path=path)
    return data
