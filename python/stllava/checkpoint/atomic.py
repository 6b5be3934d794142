"""Every write of the package: temporary name, fsync, rename. What exists under its final name is complete.

    write_bytes(path, data)       one file
    writing(path)                 one file written piece by piece
    atomic_directory(path)        many files that appear together, with manifest.json = sha256 of each
    verify, latest_complete       read the manifest back

Order on disk for a directory: files (each fsynced) in `.NAME.partial` -> manifest, written last -> directory fsync ->
rename -> parent fsync. A kill at any point leaves the old state or the new one under NAME. A stale `.NAME.partial` is
removed by the next writer of NAME, so killed saves do not fill the disk. One writer per directory is assumed; the run's
lock file guarantees it.

All system calls go through this module's `os`, so that a test can make any of them fail.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stllava.checkpoint import strict_json
from stllava.errors import FormatError

MANIFEST = "manifest.json"
_VERSION = 1


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer:
    """Minimal binary file object: writes everything or raises, whatever the size of the system's short writes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        n_bytes = rest.nbytes
        while rest.nbytes:
            rest = rest[os.write(self._descriptor, rest):]
        return n_bytes

    def flush(self) -> None:
        """Nothing is buffered here."""


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[_Writer]:
    """File object whose content appears under `path` when the block ends without an exception, else not at all.

    Raises OSError (disk full, permissions) naming the file; the previous content of `path` then still stands.
    """
    path = Path(path)
    temporary = _partial(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            yield _Writer(descriptor)
            os.fsync(descriptor)  # after a failed fsync the pages may be gone: raise, never retry
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the content of `path` by `data`, atomically and durably."""
    with writing(path) as file:
        file.write(data)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory; when the block ends its files are published under `path` with a manifest.

    If `path` does not exist, publishing is one rename. If it does (an output directory that also holds checkpoint-*), the
    files move in one by one, files that only the old manifest lists are removed, and the new manifest comes last: caught in
    between, the old manifest's hashes do not fit and the directory does not verify. An exception in the block changes nothing.
    """
    path = Path(path)
    temporary = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary.exists():
        shutil.rmtree(temporary)
    os.mkdir(temporary)
    try:
        yield temporary
        files = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        entries = {name: _describe(temporary / name) for name in files}
        write_bytes(temporary / MANIFEST, strict_json.dump_object({"version": _VERSION, "files": entries}))
        for directory in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            _fsync_directory(directory)
        if path.exists():
            _move_into(temporary, path, files)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_directory(path.parent)


def _describe(path: Path) -> dict[str, Any]:
    """Size and hash as read back from the file, fsynced whoever wrote it."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        size = os.fstat(descriptor).st_size
        while block := os.read(descriptor, 1 << 20):
            digest.update(block)
    finally:
        os.close(descriptor)
    return {"sha256": digest.hexdigest(), "size": size}


def _move_into(source: Path, target: Path, files: list[str]) -> None:
    try:
        old_files = set(read_manifest(target))
    except FormatError:  # none, or not one of ours: nothing there is known to be left over
        old_files = set()
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)
    for name in old_files - set(files):
        (target / name).unlink(missing_ok=True)
    for directory in {(target / name).parent for name in files}:
        _fsync_directory(directory)
    os.replace(source / MANIFEST, target / MANIFEST)
    _fsync_directory(target)
    shutil.rmtree(source)


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Files a manifest lists: relative POSIX path -> {"sha256": hex, "size": bytes}. Raises FormatError."""
    path = Path(directory) / MANIFEST
    content = strict_json.read_object(path)
    files = content.get("files")
    if content.get("version") != _VERSION or not isinstance(files, dict):
        raise FormatError(f"{path}: want version {_VERSION} with a table 'files', found version "
                          f"{content.get('version')!r}", path=path)
    for name, entry in files.items():
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise FormatError(f"{path}: file {name!r} lies outside the directory", path=path, field=name)
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise FormatError(f"{path}: entry of {name!r} must have exactly sha256 and size", path=path, field=name)
    return files


def verify(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Check every file of the manifest (present, size, sha256) and return it. Files it does not list are ignored.

    Raises FormatError listing every file that is missing or differs.
    """
    directory = Path(directory)
    files = read_manifest(directory)
    problems = []
    for name, entry in files.items():
        if not (directory / name).is_file():
            problems.append(f"{name} is missing")
        elif (directory / name).stat().st_size != entry["size"]:
            problems.append(f"{name} has {(directory / name).stat().st_size} bytes, want {entry['size']}")
        elif _describe(directory / name) != entry:
            problems.append(f"{name} has another content (sha256 differs)")
    if problems:
        raise FormatError(f"{directory}: not the directory that was saved: {'; '.join(problems)}", path=directory)
    return files


def latest_complete(root: str | os.PathLike[str]) -> Path | None:
    """The `checkpoint-N` directory with the largest N that verifies; None if there is none.

    A newer one that does not verify (killed save, damaged disk) is passed over.
    """
    steps = []
    for path in Path(root).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            steps.append((int(match[1]), path))
    for _, path in sorted(steps, reverse=True):
        try:
            verify(path)
        except (FormatError, OSError):
            continue
        return path
    return None
