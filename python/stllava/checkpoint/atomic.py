"""The file layer: every write of the package goes through here. What exists under its final name is complete.

    writing, write_bytes                one file: temporary name, fsync, rename, fsync of its directory
    appending                           JSON lines that grow: a line torn by a kill or a full disk is cut off before the next one
    atomic_directory                    many files that appear together, with manifest.json = sha256 of each
    remove_directory, recover           nothing half deleted or half replaced stays under a name that is read
    verify, latest_complete, current    read back

A directory that does not exist yet: files (each fsynced) in `.NAME.partial` -> manifest, written last -> directory fsync -> rename -> parent
fsync. One that exists (an output directory that also holds checkpoint-*) is filled from inside: the same in `NAME/.new.partial`, renamed to
`NAME/.new`, and from that moment `current(NAME)` is the new content; its files are then linked into NAME, the manifest last, and `.new` goes.
So a kill or a failed call at any point leaves the old state or the new one, complete. What it leaves unfinished or unused, the next writer of
NAME finishes or removes. One writer per directory is assumed; the run's lock guarantees it (`checkpoint.lock`).

Every system call that changes the disk is a function of the module `os`, so that a test can make any of them fail; its error is an OSError that
names the file and says what to do. A failed fsync or close counts as a lost file and is never repeated: the kernel may have dropped the pages.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from stllava.checkpoint import strict_json
from stllava.errors import FormatError
from stllava.paths import inside

MANIFEST = "manifest.json"
NEW = ".new"
_VERSION = 1
_CANNOT_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_BLOCK = 1 << 20
T = TypeVar("T")


def system_call(path: Path, function: Callable[..., T], *args: Any, n_bytes: int | None = None) -> T:
    """One system call on behalf of `path`, which needs `n_bytes` in all."""
    try:
        return function(*args)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {_advice(error.errno, path, n_bytes)}", str(path)) from error


def _advice(code: int | None, path: Path, n_bytes: int | None) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        needed = "" if n_bytes is None else f"{n_bytes} bytes are needed, "
        return f"{needed}{_n_free(path)} are free: make room or choose another directory; what was saved before still stands"
    if code == errno.ENOENT:
        return "its directory is not there: make it first"
    if code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "something else of that name is in the way: choose another"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a directory that you may write to"
    return "look after the disk, then save again; what was saved before still stands"


def _n_free(path: Path) -> str:
    """Bytes that this user may still write where `path` lies or is to lie."""
    try:
        status = os.statvfs(next(parent for parent in path.absolute().parents if parent.exists()))
    except OSError:
        return "an unknown number of bytes"
    return str(status.f_bavail * status.f_frsize)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.partial")


def _fsync_directory(path: Path) -> None:
    descriptor = system_call(path, os.open, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system_call(path, os.fsync, descriptor)
    finally:
        system_call(path, os.close, descriptor)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """The directory `path`, with its parents, if it is not there yet."""
    path = Path(path)
    system_call(path, lambda: path.mkdir(parents=True, exist_ok=True))
    return path


# ---- one file ----------------------------------------------------------------------------------------------------------------


class _Writer:
    """Minimal binary file object: writes everything or raises, whatever the size of the system's short writes."""

    def __init__(self, descriptor: int, path: Path, n_bytes: int) -> None:
        self._descriptor, self._path, self._n_bytes = descriptor, path, n_bytes
        self._n_written = 0

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        n_bytes = rest.nbytes
        self._n_written += n_bytes
        while rest.nbytes:
            rest = rest[system_call(self._path, os.write, self._descriptor, rest, n_bytes=max(self._n_bytes, self._n_written)):]
        return n_bytes

    def flush(self) -> None:
        """Nothing is buffered here."""


@contextmanager
def writing(path: str | os.PathLike[str], *, n_bytes: int = 0, durable: bool = True) -> Iterator[_Writer]:
    """File object whose content appears under `path` when the block ends without an exception, else not at all.

    Args:
        n_bytes: the size, where it is known before, for the message about a full disk. durable: False leaves out the fsyncs, for files that the
            program makes again in every run.

    Raises:
        OSError (disk full, permissions) naming the file; the previous content of `path` then still stands.
    """
    path = Path(path)
    temporary = _partial(path)
    descriptor = system_call(path, os.open, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            yield _Writer(descriptor, path, n_bytes)
            if durable:
                system_call(path, os.fsync, descriptor)
        finally:
            system_call(path, os.close, descriptor)
        system_call(path, os.replace, temporary, path)
    except BaseException:
        with suppress(OSError):  # the next writer truncates it
            os.unlink(temporary)
        raise
    if durable:
        _fsync_directory(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes, *, durable: bool = True) -> None:
    """Replace the content of `path` by `data`, atomically and (`durable`, see `writing`) for good."""
    with writing(path, n_bytes=len(data), durable=durable) as file:
        file.write(data)


class _Lines:
    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._torn = True  # perhaps
        self._mend()

    def write(self, lines: str) -> None:
        """Appends whole lines. After an OSError the line it tore goes before the next one is written."""
        if self._torn:
            self._mend()
        self._torn = True
        _Writer(self._descriptor, self._path, 0).write(lines.encode())
        self._torn = False

    def _mend(self) -> None:
        """Cuts off what follows the last newline; a whole JSON value there only lacks its newline."""
        size = end = os.fstat(self._descriptor).st_size
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - _BLOCK)
            tail = system_call(self._path, os.pread, self._descriptor, end - start, start) + tail
            end = start
        tail = tail[tail.rfind(b"\n") + 1:]
        if _is_json(tail):
            _Writer(self._descriptor, self._path, 0).write(b"\n")
        elif tail:
            system_call(self._path, os.ftruncate, self._descriptor, size - len(tail))
        self._torn = False


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def appending(path: str | os.PathLike[str]) -> Iterator[_Lines]:
    """Object with `write(lines)` that appends to a file of JSON lines, made if it is missing.

    A line is with the kernel when `write` returns, so a kill loses none; a power failure may lose those since the file was opened. A last line
    that was torn is cut off on opening, so a line in the middle is never torn.
    """
    path = Path(path)
    descriptor = system_call(path, os.open, path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        yield _Lines(descriptor, path)
        system_call(path, os.fsync, descriptor)
    finally:
        system_call(path, os.close, descriptor)
    _fsync_directory(path.parent)


# ---- directories -------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory; when the block ends its files are published under `path` with a manifest.

    In a directory that exists, files that are not ours (checkpoint-*, a log) stay, and files that only the old manifest lists are removed.
    An exception in the block changes nothing. After an OSError `current(path)` is complete, the old state or the new one.
    """
    path = Path(path)
    make_directory(path.parent)
    finish_replacing(path)
    exists = path.is_dir()
    staging = _partial(path / NEW if exists else path)
    if staging.exists():
        system_call(staging, shutil.rmtree, staging)
    system_call(staging, os.mkdir, staging)
    try:
        yield staging
        files = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        entries = {}
        for name in files:
            _fsync_file(staging / name)  # whoever wrote it
            entries[name] = file_entry(staging / name)
        write_bytes(staging / MANIFEST, strict_json.dump_object({"version": _VERSION, "files": entries}))
        for directory in [*(p for p in staging.rglob("*") if p.is_dir()), staging]:
            _fsync_directory(directory)
        system_call(path, os.rename, staging, path / NEW if exists else path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # else the next writer does it
        raise
    _fsync_directory(staging.parent)
    finish_replacing(path)


def _fsync_file(path: Path) -> None:
    descriptor = system_call(path, os.open, path, os.O_RDONLY)
    try:
        system_call(path, os.fsync, descriptor)
    finally:
        system_call(path, os.close, descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """{"sha256", "size"} as read back from the file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"sha256": digest.hexdigest(), "size": file.tell()}


def current(path: str | os.PathLike[str]) -> Path:
    """Where the content of a directory lies: `path` itself, or the new content whose writer was stopped while it moved in."""
    new = Path(path) / NEW
    return new if new.is_dir() else Path(path)


def finish_replacing(path: Path) -> None:
    """Moves the content of `path`/.new, if there is one, into `path`. Links, so that it needs no room and .new stays complete to the end."""
    new = path / NEW
    if not new.is_dir():
        return
    files = read_manifest(new)
    try:
        left_over = set(read_manifest(path)) - set(files)
    except FormatError:  # none, or not one of ours: nothing there is known to be left over
        left_over = set()
    for name in files:
        make_directory((path / name).parent)
        _link(new / name, path / name)
    for name in left_over:
        with suppress(FileNotFoundError):
            system_call(path / name, os.unlink, path / name)
    for directory in {(path / name).parent for name in files}:
        _fsync_directory(directory)
    _link(new / MANIFEST, path / MANIFEST)
    _fsync_directory(path)
    remove_directory(new)


def _link(source: Path, target: Path) -> None:
    """`target` becomes `source`; a copy where the file system has no links."""
    temporary = _partial(target)
    if target.exists() and target.samefile(source):  # rename would do nothing and leave the temporary name
        return
    with suppress(FileNotFoundError):
        system_call(target, os.unlink, temporary)
    try:
        system_call(target, os.link, source, temporary)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        with open(source, "rb") as file, writing(target, n_bytes=source.stat().st_size) as copy:
            shutil.copyfileobj(file, copy, _BLOCK)
    else:
        system_call(target, os.replace, temporary, target)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Deletes a directory under another name, so that what is half deleted never looks like a whole."""
    path = Path(path)
    trash = _partial(path)
    if trash.exists():
        system_call(trash, shutil.rmtree, trash)
    system_call(path, os.rename, path, trash)
    _fsync_directory(path.parent)
    system_call(path, shutil.rmtree, trash)


def recover(root: str | os.PathLike[str]) -> None:
    """Finishes or removes what a killed run left of its checkpoint-* in `root`. For the holder of the run's lock."""
    root = Path(root)
    for trash in root.glob(".checkpoint-*.partial"):
        system_call(trash, shutil.rmtree, trash)
    for path in (root, *root.glob("checkpoint-*")):
        finish_replacing(path)


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Files a manifest lists: relative POSIX path -> {"sha256": hex, "size": bytes}. Raises FormatError."""
    path = Path(directory) / MANIFEST
    content = strict_json.read_object(path)
    files = content.get("files")
    if content.get("version") != _VERSION or not isinstance(files, dict):
        raise FormatError(f"{path}: want version {_VERSION} with a table 'files', found version "
                          f"{content.get('version')!r}", path=path)
    for name, entry in files.items():
        try:
            inside(directory, name)
        except FormatError as error:
            raise FormatError(f"{path}: {error}", path=path, field=name) from error
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
        elif file_entry(directory / name) != entry:
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
            verify(current(path))
        except (FormatError, OSError):
            continue
        return current(path)
    return None
